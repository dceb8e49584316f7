"""Checkpoints that know whether they are whole."""

import hashlib
import json
from pathlib import Path

from rich.console import Console

HASHES_FILE = "hashes.json"


def write_hashes(folder: Path) -> None:
    """Write the BLAKE2b hash of every file of a checkpoint beside them."""
    (folder / HASHES_FILE).write_text(json.dumps(_hashes(folder), indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is missing or altered; None for a whole one, or for one without hashes."""
    path = folder / HASHES_FILE
    if not path.exists():
        return None
    try:
        written = json.loads(path.read_text())
    except ValueError:
        return f"{HASHES_FILE} cannot be read"
    found = _hashes(folder)
    return next((f"{name} is not as it was written" for name in written if found.get(name) != written[name]), None)


def last_whole_checkpoint(run: Path, console: Console) -> str | None:
    """Find the newest checkpoint that is as it was written; None where a run has none yet.

    Damaged ones are named on the console. Raises ValueError where all are damaged.
    """
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in run.glob("checkpoint-*") if path.is_dir()}
    for _, folder in sorted(steps.items(), reverse=True):
        reason = damage(folder)
        if reason is None:
            return str(folder)
        console.print(f"{folder} is damaged ({reason}): going on from the one before it", soft_wrap=True)
    if steps:
        raise ValueError(f"no checkpoint of {run} is whole. Start a new run with another --out.")
    return None


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != HASHES_FILE:
            with path.open("rb") as file:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()
    return hashes
