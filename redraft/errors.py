"""User mistakes: one clear line that says what was wrong, the value got, and what to do."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Make the error for a name that is not among the known ones: lists them and suggests the nearest."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}.{hint}")


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first name that is not among the known ones."""
    valid = list(known)
    for name in names:
        if name not in valid:
            raise unknown_name(what, name, valid)


def import_own(what: str, name: str) -> Any:
    """Import a user's own MODULE:NAME. Raises ValueError where it is not there."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} {name} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
