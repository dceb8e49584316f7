"""Console output that ends no run: a reader that leaves, a terminal that closes, a disk that is full under the log."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

_PASSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)  # a full disk or pipe may have room again


class Lasting:
    """A text stream that drops what cannot be written, and writes in escapes what its encoding does not have."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a signal came while a line was written
            self._note(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, RuntimeError, ValueError) as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in _PASSES:
            self._give_up()

    def _give_up(self) -> None:
        """Let the stream lead nowhere, so that what is buffered does not fail again."""
        with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def end(self) -> None:
        """Flush a last time."""
        try:
            self._stream.flush()
        except (OSError, RuntimeError, ValueError):
            self._give_up()


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make standard output and error lasting for the time of the context."""
    before = sys.stdout, sys.stderr
    lasting = [stream and Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, lasting):
            stream.end()


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup and no emoji, which the name of a folder may look like, and no wrapping."""
    console.print(text, markup=False, emoji=False, soft_wrap=True)
