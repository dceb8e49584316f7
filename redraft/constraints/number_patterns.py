"""Numbers between the bounds of a JSON schema, as regular expressions."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

DIGITS = 15
"""Significant digits of numbers with a fraction: different ones are different floats too."""
_FRACTION, _EXPONENT = r"\.[0-9]{1,15}", r"(?:[eE][+-]?[0-9]{1,2})?"


def number_patterns(schema: Mapping[str, Any], *, is_integer: bool) -> list[str]:
    """Write the numbers within a schema's bounds, with at most as many decimals as keep them distinct floats.

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
    for key, sign in (("minimum", 1), ("maximum", -1)):  # the largest x is minus the least -x
        bounds = [-math.inf]
        if key in schema:
            bounds.append(math.ceil(sign * Fraction(repr(schema[key])) * scale))
        if (key := f"exclusive{key.title()}") in schema:
            bounds.append(math.floor(sign * Fraction(repr(schema[key])) * scale) + 1)
        ends.append(sign * max(bounds))
    return ends[0], ends[1]


def _between(low: int, high: int, decimals: int) -> str:
    """Write the numbers of at most so many decimals from low to high, both scaled to whole numbers from 0."""
    shortest, longest = (max(len(str(end)), decimals + 1) for end in (low, high))
    parts = []
    for size in range(shortest, longest + 1):
        a = low if size == shortest else 10 ** (size - 1)
        b = high if size == longest else 10**size - 1
        parts.append(_digits(f"{a:0{size}}", f"{b:0{size}}", decimals))
    return f"(?:{'|'.join(parts)})"


def _digits(a: str, b: str, decimals: int) -> str:
    """Write the strings of as many digits from a to b, with a point before the last `decimals`.

    Zeros at the end of the decimals may be left out, and the point if no decimal is left.
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
