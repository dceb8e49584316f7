"""Files of a checkpoint, which may be damaged or hostile: read them, or end in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redraft.models.translations import Raw


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a checkpoint into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # damaged files fail anywhere in the libraries, with errors of any kind
        raise ValueError(f"cannot read {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, short enough to be read; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if isinstance(error, KeyError) or len(said) < 4:  # a key alone
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= 300 else f"{said[:300]}..."


def read_json(file: Path) -> Raw:
    """Read a JSON object. Raises ValueError, in one line, where the file is none."""
    with reading(str(file)):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: it must hold a JSON object; got {type(content).__name__}.")
    return content
