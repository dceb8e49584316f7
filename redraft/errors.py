"""User mistakes: one clear line that says what was wrong, the value got, and what to do."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**20
"""Largest number of tokens, steps or texts that is taken as meant."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Make the error for a name that is not among the known ones: lists them and suggests the nearest."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}.{hint}")


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError for a number of tokens, steps or texts below 1, or so large that it can only be a mistake."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")
    if value is not None and value > MOST:
        raise ValueError(f"{name} must be at most {MOST}; got {value}.")


def check_types(settings: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value is not of its annotated type, or is infinite or NaN."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, kind):
            names = type_names(kind)
            raise ValueError(f"{name} must be {'one of' if ', ' in names else 'of type'} {names}; got {value!r}.")
        if isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value}.")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value may stand for a field of this annotation; a whole number may for a float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, inner[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, origin or kind))


def type_names(kind: Any) -> str:
    """List what an annotation allows."""
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return ", ".join(map(type_names, get_args(kind)))
    return getattr(kind, "__name__", str(kind))
