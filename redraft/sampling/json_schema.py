"""JSON schemas as regular expressions.

The language is a subset of what the schema accepts, so that every match is valid: properties in the schema's order, no
other properties beside listed ones, numbers of at most 15 digits before the point, no needless escapes in strings.
What cannot be honoured is refused, never ignored.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

CHARACTER = r'(?:[^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00[01][0-9a-f])'
FREE_DEPTH = 2
"""The most containers inside each other where a schema allows any value: their automata grow fourfold with each."""
_FRACTION, _EXPONENT = r"\.[0-9]{1,15}", r"(?:[eE][+-]?[0-9]{1,2})?"
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-2]):[0-5][0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_ANNOTATIONS |= {"$schema", "$id", "$comment", "$defs", "definitions"}
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
_ALONE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
_ALL_KEYWORDS = {"type", *_ALONE}.union(*_KEYWORDS.values())


def schema_regex(schema: Mapping[str, Any] | bool | str, *, max_depth: int, whitespace: str) -> str:
    """Return the regular expression of JSON texts that fit a schema, with at most `max_depth` nested containers.

    Supported: type, enum, const, anyOf, oneOf of alternatives that exclude each other by type, constant or a common
    required property, $ref inside the schema (recursion up to the depth), and the keywords of `_KEYWORDS`.
    Raises ValueError for any other keyword, and if no value fits within the depth.
    """
    if isinstance(schema, str):
        schema = _parsed(schema)
    pattern = _Writer(root=schema, whitespace=whitespace).value(schema, max_depth)
    if pattern is None:
        raise ValueError(f"no value fits the schema with max_depth={max_depth}. Raise max_depth or mend the schema.")
    return pattern


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"the JSON schema is not JSON: {error}; got {text[:200]!r}. Mend it.") from error


def _refuse(what: str, got: Any, remedy: str) -> ValueError:
    return ValueError(f"the JSON schema cannot be a constraint: {what}; got {got!r}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes a pattern for each schema; None where nothing fits within the depth."""

    root: Any
    whitespace: str
    written: dict[tuple[str, int], str | None] = field(default_factory=dict)

    def value(self, schema: Any, depth: int) -> str | None:
        if schema is True or schema == {}:
            depth = min(depth, FREE_DEPTH)
            return _either(
                [self._of_type(kind, {}, depth) for kind in ("object", "array", "string", "number")] + _WORDS
            )
        if schema is False:
            return None
        if not isinstance(schema, Mapping):
            raise _refuse("a schema is an object or a boolean", schema, "Mend it.")
        used = schema.keys() - _ANNOTATIONS
        unknown = sorted(key for key in used - _ALL_KEYWORDS if schema[key] is not False)
        if unknown:
            raise _refuse("unsupported keyword", unknown[0], f"Supported are {', '.join(sorted(_ALL_KEYWORDS))}.")
        alone = [key for key in _ALONE if key in used]
        if alone:
            beside = used - {alone[0], *(["type"] if alone[0] in ("enum", "const") else [])}
            if beside:
                raise _refuse(f"{alone[0]} must stand alone", sorted(beside), "Write the combination out.")
            return self._combined(alone[0], schema, depth)
        kinds = _kinds(schema)
        return _either([self._of_type(kind, schema, depth) for kind in kinds])

    def _combined(self, key: str, schema: Mapping[str, Any], depth: int) -> str | None:
        if key == "$ref":
            return self._referred(schema["$ref"], depth)
        if key in ("enum", "const"):
            values = schema["enum"] if key == "enum" else [schema["const"]]
            kinds = _kinds(schema) if "type" in schema else None
            return _either([_literal(value) for value in values if kinds is None or _kind_of(value) & set(kinds)])
        options = schema[key]
        if key == "allOf" and len(options) > 1:
            raise _refuse("allOf of several schemas", options, "Merge them into one.")
        for a, b in combinations(options, 2) if key == "oneOf" else ():
            if not self._exclude(a, b):
                raise _refuse("alternatives of oneOf may both fit", [a, b], "Use anyOf, or tell them apart by a const.")
        return _either([self.value(option, depth) for option in options])

    def _referred(self, reference: str, depth: int) -> str | None:
        """Write what a reference leads to; the containers on the way to itself are what bounds a recursion."""
        key = (reference, depth)
        if key in self.written and self.written[key] == _PENDING:
            raise _refuse("a $ref that leads only to itself", reference, "Put an object or an array between.")
        if key not in self.written:
            self.written[key] = _PENDING
            self.written[key] = self.value(_resolve(self.root, reference), depth)
        return self.written[key]

    def _of_type(self, kind: str, schema: Mapping[str, Any], depth: int) -> str | None:
        writers: dict[str, Callable[[], str | None]] = {
            "object": lambda: self._object(schema, depth - 1) if depth > 0 else None,
            "array": lambda: self._array(schema, depth - 1) if depth > 0 else None,
            "string": lambda: _string(schema),
            "integer": lambda: _number(schema, fraction=""),
            "number": lambda: _number(schema, fraction=_FRACTION),
            "boolean": lambda: "(?:true|false)",
            "null": lambda: "null",
        }
        return writers[kind]()

    def _object(self, schema: Mapping[str, Any], depth: int) -> str | None:
        properties = dict(schema.get("properties", {}))
        others = schema.get("additionalProperties", True)
        required = schema.get("required", [])
        for name in required:
            properties.setdefault(name, others)
        if not properties and others is not False:
            return self._map(schema, others, depth)
        if "minProperties" in schema or "maxProperties" in schema:
            raise _refuse("minProperties and maxProperties with listed properties", sorted(schema), "Use required.")
        members: list[tuple[str, bool]] = []
        for name, of_name in properties.items():
            value = self.value(of_name, depth)
            if value is not None:
                members.append((f"{_literal(name)}:{self.whitespace}{value}", name in required))
            elif name in required:
                return None
        return rf"\{{{_members(members, ',' + self.whitespace)}\}}"

    def _map(self, schema: Mapping[str, Any], others: Any, depth: int) -> str | None:
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if least > 1:
            raise _refuse("minProperties above 1 cannot tell equal names apart", least, "Name the properties.")
        value = self.value(others, depth)
        member = None if value is None else f'"{CHARACTER}*":{self.whitespace}{value}'
        inside = _repeated(member, least, most, "," + self.whitespace)
        return None if inside is None else rf"\{{{inside}\}}"

    def _array(self, schema: Mapping[str, Any], depth: int) -> str | None:
        item = self.value(schema.get("items", True), depth)
        inside = _repeated(item, schema.get("minItems", 0), schema.get("maxItems"), "," + self.whitespace)
        return None if inside is None else rf"\[{inside}\]"

    def _exclude(self, a: Any, b: Any) -> bool:
        """Tell that no value fits both, on the safe side."""
        a, b = self._followed(a), self._followed(b)
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        if not _possible_kinds(a) & _possible_kinds(b):
            return True
        constants = [s.get("enum", [s["const"]] if "const" in s else None) for s in (a, b)]
        if constants[0] is not None and constants[1] is not None:
            return not any(x == y for x in constants[0] for y in constants[1])
        # Of values that are objects on both sides, a property that both require may decide.
        common = set(a.get("required", [])) & set(b.get("required", []))
        both_objects = _possible_kinds(a) & _possible_kinds(b) == {"object"}
        named = [name for name in common if name in a.get("properties", {}) and name in b.get("properties", {})]
        return both_objects and any(self._exclude(a["properties"][name], b["properties"][name]) for name in named)

    def _followed(self, schema: Any) -> Any:
        for _ in range(20):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            schema = _resolve(self.root, schema["$ref"])
        return schema


