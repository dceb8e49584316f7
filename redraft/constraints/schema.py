"""JSON schemas as patterns.

The language is a subset of what the schema accepts, so that every match is valid: properties in the schema's order, no
other properties beside listed ones, numbers of at most 15 digits before the point, no needless escapes in strings.
A keyword that is not supported is an error, never ignored.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from redraft.constraints.number_patterns import number_patterns
from redraft.constraints.regex import Pattern
from redraft.settings import Natural, check_field

CHARACTER = r'(?:[^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00[01][0-9a-f])'
FREE_DEPTH = 2
"""Largest number of containers inside each other where a schema allows any value: automata grow fourfold with each."""
MAX_CHARACTERS = 1_000_000
_DATE = r"[1-9][0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-2]):[0-5][0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_ANNOTATIONS |= {"$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "discriminator"}


_SCHEMA, _NUMBER = dict | bool, int | float
_RULES: dict[str, dict[str, Any]] = {
    "object": dict.fromkeys(("additionalProperties", "unevaluatedProperties"), _SCHEMA)
    | {"properties": dict, "required": list[str]},
    "array": {"items": _SCHEMA, "unevaluatedItems": _SCHEMA, "minItems": Natural, "maxItems": Natural},
    "string": {"minLength": Natural, "maxLength": Natural, "pattern": str, "format": str},
    "number": dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    "any": {"type": str | list[str]},
    "alone": {"$ref": str, "enum": list, "const": Any, "anyOf": list, "oneOf": list, "allOf": list},
}
"""The keywords for each type, and those that stand alone, with the types of their values."""
_KEYWORDS = {keyword: (kind, value) for kind, keywords in _RULES.items() for keyword, value in keywords.items()}
_KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
_ANYTHING: dict[str, Any] = {}
"""The schema of any value."""
_QUOTE, _COMMA, _COLON = '"', ", ?", ": ?"


def schema_pattern(schema: Mapping[str, Any] | bool | str, *, max_depth: int) -> Pattern:
    """Return the pattern of JSON texts that fit a schema, with at most `max_depth` nested containers.

    Supported: type, enum, const, anyOf, oneOf of alternatives that exclude each other by type, constant or a common
    required property, $ref by a path inside the schema (recursion up to the depth), and the keywords of `_RULES`.
    Raises ValueError for any other keyword, for values that a keyword cannot have, and if no value fits within the
    depth.
    """
    try:
        document = _document(schema)
        pattern = _Writer(root=document).value(document, max_depth)
    except RecursionError as error:
        reason = "it or max_depth is too deep, or a $ref leads only to itself"
        raise ValueError(f"the JSON schema is nested too deeply: {reason}. Flatten it.") from error
    if pattern is None:
        raise ValueError(f"no value fits the schema with max_depth={max_depth}. Raise max_depth or edit the schema.")
    return pattern


def _document(schema: Any) -> Any:
    """Read a schema as JSON, whole numbers as integers; what Python holds beside JSON is refused."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
        document = json.loads(text, parse_float=_number)
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()  # refuses NaN and lone surrogates
    except (ValueError, TypeError) as error:
        raise ValueError(f"the JSON schema is not JSON: {error}; got {schema!r:.200}. Edit it.") from error
    return document


def _number(text: str) -> float:
    return int(float(text)) if float(text).is_integer() else float(text)


def _refuse(what: str, got: Any, remedy: str) -> ValueError:
    return ValueError(f"the JSON schema cannot be a constraint: {what}; got {got!r:.200}. {remedy}")


