"""The ends of a command's output: descriptors that the shell closed, a reader that has left."""

import os
import sys
from contextlib import suppress
from pathlib import Path


def open_closed_output() -> None:
    """Let output that the shell closed (`>&-`) lead nowhere; the next file to be opened would get its lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def flush_output() -> OSError | None:
    """Write what is buffered, and return why it could not be; the rest leads nowhere then."""
    problem = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            problem = error
            with suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return problem