_PENDING = "pending"
_WORDS: list[str | None] = ["true", "false", "null"]


def _either(options: list[str | None]) -> str | None:
    possible = [option for option in options if option is not None]
    return f"(?:{'|'.join(possible)})" if possible else None


def _repeated(item: str | None, least: int, most: int | None, comma: str) -> str | None:
    """Write `least` to `most` items with commas between."""
    if most is not None and most < least:
        return None
    if item is None or most == 0:
        return "" if least == 0 else None
    tail = f"(?:{comma}{item}){{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
    return f"{item}{tail}" if least else f"(?:{item}{tail})?"


def _members(members: list[tuple[str, bool]], comma: str) -> str:
    """Write members in order, the optional ones left out at will, with commas between those that stand."""
    first = next((i for i, (_, is_required) in enumerate(members) if is_required), None)
    if first is not None:
        before = "".join(f"(?:{text}{comma})?" for text, _ in members[:first])
        return before + members[first][0] + _followers(members[first + 1 :], comma)
    starts = [text + _followers(members[i + 1 :], comma) for i, (text, _) in enumerate(members)]
    return f"(?:{'|'.join(starts)})?" if starts else ""


def _followers(members: list[tuple[str, bool]], comma: str) -> str:
    return "".join(f"(?:{comma}{text})" + ("" if is_required else "?") for text, is_required in members)


