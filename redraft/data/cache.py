"""Cache folders that are complete or absent, even if a process is killed or several build the same one."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def cache_key(**parts: Any) -> str:
    """Name a cache by the hash of everything its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(folder: Path, *, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build(partial_folder)` to fill it unless it is there and whole.

    The files are written into another folder, which is renamed at the end. A manifest of sizes and sha256 is checked at
    every call, so a truncated or altered cache is built again, with a warning. One of several processes builds and the
    others wait; the lock is released when its process ends.
    """
    from filelock import FileLock

    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot write the cache to {str(folder.parent)!r} ({error.strerror})"
        raise ValueError(f"{reason}. Set XDG_CACHE_HOME to another folder.") from error
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if is_whole(folder):
            return folder
        if folder.exists():
            logger.warning("The cache %s is damaged and is built again.", folder)
            shutil.rmtree(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        try:
            build(partial)
            _write_manifest(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Say whether every file of the manifest is there, with its size and its sha256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(_file_entry(folder / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write_manifest(folder: Path) -> None:
    manifest = {path.name: _file_entry(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _file_entry(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
