"""JSON schemas: whatever the automaton lets through is valid under the package jsonschema, or the schema is refused."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from redraft.constraints.kinds import JsonSchema


def accepts(automaton, text):
    state = 0
    for byte in text.encode():
        state = automaton.table[state, byte]
    return bool(automaton.is_final[state])


def distances(automaton):
    """Bytes from each state to the next end."""
    distance = np.where(automaton.is_final, 0, 10**6)
    while not np.array_equal(distance, nearer := np.minimum(distance, distance[automaton.table].min(axis=1) + 1)):
        distance = nearer
    return distance


def walk(automaton, distance, rng):
    """Draw a text that is let through: some random bytes, then the shortest way to an end."""
    text, state, num_free = bytearray(), 0, rng.choice([0, 5, 25, 60])
    while not (automaton.is_final[state] and (len(text) >= num_free or rng.random() < 0.3)):
        following = automaton.table[state]
        ways = np.flatnonzero(following != len(automaton.table) - 1)
        if not len(ways):
            break
        if len(text) >= num_free:
            ways = ways[distance[following[ways]] == distance[following[ways]].min()]
        text.append(rng.choice(ways.tolist()))
        state = following[text[-1]]
    return text.decode()


PETS = {
    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/cat", "id": "#/$defs/id"}},
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/id"}],
    "$defs": {
        "cat": {"type": "object", "required": ["kind"], "properties": {"kind": {"const": "cat"}}},
        "id": {
            "type": "object",
            "required": ["kind"],
            "properties": {"kind": {"const": "id"}, "no": {"type": "integer"}},
        },
    },
}
TREE = {"type": "object", "required": ["v"], "properties": {"v": {"type": "null"}, "l": {"$ref": "#"}}}
SUPPORTED = [
    {"type": "string"},
    {"type": ["integer", "null"]},
    {"type": "integer", "enum": [1.0, 2, "x"]},
    {"enum": ["a", 'q"\\', None, 1.5, [1, {"k": []}], "\u2028\ufeff"]},
    {"const": {"a": [1, "é"]}},
    {"minLength": 2, "maxLength": 3},
    {"maxLength": 5.0},
    {"minLength": 2.0, "maxLength": 2},
    {"pattern": "^[a-c]{2,4}$"},
    {"pattern": "^a|b$"},
    {"pattern": '^."?.$'},
    {"pattern": "^[^a-y]$"},
    {"pattern": r"^\d\w\s?$"},
    {"pattern": r"^\D\W\S$"},
    {"pattern": r"^[^\d\w]{1,2}$"},
    {"pattern": r"^(?:\\|\n|/|é)+$"},
    {"pattern": ""},
    {"format": "date"},
    {"format": "time"},
    {"format": "date-time"},
    {"format": "uuid"},
    {"type": "number"},
    {"minimum": 0.1, "maximum": 0.9},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"minimum": -0.25, "exclusiveMaximum": 100},
    {"minimum": -1e-7, "maximum": 1e-7},
    {"exclusiveMinimum": 0.30000000000000004, "maximum": 0.31},
    {"minimum": 1e23},
    {"maximum": -99999999999999999},
    {"type": "integer", "minimum": 1.5, "maximum": 12.5},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 1},
    {"type": "integer", "minimum": 2 * 10**18},
    {"type": "integer", "maximum": -1.8e18},
    {"type": "integer", "minimum": 10**30, "maximum": 10**30 + 7},
    {"type": "integer", "maximum": 1e23, "minimum": 99999999999999990000000},
    {"items": {"type": "boolean"}, "minItems": 1, "maxItems": 3.0},
    {"type": "array", "items": False},
    {"type": "array", "unevaluatedItems": {"type": "null"}},
    {"properties": {"a": {"type": "integer"}, "b": False, "c": {"const": 'x"'}}, "required": ["c"]},
    {"properties": {"a": {"type": "null"}}, "required": ["b"], "additionalProperties": {"type": "boolean"}},
    {"additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "object", "unevaluatedProperties": {"type": "null"}},
    {"anyOf": [{"type": "null"}, {"minimum": 0.5, "maximum": 0.75}]},
    {"oneOf": [{"type": "null"}, {"type": "string", "maxLength": 3}, {"type": "array", "maxItems": 0}]},
    {"allOf": [{"type": "boolean"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}},
    {"$ref": "#/$defs/o/anyOf/1", "$defs": {"o": {"anyOf": [{"const": 1}, {"const": 2}]}}},
    {"$ref": "#/$defs/a%20b~1c~0d%25", "$defs": {"a b/c~d%": {"const": 3}}},
    {"items": {"$ref": "#/$defs/a"}, "examples": [{"id": "x"}], "$defs": {"a": {"type": "integer"}}},
    {"items": {"$ref": "#/$defs/a"}, "default": {"$id": "x"}, "$defs": {"a": {"enum": [{"$id": "http://x/y"}]}}},
    {"properties": {"id": {"const": {"id": "z"}}, "$id": {"$ref": "#/$defs/$id"}}, "$defs": {"$id": {"const": 1}}},
    {"items": {"$ref": "#"}, "maxItems": 2, "type": "array", "$defs": {"b": {"$id": "http://x/b"}}},
    {"$ref": "#/$defs/group/a", "$defs": {"group": {"a": {"$ref": "#/$defs/b"}}, "b": {"const": 6}}},
    PETS,
    TREE,
    {"title": "t", "description": "d", "default": 1, "examples": [], "$comment": "c", "deprecated": True,
     "readOnly": True, "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"},
    True,
    {"description": "anything"},
]  # fmt: skip


@pytest.mark.parametrize("schema", SUPPORTED, ids=lambda schema: json.dumps(schema)[:60])
def test_a_text_that_is_let_through_is_valid(schema):
    automaton = JsonSchema(schema).automaton()
    distance, rng = distances(automaton), random.Random(0)
    draft = jsonschema.Draft202012Validator
    validator = draft(schema, format_checker=draft.FORMAT_CHECKER)
    for _ in range(40):
        validator.validate(json.loads(walk(automaton, distance, rng)))


@pytest.mark.parametrize("is_integer", [False, True])
def test_numbers_inside_random_bounds_are_let_through_and_no_others(is_integer):
    for seed in range(60):
        rng = random.Random(seed)
        scale = 10 ** rng.choice([0, 1, 3, 6])
        low = rng.randint(-2000, 2000) / scale
        high = low + rng.randint(1, 3000) / scale
        keys = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
        schema = {"type": "integer" if is_integer else "number", keys[0]: low, keys[1]: high}
        validator = jsonschema.Draft202012Validator(schema)
        near = [low, high, *(rng.uniform(low - 1, high + 1) for _ in range(6)), 0.0, 0.5, low - 1e-6, high + 1e-6]
        values = [round(value) if is_integer else round(value, 6) for value in near]
        valid = [value for value in values if validator.is_valid(value)]
        try:
            automaton = JsonSchema(schema).automaton()
        except ValueError:
            assert not valid
            continue
        for value in values:
            text = json.dumps(value)
            if "e" not in text and text not in ("-0.0", "-0"):
                assert accepts(automaton, text) == (value in valid), (schema, text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"maxLength": 5.0}, '"abcde"'),
        ({"pattern": ".*"}, '"a\\"b\\\\😀"'),
        *(({"pattern": r"^[^a]$"}, f'"\\{letter}"') for letter in '"\\bfnrt'),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.5"),
        ({"minimum": 0.1, "maximum": 0.9}, "0.1"),
        ({"type": "integer", "minimum": 2 * 10**18}, "2000000000000000001"),
        ({"type": "number", "minimum": 0.5, "maximum": 9.5}, "5"),
        ({"type": "number", "minimum": 0.5, "maximum": 9.5}, "5.0"),
        ({"type": "number", "minimum": -9.5, "maximum": -0.5}, "-5"),
        ({"$ref": "#/$defs/a", "examples": [{"id": "x"}], "$defs": {"a": {"type": "integer"}}}, "12"),
        (PETS, '{"kind":"id","no":7}'),
        ({"properties": {c: {"type": "null"} for c in "abcdef"}}, '{"b":null,"c":null,"f":null}'),
        ({"properties": {c: {"type": "null"} for c in "abc"}, "required": ["b"]}, '{"b":null,"c":null}'),
        ({"properties": {c: {"type": "null"} for c in "abc"}}, "{}"),
    ],
)
def test_what_a_schema_means_is_let_through(schema, text):
    assert accepts(JsonSchema(schema).automaton(), text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 100}, "99.999999999999999"),  # as a float it is 100
        ({"properties": {c: {"type": "null"} for c in "abc"}}, '{"c":null,"b":null}'),
        ({"properties": {c: {"type": "null"} for c in "abc"}}, '{"b":null,}'),
        ({"properties": {c: {"type": "null"} for c in "abc"}, "required": ["b"]}, '{"a":null}'),
        ({"pattern": r"^\d$"}, '"٣"'),
        ({"type": "integer", "minimum": -5}, "-0"),
        (PETS, '{"kind":"cat","no":7}'),
    ],
)
def test_what_a_schema_does_not_mean_is_not_let_through(schema, text):
    assert not accepts(JsonSchema(schema).automaton(), text)


REFUSED = [
    *(({"type": "array", key: value}, f"unsupported keyword; got '{key}'") for key, value in [
        ("contains", False), ("not", False), ("if", False), ("propertyNames", False), ("uniqueItems", False),
        ("minProperties", 1), ("maxProperties", 2),
        ("patternProperties", {}), ("dependentRequired", {}), ("dependentSchemas", {}), ("minContains", 0),
        ("prefixItems", []), ("multipleOf", 2), ("$dynamicRef", "#a"), ("additionalItems", False), ("minLenght", 3),
    ]),
    *(({key: value}, f"{key} of the JSON schema must be {'at least 0' if value == -5 else 'of type int'}; got")
      for key in ("minLength", "maxLength", "minItems", "maxItems") for value in (-5, "5", None, True, 2.5, [1])),
    *(({key: value}, f"{key} of the JSON schema must be one of int, float")
      for key in ("minimum", "maximum", "exclusiveMinimum") for value in ("0", None, [])),
    ({"minimum": 0, "exclusiveMinimum": True}, "exclusiveMinimum of the JSON schema must be one of int, float"),
    ({"minimum": True}, "minimum of the JSON schema must be one of int, float; got True"),
    ({"required": "abc"}, "required of the JSON schema must be of type list; got 'abc'"),
    ({"required": True}, "required of the JSON schema must be of type list; got True"),
    ({"type": "string", "required": [["a"]]}, "required of the JSON schema must be of type list; got [['a']]"),
    ({"properties": ["a"]}, "properties of the JSON schema must be of type dict"),
    ({"properties": {"a": None}}, "a schema must be an object or a boolean; got None"),
    ({"items": [{}]}, "items of the JSON schema must be one of dict, bool"),
    ({"enum": "abc"}, "enum of the JSON schema must be of type list; got 'abc'"),
    ({"enum": ["\ud800"]}, "surrogates not allowed"),
    ({"anyOf": []}, "no value fits the schema"),
    ({"type": []}, "no value fits the schema"),
    ({"type": 5}, "type of the JSON schema must be one of str, list; got 5"),
    ({"pattern": "a{,3}"}, "Python and JavaScript read differently"),
    ({"format": "email"}, "unsupported format; got 'email'"),
    ({"$ref": "#nowhere"}, "a $ref must be a path inside the schema, '#/...'; got '#nowhere'"),
    ({"$ref": "#/$defs/o/anyOf/7", "$defs": {"o": {"anyOf": [{}]}}}, "a $ref that leads nowhere"),
    ({"$ref": "http://example.com/x"}, "a $ref must be a path inside the schema, '#/...'; got 'http"),
    *(({"$ref": "#/$defs/b", "$defs": {"b": {key: name, "items": {"$ref": "#"}}}}, "a part with an $id")
      for key, name in [("$id", "http://x/b"), ("$id", "b.json"), ("id", "/b")]),
    ({"$ref": "#/examples/0", "examples": [{"$id": "x", "$ref": "#/a"}]}, "a part with an $id"),
    ({"$ref": "#/$defs/b/items", "$defs": {"b": {"$id": "b.json", "items": {}}}}, "a $ref into a part with an $id"),
    ({"type": "integer", "minimum": 0.1, "maximum": 0.9}, "no value fits the schema"),
    ({"const": float("nan")}, "the JSON schema is not JSON"),
    ({"const": {1, 2}}, "the JSON schema is not JSON"),
    ('{"minimum": 1e999}', "the JSON schema is not JSON"),
    ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_followed_is_refused_by_name(schema, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        JsonSchema(schema).automaton()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["unheard", "unsupported", "zone"])
def test_a_keyword_behind_one_without_effect_is_refused_too(key):
    with pytest.raises(ValueError, match=f"unsupported keyword; got '{key}'"):
        JsonSchema({"type": "array", "title": "x", key: 1}).automaton()


@pytest.mark.parametrize("whole", [[{"type": "integer"}, True], [True, {"type": "integer"}]])
def test_a_choice_of_one_in_which_anything_fits_is_refused_for_that(whole):
    with pytest.raises(ValueError, match="may both fit"):
        JsonSchema({"oneOf": whole}).automaton()
