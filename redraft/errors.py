"""User mistakes: one clear line that says what was wrong, the value got, and what to do."""

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Make the error for a name that is not among the known ones: lists them and suggests the nearest."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}.{hint}")
