"""Checkpoints that know whether they are whole."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from redraft.training.output import say

RECIPE_FILE = "recipe.json"
HASHES_FILE = "hashes.json"
OBJECTIVE_FILE = "objective.json"  # what a checkpoint was trained with
STAGING = ".saving"  # where checkpoints are written


@contextmanager
def told_of_the_disk(what: str, run: Path) -> Iterator[None]:
    """Raise ValueError in place of what a disk says that is full or gone; torch and safetensors wrap it."""
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


def write_whole(path: Path, text: str) -> None:
    """Write a text aside and rename it: a kill leaves the old one or the new one."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.replace(path)


def write_hashes(folder: Path) -> None:
    """Write the BLAKE2b hash of every file of a checkpoint beside them."""
    (folder / HASHES_FILE).write_text(json.dumps(_hashes(folder), indent=2) + "\n")


def hash_of(path: Path) -> str:
    """Return the BLAKE2b hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is missing or altered; None for a whole one."""
    path = folder / HASHES_FILE
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError):
        return f"{HASHES_FILE} cannot be read"
    found = _hashes(folder)
    return next((f"{name} is not as it was written" for name in written if found.get(name) != written[name]), None)


def last_whole_checkpoint(run: Path, console: Console) -> str | None:
    """Find the newest checkpoint that is as it was written; None where a run has none yet.

    Damaged ones are named on the console. Raises ValueError where all are damaged.
    """
    folders = _checkpoints(run)
    for folder in reversed(folders):
        reason = damage(folder)
        if reason is None:
            return str(folder)
        say(console, f"{folder} is damaged ({reason}): going on from the one before it")
    if folders:
        raise ValueError(f"no checkpoint of {run} is whole. Start a new run with another --out.")
    return None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its hashes first: what a kill leaves of it is known to be damaged."""
    (folder / HASHES_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def tidy(run: Path, *, step: int, keep: int) -> None:
    """Delete what kills left, and all checkpoints but the newest up to a step; 0 keeps all of these.

    Later ones were damaged and passed over, or the run would not be at this step.
    """
    shutil.rmtree(run / STAGING, ignore_errors=True)
    folders = _checkpoints(run)
    whole = [folder for folder in folders if (folder / HASHES_FILE).exists() and step_of(folder) <= step]
    for folder in folders:
        if folder not in whole[-keep:]:
            delete_checkpoint(folder)


def step_of(checkpoint: str | Path) -> int:
    """Read the step of a checkpoint off its name."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def _checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, whole or not, the oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.is_dir()), key=step_of)


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != HASHES_FILE:
            hashes[str(path.relative_to(folder))] = hash_of(path)
    return hashes