def _literal(value: Any) -> str:
    return re.escape(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Return the types of a schema; a keyword that speaks of one type stands for it where none is given."""
    given = schema.get("type")
    if given is None:
        given = [kind for kind, keywords in _KEYWORDS.items() if keywords & schema.keys() and kind != "integer"]
        given = given or [*_KEYWORDS]
    kinds = [given] if isinstance(given, str) else list(given)
    for kind in kinds:
        if kind not in _KEYWORDS:
            raise _refuse("unknown type", kind, f"Known are {', '.join(_KEYWORDS)}.")
    return kinds


def _kind_of(value: Any) -> set[str]:
    if isinstance(value, float):
        return {"number"}
    kinds = {bool: {"boolean"}, int: {"integer", "number"}, str: {"string"}, list: {"array"}, dict: {"object"}}
    return kinds.get(type(value), {"null"})


def _possible_kinds(schema: Mapping[str, Any]) -> set[str]:
    """Return the types a value may have; integers are numbers too."""
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        kinds = set().union(*map(_kind_of, values))
    else:
        kinds = set(_kinds(schema) if "type" in schema else _KEYWORDS)
    return {"number" if kind == "integer" else kind for kind in kinds}


def _resolve(root: Any, reference: str) -> Any:
    if not reference.startswith("#"):
        raise _refuse("a $ref must point into the schema itself", reference, "Copy what it names under $defs.")
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            raise _refuse("a $ref that leads nowhere", reference, "Define it under $defs.")
        found = found[name]
    return found


def _string(schema: Mapping[str, Any]) -> str | None:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if "pattern" not in schema and "format" not in schema:
        if most is not None and most < least:
            return None
        return f'"{CHARACTER}{{{least},{"" if most is None else most}}}"'
    if len({"pattern", "format", "minLength", "maxLength"} & schema.keys()) > 1:
        raise _refuse("pattern, format and bounds on the length of one string", dict(schema), "Keep one of them.")
    if "pattern" in schema:
        return f'"{_searched(schema["pattern"])}"'
    if schema["format"] not in FORMATS:
        raise _refuse("unsupported format", schema["format"], f"Supported are {', '.join(FORMATS)}; or give a pattern.")
    return f'"{FORMATS[schema["format"]]}"'


def _searched(pattern: str) -> str:
    """Write a pattern that JSON schema would search for; it must not match what JSON strings escape."""
    from redraft.sampling.automaton import from_regex

    at_start, at_end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[at_start : len(pattern) - at_end]
    table = from_regex(inner).table
    escaped = [*range(0x20), ord('"'), ord("\\"), 0x7F]
    if (table[:-1, escaped] != len(table) - 1).any():
        remedy = "Use classes such as [a-z ] instead of . and [^...]."
        raise _refuse("a pattern that matches quotes, backslashes or control characters", pattern, remedy)
    anything = f"{CHARACTER}*"
    return f"{'' if at_start else anything}(?:{inner}){'' if at_end else anything}"


def _number(schema: Mapping[str, Any], *, fraction: str) -> str | None:
    """Write numbers within bounds; at bounds that are no integers, and past 10^15, somewhat fewer than allowed."""
    low = max([-math.inf, *(math.ceil(schema[key]) for key in ("minimum",) if key in schema)])
    high = min([math.inf, *(math.floor(schema[key]) for key in ("maximum",) if key in schema)])
    if "exclusiveMinimum" in schema:
        low = max(low, math.floor(schema["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in schema:
        high = min(high, math.ceil(schema["exclusiveMaximum"]) - 1)
    if low == -math.inf and high == math.inf:
        return rf"-?(?:0|[1-9][0-9]{{0,14}})(?:{fraction})?{_EXPONENT}" if fraction else r"(?:0|-?[1-9][0-9]{0,14})"
    low, high = int(max(low, 1 - 10**15)), int(min(high, 10**15 - 1))
    parts = []
    for sign, a, b in (("", max(low, 0), high), ("-", max(-high, 0), -low)):
        # With a fraction the integer part stays one below the bound that the fraction leads away to.
        if a <= b:
            whole = _between(a, b)
            parts += [f"{sign}{whole}"] if not fraction else [f"{sign}{_between(b, b)}"]
            if fraction and a < b:
                parts.append(f"{sign}{_between(a, b - 1)}(?:{fraction})?")
    return _either(list(parts))


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