@dataclass(kw_only=True)
class _Writer:
    """Writes a pattern for each schema; None where nothing fits within the depth."""

    root: Any
    written: dict[tuple[int, int], Pattern | None] = field(default_factory=dict)
    """By schema and depth, so that equal parts are one object."""

    def check(self, schema: Any) -> None:
        """Raise ValueError for a value that is not a schema, for unsupported keywords and for their invalid values."""
        if not isinstance(schema, Mapping):
            raise _refuse("a schema must be an object or a boolean", schema, "Edit it.")
        if schema is not self.root and schema.keys() & {"$id", "id"}:
            raise _refuse("a part with an $id, in which $ref would start from there", schema, "Leave the $id out.")
        for key in sorted(schema.keys() - _ANNOTATIONS):
            if key not in _KEYWORDS:
                raise _refuse("unsupported keyword", key, f"Supported are {', '.join(sorted(_KEYWORDS))}.")
            check_field(f"{key} of the JSON schema", schema[key], _KEYWORDS[key][1])

    def value(self, schema: Any, depth: int) -> Pattern | None:
        if schema is True or (isinstance(schema, Mapping) and not schema.keys() - _ANNOTATIONS):
            schema, depth = _ANYTHING, min(depth, FREE_DEPTH)
        key = (id(schema), depth)
        if key not in self.written:
            self.written[key] = self._value(schema, depth)
        return self.written[key]

    def _value(self, schema: Any, depth: int) -> Pattern | None:
        if schema is False:
            return None
        self.check(schema)
        key = next((key for key in _RULES["alone"] if key in schema), None)
        if key is None:
            return _either([self._of_kind(kind, schema, depth) for kind in _kinds(schema)])
        beside = schema.keys() - _ANNOTATIONS - {key, "type" if key in ("enum", "const") else key}
        if beside:
            raise _refuse(f"{key} must stand alone", sorted(beside), "Write the combination out.")
        if key == "$ref":
            return self.value(self._target(schema[key]), depth)
        if key in ("enum", "const"):
            return _one_of([value for value in _constants(schema) if _kinds_of(value) & _types(schema)])
        options = schema[key]
        pattern = _either([self.value(option, depth) for option in options])
        if key == "allOf" and len(options) > 1:
            raise _refuse("allOf of several schemas", options, "Merge them into one.")
        if key == "oneOf" and not self._are_exclusive(options):
            raise _refuse("alternatives of oneOf may both fit", options, "Use anyOf, or tell them apart by a const.")
        return pattern

    def _of_kind(self, kind: str, schema: Mapping[str, Any], depth: int) -> Pattern | None:
        if kind in ("object", "array"):
            write = self._object if kind == "object" else self._array
            return write(schema, depth - 1) if depth > 0 else None
        if kind == "string":
            return _string(schema)
        if kind in ("integer", "number"):
            return _either(number_patterns(schema, is_integer=kind == "integer"))
        return "true|false" if kind == "boolean" else "null"

    def _object(self, schema: Mapping[str, Any], depth: int) -> Pattern | None:
        properties = dict(schema.get("properties", {}))
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        required = set(schema.get("required", ()))
        for name in sorted(required - properties.keys()):
            properties[name] = others
        if not properties and others is not False:
            member = self._member(_quoted(("repeat", 0, None, CHARACTER)), self.value(others, depth))
            return self._repeated("{}", member, 0, None)
        members = [
            (self._member(_text(name), self.value(schema, depth)), name in required)
            for name, schema in properties.items()
        ]
        if (None, True) in members:
            return None
        possible = [member for member in members if member[0] is not None]
        return ("join", ("text", "{"), ("members", _COMMA, possible), ("text", "}"))

    def _member(self, name: Pattern, value: Pattern | None) -> Pattern | None:
        return None if value is None else ("join", name, _COLON, value)

    def _array(self, schema: Mapping[str, Any], depth: int) -> Pattern | None:
        item = self.value(schema.get("items", schema.get("unevaluatedItems", True)), depth)
        return self._repeated("[]", item, schema.get("minItems", 0), schema.get("maxItems"))

    def _repeated(self, brackets: str, item: Pattern | None, low: int, high: int | None) -> Pattern | None:
        """Write `low` to `high` items with commas between."""
        if (high is not None and high < low) or (item is None and low > 0):
            return None
        inside: Pattern = ("text", "")
        if item is not None and high != 0:
            further = ("repeat", max(low - 1, 0), None if high is None else high - 1, ("join", _COMMA, item))
            inside = ("join", item, further) if low else ("either", ("join", item, further), inside)
        return ("join", ("text", brackets[0]), inside, ("text", brackets[1]))

    def _are_exclusive(self, options: Sequence[Any]) -> bool:
        """Tell whether no value fits two options: by types, by constants, or by a property that all objects require.

        Returns False if this is unclear.
        """
        options = [self._resolved(option) for option in options]
        if True in options or False in options:
            return False
        marks = [_possible_kinds(option) for option in options]
        is_object = all(kinds == {"object"} for kinds in marks)
        if all(option.keys() & {"enum", "const"} for option in options):
            marks = [set(map(json.dumps, _constants(option))) for option in options]
        if sum(map(len, marks)) == len(set().union(*marks)):
            return True
        required = [_required(option) for option in options]
        shared = [name for name in required[0] if is_object and all(name in one for one in required)]
        return any(self._are_exclusive([one[name] for one in required]) for name in shared)

    def _resolved(self, schema: Any) -> Any:
        if isinstance(schema, bool):
            return schema
        self.check(schema)
        return self._resolved(self._target(schema["$ref"])) if "$ref" in schema else schema

    def _target(self, reference: str) -> Any:
        """Find the schema that a $ref leads to."""
        if reference != "#" and not reference.startswith("#/"):
            raise _refuse("a $ref must be a path inside the schema, '#/...'", reference, "Put what it names in $defs.")
        at = self.root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            at = {str(i): inner for i, inner in enumerate(at)} if isinstance(at, list) else at
            if not isinstance(at, dict) or name not in at:
                raise _refuse("a $ref that leads nowhere", reference, "Define it under $defs.")
            if at is not self.root and isinstance(at.get("$id", at.get("id")), str):
                raise _refuse("a $ref into a part with an $id", reference, "Leave the $id out.")
            at = at[name]
        return at


