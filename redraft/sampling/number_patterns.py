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
    return [sign + _decimals_between(a, b, decimals) for sign, a, b in signs if a <= b]


def _bounds(schema: Mapping[str, Any], scale: int) -> tuple[float, float]:
    """Return the least and the largest whole number that fits when it is divided by a scale."""
    ends: list[float] = []
    for key, exclusive_key, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        inclusive, exclusive = schema.get(key), schema.get(exclusive_key)
        if isinstance(exclusive, bool):  # draft 4: it says of which kind the other is
            inclusive, exclusive = (None, inclusive) if exclusive else (inclusive, None)
        least = -math.inf
        for value, is_open in ((inclusive, False), (exclusive, True)):
            # A float beyond 2^53 is not the decimal that stands for it, and whole numbers are compared with it exactly.
            for exact in (
                set() if value is None else {Fraction(repr(value)), *([Fraction(value)] if value % 1 == 0 else [])}
            ):
                scaled = sign * exact * scale
                least = max(least, math.floor(scaled) + 1 if is_open else math.ceil(scaled))
        ends.append(sign * least)
    return ends[0], ends[1]


def _decimals_between(low: int, high: int, decimals: int) -> str:
    """Write the numbers of at most so many decimals from low to high, both scaled to whole numbers."""
    (a, after_a), (b, after_b) = divmod(low, 10**decimals), divmod(high, 10**decimals)
    if not decimals:
        return _between(a, b)
    if a == b:
        return f"{a}{_point(after_a, after_b, decimals)}"
    last = 10**decimals - 1
    parts = [f"{a}{_point(after_a, last, decimals)}", f"{b}{_point(0, after_b, decimals)}"]
    parts += [f"{_between(a + 1, b - 1)}{_point(0, last, decimals)}"] if b - a > 1 else []
    return f"(?:{'|'.join(parts)})"


def _point(low: int, high: int, decimals: int) -> str:
    fraction = rf"(?:\.{_padded(f'{low:0{decimals}}', f'{high:0{decimals}}')})"
    return fraction if low else f"{fraction}?"


def _padded(a: str, b: str) -> str:
    """Write the strings of 1 to as many digits that lie between a and b when zeros fill them up."""
    rest = len(a) - 1
    if not a.strip("0") and not b.strip("9"):
        return f"(?:[0-9]{{1,{len(a)}}})"
    options = []
    for digit in range(int(a[0]), int(b[0]) + 1):
        low = a[1:] if digit == int(a[0]) else "0" * rest
        high = b[1:] if digit == int(b[0]) else "9" * rest
        options.append(f"{digit}" + (_padded(low, high) + ("" if low.strip("0") else "?") if rest else ""))
    return f"(?:{'|'.join(options)})"


def _between(low: int, high: int) -> str:
    """Write the integers low ... high, both at least 0, without leading zeros."""
    a, b = str(low), str(high)
    if len(a) == len(b):
        return _digits_between(a, b)
    if b == "9" * len(b):
        return f"(?:{_digits_between(a, '9' * len(a))}|[1-9][0-9]{{{len(a)},{len(b) - 1}}})"
    below = 10 ** (len(b) - 1)
    return f"(?:{_between(low, below - 1)}|{_digits_between(str(below), b)})"


def _digits_between(a: str, b: str) -> str:
    """Write the strings of as many digits from a to b."""
    if a == b:
        return a
    rest = len(a) - 1
    if a[0] == b[0]:
        return a[0] + _digits_between(a[1:], b[1:])
    # First digits behind which anything may follow; the outermost ones if their rest is all 0 or all 9.
    low = int(a[0]) + (a[1:] != "0" * rest)
    high = int(b[0]) - (b[1:] != "9" * rest)
    parts = [f"[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else "")] if low <= high else []
    if low > int(a[0]):
        parts.append(a[0] + _digits_between(a[1:], "9" * rest))
    if high < int(b[0]):
        parts.append(b[0] + _digits_between("0" * rest, b[1:]))
    return f"(?:{'|'.join(parts)})"
