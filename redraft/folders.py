"""Lock a folder to one writing process (two would mix the weights of one with the settings of the other).

Also: write a text file atomically, and hash a file.
"""

import errno
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without flock answers

logger = logging.getLogger(__name__)


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made where it is missing.

    The kernel holds the lock (flock) and releases it when the process ends, however it ends. Folders that this call
    made are removed if they are still empty. On a file system without flock a warning says that nothing is locked.

    Raises ValueError where another process holds the folder, and where it cannot be written.
    """
    with ExitStack() as stack:
        try:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"out must be a folder; {folder} is a file. Choose another --out.")
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            stack.callback(_remove_empty, missing)
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(folder)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}. Choose another --out.") from error
        stack.callback(_unlock, folder, file)
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for path in folders:
            path.rmdir()


def _lock(folder: Path) -> int:
    """Open and lock the folder's lock file, and write who holds it; return its descriptor."""
    path = folder / LOCK_FILE
    try:
        import fcntl
    except ImportError:  # Windows
        logger.warning("%s cannot be locked on this system: let no other command write there.", folder)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:  # 0 if the last holder deleted the file after we opened it: then try again
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        except BlockingIOError as error:
            holder = os.read(file, 500).decode(errors="replace") or "another process"
            os.close(file)
            raise ValueError(f"{holder} is writing to {folder}. Wait for it, or choose another --out.") from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning("%s cannot be locked (%s): let no other command write there.", folder, error.strerror)
                return file
            os.close(file)
            raise
        os.close(file)


def _unlock(folder: Path, file: int) -> None:
    with suppress(OSError):  # the folder was moved, the disk is read-only now
        (folder / LOCK_FILE).unlink()  # before the lock is released: a process that waits for it sees st_nlink 0
    os.close(file)


def write_whole(path: Path, text: str) -> None:
    """Write a text to a temporary file and rename it: a killed process leaves the old text or the new one."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.replace(path)


def hash_of(path: Path, algorithm: str = "blake2b") -> str:
    """Return the hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
