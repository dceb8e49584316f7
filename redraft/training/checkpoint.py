"""Checkpoints with hashes of their files and the settings of their run, so that damage and mix-ups are found."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from redraft.folders import hash_of
from redraft.training.config import RECIPE_FILE
from redraft.training.output import say

HASHES_FILE = "hashes.json"
IDENTITY_FILE = "objective.json"  # settings that a checkpoint was trained with
STAGING = ".saving"  # folder in which checkpoints are written before they are moved


@contextmanager
def explain_disk_errors(what: str, run: Path) -> Iterator[None]:
    """Turn disk errors (full, removed) into a ValueError; torch and safetensors raise them as errors of their own."""
    try:
        yield
    except (NotImplementedError, torch.OutOfMemoryError, torch.distributed.DistError):  # RuntimeErrors, not the disk's
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        advice = "Nothing is lost; make room, then start again"
        if (run / RECIPE_FILE).exists():
            advice = "There is no checkpoint yet; make room, then --resume starts from the first step"
        if any((folder / HASHES_FILE).exists() for folder in _checkpoints(run)):
            advice = "Earlier checkpoints are whole; make room, then --resume"
        raise ValueError(f"{what} could not be written: {error}. {advice}.") from error


def write_hashes(folder: Path) -> None:
    """Write the BLAKE2b hash of every file of a checkpoint beside them."""
    (folder / HASHES_FILE).write_text(json.dumps(_hashes(folder), indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is missing or altered; None for a whole one."""
    try:
        written = json.loads((folder / HASHES_FILE).read_text())
    except (OSError, ValueError):
        return f"{HASHES_FILE} cannot be read"
    present = _hashes(folder)
    return next((f"{name} is not as it was written" for name in written if present.get(name) != written[name]), None)


def last_whole_checkpoint(run: Path, console: Console) -> str | None:
    """Find the newest checkpoint that is as it was written; None where a run has none yet.

    Damaged ones are named on the console. Raises ValueError where all are damaged.
    """
    folders = _checkpoints(run)
    for folder in reversed(folders):
        reason = damage(folder)
        if reason is None:
            return str(folder)
        say(console, f"{folder} is damaged ({reason}): continuing from the one before it")
    if folders:
        raise ValueError(f"no checkpoint of {run} is whole. Start a new run with another --out.")
    return None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its hashes first: if the process is killed meanwhile, the rest counts as damaged."""
    (folder / HASHES_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def tidy(run: Path, *, step: int, keep: int) -> None:
    """Delete unfinished checkpoints, and all but the newest `keep` up to a step.

    Checkpoints of later steps are damaged: the run was resumed from an earlier one.
    """
    shutil.rmtree(run / STAGING, ignore_errors=True)
    folders = _checkpoints(run)
    whole = [folder for folder in folders if (folder / HASHES_FILE).exists() and step_of(folder) <= step]
    for folder in folders:
        if folder not in whole[-keep:]:
            delete_checkpoint(folder)


def publish(checkpoint: Path, run: Path, *, keep: int) -> None:
    """Hash a checkpoint in the staging folder and move it to the others, so that a killed run leaves no half of one."""
    with explain_disk_errors(checkpoint.name, run):
        write_hashes(checkpoint)
    delete_checkpoint(run / checkpoint.name)  # a damaged one of the same step
    checkpoint.rename(run / checkpoint.name)
    tidy(run, step=step_of(checkpoint), keep=keep)


def step_of(checkpoint: str | Path) -> int:
    """Read the step of a checkpoint from its name."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def check_identity(checkpoint: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError for a checkpoint of another run: an edited recipe, a copied folder.

    One that an earlier version wrote does not say all of its identity.
    """
    path = checkpoint / IDENTITY_FILE
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved["diffusion"] = json.loads((checkpoint / "config.json").read_text()).get("diffusion", {})
    for section, values in wanted.items():
        for name, value in values.items():
            if (before := saved.get(section, {}).get(name, value)) != value:
                raise ValueError(
                    f"{checkpoint} was trained with {name} {before!r}, but {RECIPE_FILE} or a file that it names has "
                    f"{value!r} now. Undo the change, or start a new run with another --out."
                )


def _checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, whole or not, the oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.is_dir()), key=step_of)


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != HASHES_FILE]
    return {str(path.relative_to(folder)): hash_of(path) for path in files}
