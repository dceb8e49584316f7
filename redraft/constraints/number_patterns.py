"""Numbers between the bounds of a JSON schema, as regular expressions."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

DIGITS = 15
"""Significant digits of numbers with a fraction: different ones are different floats too."""
_FRACTION, _EXPONENT = r"\.[0-9]{1,15}", r"(?:[eE][+-]?[0-9]{1,2})?"


def number_patterns(schema: Mapping[str, Any], *, is_integer: bool) -> list[str]:
    """Write the numbers within a schema's bounds, with as many decimals as leave them distinct floats.

    Returns regular expressions, of which one must match; none where no number fits.
    """
    finite = [abs(int(end)) for end in _bounds(schema, 1) if abs(end) < math.inf]
    if not finite:
        integer = "[1-9][0-9]{0,14}"
        return [f"0|-?{integer}" if is_integer else rf"-?(?:0|{integer})(?:{_FRACTION})?{_EXPONENT}"]
    decimals = 0 if is_integer else max(DIGITS - len(str(max(finite))), 0)
    low, high = _bounds(schema, 10**decimals)
    largest = 10 * max(10 ** (DIGITS - 1), *finite) * 10**decimals - 1
    low, high = int(max(low, -largest)), int(min(high, largest))
    signs = (("", max(low, 0), high), ("-", max(-high, 1), -low))
    return [sign + _between(a, b, decimals) for sign, a, b in signs if a <= b]


def _bounds(schema: Mapping[str, Any], scale: int) -> tuple[float, float]:
    """Return the least and the largest whole number that fits when it is divided by a scale."""
    ends: list[float] = []
    for key, sign in (("minimum", 1), ("maximum", -1)):
        inclusive, exclusive = schema.get(key), schema.get(f"exclusive{key.title()}")
        if isinstance(exclusive, bool):  # draft 4: it says of which kind the other is
            inclusive, exclusive = (None, inclusive) if exclusive else (inclusive, None)
        least = [math.ceil(sign * exact * scale) for exact in _exact(inclusive)]
        least += [math.floor(sign * exact * scale) + 1 for exact in _exact(exclusive)]
        ends.append(sign * max(least, default=-math.inf))
    return ends[0], ends[1]


def _exact(bound: float | None) -> set[Fraction]:
    """Return the decimal that stands for a bound, and the float: beyond 2^53 they are two, and both must hold."""
    return set() if bound is None else {Fraction(repr(bound)), Fraction(bound if bound % 1 == 0 else repr(bound))}


def _between(low: int, high: int, decimals: int) -> str:
    """Write the numbers of at most so many decimals from low to high, both scaled to whole numbers from 0."""
    a, b = f"{low:0{decimals + 1}}", f"{high:0{decimals + 1}}"
    if len(a) == len(b):
        return _digits(a, b, decimals)
    parts = [_digits(a, "9" * len(a), decimals), _digits("1" + "0" * (len(b) - 1), b, decimals)]
    if len(b) - len(a) > 1:
        whole = f"[1-9][0-9]{{{len(a) - decimals},{len(b) - decimals - 2}}}"
        parts.append(whole + _digits("0" * decimals, "9" * decimals, decimals))
    return f"(?:{'|'.join(parts)})"


def _digits(a: str, b: str, decimals: int) -> str:
    """Write the strings of as many digits from a to b, with a point before the last `decimals`.

    Zeros at the end of these may be left out, and the point if none stands behind it.
    """
    point = r"\." if len(a) == decimals > 0 else ""
    optional = "?" if len(a) <= decimals and not a.strip("0") else ""
    if not a.strip("0") and not b.strip("9"):
        if len(a) > decimals:
            return f"[0-9]{{{len(a) - decimals}}}" + _digits("0" * decimals, "9" * decimals, decimals)
        return f"(?:{point}[0-9]{{1,{len(a)}}})?" if a else ""
    digits_before: dict[str, str] = {}
    for digit in range(int(a[0]), int(b[0]) + 1):
        low = a[1:] if digit == int(a[0]) else "0" * len(a[1:])
        high = b[1:] if digit == int(b[0]) else "9" * len(a[1:])
        rest = _digits(low, high, decimals)
        digits_before[rest] = digits_before.get(rest, "") + str(digit)
    options = [f"[{digits}]{rest}" for rest, digits in digits_before.items()]
    return f"(?:{point}(?:{'|'.join(options)})){optional}" if point or optional or options[1:] else options[0]
