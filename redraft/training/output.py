"""Console output whose errors do not end a run: a pipe without a reader, a closed terminal, a full disk."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

_PASSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)  # a full disk or pipe may have room again


class LastingStream:
    """A text stream that drops text which cannot be written, and escapes characters outside of its encoding."""

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
            self._drop(error)
        return len(text)

    def flush(self, *, is_last: bool = False) -> None:
        try:
            self._stream.flush()
        except (OSError, RuntimeError, ValueError) as error:
            self._drop(error, is_last=is_last)

    def _drop(self, error: Exception, *, is_last: bool = False) -> None:
        """Drop the text. A stream that is gone is redirected to /dev/null, so that its buffer does not fail again."""
        if is_last or (isinstance(error, OSError) and error.errno not in _PASSES):
            with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Wrap standard output and error in a `LastingStream` for the time of the context."""
    before = sys.stdout, sys.stderr
    lasting = [stream and LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, lasting):
            stream.flush(is_last=True)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no wrapping, and no markup or emoji, as the name of a folder may look like them."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
