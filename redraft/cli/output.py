"""Output that cannot be written: descriptors that the shell closed, a pipe whose reader has ended."""

import os
import sys
from contextlib import suppress
from pathlib import Path


def open_closed_output() -> None:
    """Open /dev/null for output that the shell closed (`>&-`); else the next opened file would get its lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def flush_output() -> OSError | None:
    """Write what is buffered. If that fails, return the error and send the rest to /dev/null."""
    problem = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            problem = error
            with suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return problem
