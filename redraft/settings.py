"""Settings: frozen dataclasses whose fields declare their bounds, which are checked in one place. No torch."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

MAX_COUNT = 2**20
"""Largest number of tokens, steps or texts: a larger one can only be a mistake."""


@dataclass(frozen=True)
class Within:
    """An interval in the usual notation: `Annotated[float, Within("[0, 1)")]` includes 0 and excludes 1."""

    interval: str

    def __contains__(self, value: Any) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return bool(above and below)  # numpy compares to its own bool

    def __str__(self) -> str:
        low, high = (end.strip() for end in self.interval[1:-1].split(","))
        if high == "inf":
            return f"be at least {low}" if self.interval[0] == "[" else "be positive and finite"
        return f"lie in {self.interval}"


Count = Annotated[int, Within(f"[1, {MAX_COUNT}]")]
Natural = Annotated[int, Within("[0, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Probability = Annotated[float, Within("[0, 1]")]
Fraction = Annotated[float, Within("[0, 1)")]
Seed = Annotated[int, Within("[0, 4294967295]")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. Raises ValueError for a value of another type than annotated, or outside its bounds."""

    section: ClassVar[str] = ""
    """Prefix of a field's name in errors: `train` where the flag is `--train.seed`."""
    renamed: ClassVar[dict[str, str]] = {}
    """Names that earlier versions saved, with today's."""
    removed: ClassVar[dict[str, tuple[Any, str]]] = {}
    """Settings that earlier versions saved: the value that means what is done today, and what to use for any other.
    `...` stands for any value, of settings that change no weights."""

    def __post_init__(self) -> None:
        for name, kind in _annotations(type(self)).items():
            check_field(f"{self.section}.{name}".lstrip("."), getattr(self, name), kind)

    @classmethod
    def setting_names(cls) -> list[str]:
        """List the settings; `__dataclass_fields__` holds `section` too."""
        return [field.name for field in fields(cls)]


def check_field(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError for a value that is not of this annotation, or outside the bounds that it declares."""
    if not fits(value, kind):
        raise ValueError(f"{name} must be {type_names(kind)}; got {value!r}.")
    if isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value}.")
    for one in value if isinstance(value, tuple) else (value,):
        for bound in declared_bounds(kind):
            if isinstance(one, Real) and not isinstance(one, bool) and one not in bound:
                raise ValueError(f"{name} must {bound}; got {one}.")


def _annotations(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def declared_bounds(kind: Any) -> list[Within]:
    """List the bounds in an annotation; those of `Count | None` and of `tuple[Count, ...]` are Count's."""
    if get_origin(kind) is Annotated:
        inner, *extras = get_args(kind)
        return [extra for extra in extras if isinstance(extra, Within)] + declared_bounds(inner)
    if get_origin(kind) in (Union, UnionType, tuple):
        return [bound for one in get_args(kind) for bound in declared_bounds(one)]
    return []


def fits(value: Any, kind: Any) -> bool:
    """Whether a value may stand for a field of this annotation; a whole number may for a float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(fits(one, inner[0]) for one in value)
    if isinstance(value, bool):
        return kind in (bool, Any)
    return kind is Any or isinstance(value, {int: Integral, float: Real}.get(kind, origin or kind))


def type_names(kind: Any) -> str:
    """Say what an annotation allows: `one of 'a', 'b'`, `one of int, None` or `of type int`."""
    names = _names(kind)
    return f"one of {', '.join(names)}" if len(names) > 1 else f"of type {names[0]}"


def _names(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _names(inner[0])
    if origin is Literal:
        return [repr(value) for value in inner]
    if origin in (Union, UnionType):
        return [name for one in inner for name in _names(one)]
    return ["None" if kind is NoneType else getattr(kind, "__name__", str(kind))]
