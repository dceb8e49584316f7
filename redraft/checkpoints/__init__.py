"""Checkpoints that ship in the package: `redraft/NAME`, wherever a model is named. No torch.

Each is a folder beside this file. index.json holds for each name what it is, how it was made and measured, and the
SHA-256 of every file. `tools/ship.py` writes both.
"""

import json
from pathlib import Path
from typing import Any

from redraft.errors import unknown_name
from redraft.folders import hash_of

FOLDER = Path(__file__).parent
INDEX_FILE = "index.json"
PREFIX = "redraft/"


def read_index() -> dict[str, dict[str, Any]]:
    """Read what is known of every checkpoint that ships, by name. Raises ValueError where the file is damaged."""
    try:
        index: dict[str, dict[str, Any]] = json.loads((FOLDER / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {FOLDER / INDEX_FILE}: {error}. Reinstall redraft.") from error
    return index


def local_path(path: str | Path) -> str | Path:
    """Return the folder of the checkpoint that `redraft/NAME` names; any other path or hub id as it is.

    Raises ValueError for a file of it that is missing or altered, and for a NAME that is neither in the index nor in a
    folder `redraft` here.
    """
    name = str(path).removeprefix(PREFIX)
    if name in ("", str(path)) or "/" in name:
        return path
    index = read_index()
    if name in index:
        _check_files(FOLDER / name, index[name]["sha256"])
        return str(FOLDER / name)
    if Path(path).exists():
        return path
    raise unknown_name("checkpoint", str(path), [PREFIX + known for known in index])


def public_name(path: str | Path) -> str:
    """Return `redraft/NAME` for the folder of a checkpoint that ships, so that what is saved works on other machines.

    Of any other folder this is its absolute path.
    """
    folder = Path(path).resolve()
    return PREFIX + folder.name if folder.parent == FOLDER.resolve() else str(folder)


def _check_files(folder: Path, hashes: dict[str, str]) -> None:
    """Raise ValueError for the first file that is missing or altered."""
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{PREFIX}{folder.name} is damaged: {file} is missing. Reinstall redraft.")
        if hash_of(file, "sha256") != expected:
            raise ValueError(f"{PREFIX}{folder.name} is damaged: {file} is not as it was shipped. Reinstall redraft.")