def _either(options: Sequence[Pattern | None]) -> Pattern | None:
    possible = [option for option in options if option is not None]
    return ("either", *possible) if possible else None


def _one_of(values: list[Any]) -> Pattern | None:
    """Write constants; the quotes around strings are written once, which makes the automaton smaller."""
    texts = [_text(value)[1] for value in values]
    inside = [("text", text[1:-1]) for text in texts if text[0] == '"']
    others = [("text", text) for text in texts if text[0] != '"']
    return _either([_quoted(("either", *inside)) if inside else None, *others])


def _quoted(*inside: Pattern) -> Pattern:
    return ("join", _QUOTE, *inside, _QUOTE)


def _text(value: Any) -> tuple[str, str]:
    return ("text", json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Return the types of a schema. Without a type, a keyword that is for one type implies it."""
    implied = [kind for kind in _KINDS if schema.keys() & _RULES.get(kind, {}).keys()]
    given = schema.get("type", implied or [*_KINDS])
    kinds = [given] if isinstance(given, str) else given
    for kind in kinds:
        if kind not in _KINDS:
            raise _refuse("unknown type", kind, f"Known are {', '.join(_KINDS)}.")
    return kinds


def _required(schema: Mapping[str, Any]) -> dict[str, Any]:
    required = schema.get("required", ())
    return {name: value for name, value in schema.get("properties", {}).items() if name in required}


def _constants(schema: Mapping[str, Any]) -> list[Any]:
    return [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]


def _types(schema: Mapping[str, Any]) -> set[str]:
    return set(_kinds(schema) if "type" in schema else _KINDS)


def _kinds_of(value: Any) -> set[str]:
    kinds = {bool: "boolean", str: "string", list: "array", dict: "object", float: "number", int: "number integer"}
    return set(kinds.get(type(value), "null").split())


def _possible_kinds(schema: Mapping[str, Any]) -> set[str]:
    """Return the types a value may have; integers are numbers too."""
    if schema.keys() & {"enum", "const"}:
        return set().union(*map(_kinds_of, _constants(schema)))
    kinds = _types(schema)
    return kinds | {"number"} if "integer" in kinds else kinds


def _string(schema: Mapping[str, Any]) -> Pattern | None:
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if "pattern" not in schema and "format" not in schema:
        return None if high is not None and high < low else _quoted(("repeat", low, high, CHARACTER))
    if len({"pattern", "format", "minLength", "maxLength"} & schema.keys()) > 1:
        raise _refuse("pattern, format and bounds on the length of one string", dict(schema), "Keep one of them.")
    if "pattern" in schema:
        return _quoted(*_searched(schema["pattern"]))
    if schema["format"] not in FORMATS:
        raise _refuse("unsupported format", schema["format"], f"Supported are {', '.join(FORMATS)}; or give a pattern.")
    return _quoted(FORMATS[schema["format"]])


def _searched(pattern: str) -> list[Pattern]:
    """Write a pattern that JSON schema would search for."""
    if re.search(r"\{,|\[\^?\]", pattern):
        remedy = "Leave out '{,', '[]' and '[^]'."
        raise _refuse("a pattern that Python and JavaScript read differently", pattern, remedy)
    at_start, at_end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    anything = ("repeat", 0, None, CHARACTER)
    inner = ("searched", pattern[at_start : len(pattern) - at_end])
    return [*([] if at_start else [anything]), inner, *([] if at_end else [anything])]
