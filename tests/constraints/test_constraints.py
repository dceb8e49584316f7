"""Hard constraints: whatever is committed in whatever order, the whole text satisfies them."""

import itertools
import json
import random
import re

import jsonschema
import numpy as np
import pytest
import torch

from redraft.constraints.automaton import ByteAutomaton
from redraft.constraints.completion import MAX_TAILS
from redraft.constraints.kinds import All, Choice, Contains, JsonSchema, Length, Regex, Spans

PAD, EOS, MASK = 0, 1, 2
MERGES = ["ab", "abc", "the", " a", '": ', '", "', '{"', '"}', "12", "tru", "日本", "é", "😀", "x日"]
VOCAB = [None, None, None, *(bytes([b]) for b in range(256)), *(text.encode() for text in MERGES)]


def least_length(compiled, length):
    """The length given, or one near it that does."""
    try:
        compiled.check(torch.full((length,), MASK), torch.ones(length, dtype=torch.bool))
    except ValueError as error:
        return int(re.search(r"has (\d+) tokens|that do are (?:\d+, )*(\d+)", str(error)).expand(r"\1\2"))
    return length


def complete(compiled, tokens, is_noise, where, logits, *, temperature=0.0, u=None):
    tempered, u = (logits.float() / temperature, u) if temperature else (logits, None)
    return compiled.complete(tokens, is_noise, where, tempered, u=u)


def decode(compiled, length, *, generator, temperature=0.0, given=None, block=None, eos=EOS):
    """Commit random subsets of the proposals under random logits, in blocks or not; return the tokens of the text."""
    tokens = torch.full((length,), MASK)
    is_noise = torch.ones(length, dtype=torch.bool)
    for position, token in (given or {}).items():
        tokens[position], is_noise[position] = token, False
    compiled.check(tokens, is_noise)
    for _ in range(20 * length):
        if not is_noise.any():
            break
        where = is_noise.nonzero()[:, 0]
        where = where[: 1 + int((where < where[0] + (block or length)).sum()) - 1]
        logits = torch.randn(len(where), len(VOCAB), generator=generator) * 6
        u = torch.rand(len(where), generator=generator)
        x_0 = complete(compiled, tokens, is_noise, where, logits, temperature=temperature, u=u)
        chosen = torch.rand(len(where), generator=generator) < 0.4
        tokens[where[chosen]], is_noise[where[chosen]] = x_0[chosen], False
    assert not is_noise.any()
    for position, token in (given or {}).items():
        assert tokens[position] == token
    ids = tokens.tolist()
    if eos is not None and eos in ids:
        assert set(ids[ids.index(eos) :]) == {eos}
        ids = ids[: ids.index(eos)]
    return ids


def text_of(ids):
    return b"".join(VOCAB[i] for i in ids).decode()


def random_regex(rng, depth=3):
    kind = rng.choice(["text", "class", "join", "join", "either", "repeat"]) if depth else rng.choice(["text", "class"])
    if kind == "text":
        return re.escape(rng.choice(["a", "ab", "the ", "日本", "é", ".", "12", "😀", '"']))
    if kind == "class":
        return rng.choice([".", r"\d", r"\w", "[a-c]", "[^a-z]", "[é-ü日]", "[^日]"])
    if kind == "join":
        return random_regex(rng, depth - 1) + random_regex(rng, depth - 1)
    if kind == "either":
        return f"(?:{random_regex(rng, depth - 1)}|{random_regex(rng, depth - 1)})"
    return f"(?:{random_regex(rng, depth - 1)}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '{2,}'])}"


PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))]


@pytest.mark.parametrize("part", PARTS)
def test_200_random_regular_expressions_are_satisfied_in_any_order_of_commits(part):
    for seed in range(50 * part, 50 * part + 50):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        pattern = random_regex(rng)
        eos = rng.choice([EOS, EOS, None])
        compiled = Regex(pattern).compile(VOCAB, eos_token_id=eos)
        length = least_length(compiled, rng.randint(1, 16))
        how = {
            "generator": generator,
            "temperature": rng.choice([0.0, 0.5, 1.5]),
            "block": rng.choice([None, 3]),
            "eos": eos,
        }
        ids = decode(compiled, length, **how)
        assert re.fullmatch(pattern, text_of(ids)), (pattern, ids)
        # The same with random tokens of that match given.
        full = ids + [EOS] * (length - len(ids))
        given = {position: full[position] for position in rng.sample(range(length), length // 3)}
        assert re.fullmatch(pattern, text_of(decode(compiled, length, given=given, **how))), (pattern, given)


def random_schema(rng, depth=2):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern", "format", "range"]
    kind = rng.choice(kinds + ["object", "object", "array", "array", "map", "anyOf", "oneOf"] * (depth > 0))
    if kind == "string":
        low = rng.randint(0, 2)
        return {"type": "string", **rng.choice([{}, {"minLength": low, "maxLength": low + rng.randint(0, 4)}])}
    if kind in ("integer", "number"):
        return {"type": kind}
    if kind == "range":
        low = rng.choice([-120, -5, 0, 7, 99])
        high = low + rng.choice([1, 8, 250])
        low_key, high_key = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "minimum"])
        return {"type": rng.choice(["integer", "number"]), low_key: low, high_key: high}
    if kind == "enum":
        return {"enum": rng.sample(["a", 'q"uote', "日本", 3, None, True, [1], {"k": "v"}, "a.b\n"], 3)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "[0-9]+", "^x", "ab|cd$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "uuid", "date-time"])}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 1}
    if kind == "map":
        return {"type": "object", "additionalProperties": random_schema(rng, depth - 1)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]}
    if kind == "oneOf":
        return {"oneOf": [{"type": "null"}, {"type": "string", "maxLength": 3}, {"type": "array", "maxItems": 0}]}
    if kind in ("boolean", "null"):
        return {"type": kind}
    names = rng.sample(["name", "age", "é", "a b", 'x"'], rng.randint(1, 3))
    properties = {name: random_schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": [n for n in names if rng.random() < 0.5]}


@pytest.mark.parametrize("part", PARTS)
def test_200_random_json_schemas_are_satisfied_in_any_order_of_commits(part):
    for seed in range(50 * part, 50 * part + 50):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        schema = random_schema(rng)
        rng.random()
        compiled = JsonSchema(schema).compile(VOCAB, eos_token_id=EOS)
        length = least_length(compiled, 12) + rng.choice([0, 3, 20])
        how = {"temperature": rng.choice([0.0, 1.0]), "block": rng.choice([None, 8])}
        text = text_of(decode(compiled, length, generator=generator, **how))
        jsonschema.validate(json.loads(text), schema)


def test_a_recursive_schema_stops_at_its_depth():
    tree = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "required": ["left"], "properties": {
        "value": {"type": "integer"}, "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}}}}  # fmt: skip
    compiled = JsonSchema(tree, max_depth=3).compile(VOCAB, eos_token_id=EOS)
    for seed in range(5):
        text = text_of(decode(compiled, 60, generator=torch.Generator().manual_seed(seed), temperature=1.0))
        jsonschema.validate(json.loads(text), tree)
        assert text.count("{") <= 3


def test_anything_is_json_up_to_its_depth():
    compiled = JsonSchema(True, max_depth=2).compile(VOCAB, eos_token_id=EOS)
    for seed in range(10):
        json.loads(text_of(decode(compiled, 30, generator=torch.Generator().manual_seed(seed), temperature=1.5)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parts_hold_together(temperature):
    spans = Spans({0: [VOCAB.index(b"the")], 6: [VOCAB.index(b"x")]})
    parts = Contains(["foo", "日本"]) & Length(min_chars=12, max_chars=16, min_tokens=11, max_tokens=14) & spans
    compiled = parts.compile(VOCAB, eos_token_id=EOS)
    for seed in range(5):
        ids = decode(compiled, 20, generator=torch.Generator().manual_seed(seed), temperature=temperature)
        text = text_of(ids)
        assert "foo" in text and "日本" in text and 12 <= len(text) <= 16 and 11 <= len(ids) <= 14  # noqa: PT018
        assert ids[0] == VOCAB.index(b"the") and ids[6] == VOCAB.index(b"x")  # noqa: PT018


def test_a_choice_is_one_of_its_options():
    options = ["yes", "no (why?)", "日本", "a" * 12]
    compiled = Choice(options).compile(VOCAB, eos_token_id=EOS)
    drawn = {
        text_of(decode(compiled, 14, generator=torch.Generator().manual_seed(s), temperature=2.0)) for s in range(40)
    }
    assert drawn <= set(options)
    assert len(drawn) > 1


SMALL = [None, None, b"a", b"b", b"ab", b"ba", b"c"]
SMALL_PATTERN = r"(?:ab|c)*b?a{0,2}"


def completions(length, *, given):
    """All fills of a canvas over SMALL that match, by brute force."""
    for ids in itertools.product(range(1, len(SMALL)), repeat=length):
        end = ids.index(1) if 1 in ids else length
        is_fit = all(ids[position] == token for position, token in given.items())
        if (
            is_fit
            and set(ids[end:]) <= {1}
            and re.fullmatch(SMALL_PATTERN, b"".join(SMALL[i] for i in ids[:end]).decode())
        ):
            yield ids


def small_case(seed, where):
    length, generator = 5, torch.Generator().manual_seed(seed)
    given = {} if len(where) == length else {1: 4} if 1 not in where else {3: 2}
    given = {position: token for position, token in given.items() if position not in where}
    tokens, is_noise = torch.full((length,), MASK), torch.ones(length, dtype=torch.bool)
    for position, token in given.items():
        tokens[position], is_noise[position] = token, False
    return tokens, is_noise, torch.tensor(where), torch.randn(len(where), len(SMALL), generator=generator) * 3, given


@pytest.mark.parametrize("where", [[0, 1, 2, 3, 4], [0, 2, 3], [0, 1, 2], [2, 4]])
def test_at_temperature_0_the_completion_is_the_most_probable_of_all(where):
    compiled = Regex(SMALL_PATTERN).compile(SMALL, eos_token_id=1)
    for seed in range(10):
        tokens, is_noise, positions, logits, given = small_case(seed, where)
        best = max(sum(float(logits[i, ids[p]]) for i, p in enumerate(where)) for ids in completions(5, given=given))
        x_0 = compiled.complete(tokens, is_noise, positions, logits)
        assert float(logits.gather(1, x_0[:, None]).sum()) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("where", [[0, 1, 2, 3, 4], pytest.param([0, 1, 2], marks=pytest.mark.slow)])
def test_draws_follow_the_tempered_product_restricted_to_the_language(where):
    compiled = Regex(SMALL_PATTERN).compile(SMALL, eos_token_id=1)
    tokens, is_noise, positions, logits, given = small_case(3, where)
    logits = logits / 2
    weights = {}
    for ids in completions(5, given=given):
        drawn = tuple(ids[p] for p in where)
        weights[drawn] = float((logits[range(len(where)), list(drawn)] / 0.8).sum().exp())
    total, counts, num_draws = sum(weights.values()), {}, 1500
    u = torch.rand(num_draws, len(where), generator=torch.Generator().manual_seed(0))
    for row in u:
        drawn = tuple(compiled.complete(tokens, is_noise, positions, logits / 0.8, u=row).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert set(counts) <= set(weights)
    distance = sum(abs(counts.get(ids, 0) / num_draws - weight / total) for ids, weight in weights.items()) / 2
    likely = sum((weight / total / num_draws) ** 0.5 for weight in weights.values())  # about its expectation
    assert distance < 0.6 * likely


def test_tokens_that_the_model_rules_out_are_used_where_the_constraint_needs_them():
    compiled = Choice(["ca"]).compile(SMALL, eos_token_id=1)
    logits = torch.full((2, len(SMALL)), -torch.inf)
    logits[:, 4] = 0.0
    tokens, is_noise = torch.full((2,), MASK), torch.ones(2, dtype=torch.bool)
    for temperature in (0.0, 0.1):
        how = {"temperature": temperature, "u": torch.rand(2)}
        x_0 = complete(compiled, tokens, is_noise, torch.arange(2), logits.bfloat16(), **how)
        assert x_0.tolist() == [6, 2]


def check(constraint, length, *, given=None, eos=EOS, vocab=VOCAB):
    tokens, is_noise = torch.full((length,), MASK), torch.ones(length, dtype=torch.bool)
    for position, token in (given or {}).items():
        tokens[position], is_noise[position] = token, False
    constraint.compile(vocab, eos_token_id=eos).check(tokens, is_noise)


@pytest.mark.parametrize(
    ("constraint", "how", "reason"),
    [
        (Regex("a{30}b"), {"length": 5}, "shortest text that satisfies the constraint has 30 tokens; got 5"),
        (Choice(["ab", "zzzz"]), {"length": 9, "eos": None}, "lengths near it that do are 1, 2, 4"),
        *((constraint, {"length": 1, "eos": None}, "fills a canvas of 1 tokens; lengths near it that do are 0")
          for constraint in (Regex(""), Choice([""]), Regex("(?:)*"), Length(max_chars=0), Length(max_tokens=0))),
        (Regex("(?:日z)?"), {"length": 2, "eos": None, "vocab": [None, b"z"]}, "lengths near it that do are 0"),
        (Regex("[ab]*"), {"length": 3, "given": {1: EOS, 2: 100}}, "no text of 3 tokens with the 2 given ones"),
        (Spans({4: [5]}), {"length": 3}, "up to position 4; got 3 tokens"),
        (Length(min_tokens=7), {"length": 3}, "has 7 tokens; got 3"),
        (Length(max_tokens=3) & Regex("z{5}"), {"length": 9}, "no text of 0 to 3 tokens in this vocabulary"),
        (Regex("日z"), {"length": 9, "vocab": [None, b"a", b"z"]}, "no token holds the bytes 0x97, 0xA5, 0xE6"),
        (Regex("a") & Regex("b"), {"length": 9}, "its parts exclude each other"),
        (Regex("(a"), {"length": 9}, "the regular expression cannot be an automaton"),
        (Regex("^a$"), {"length": 9}, "it uses at; got '^a$'"),
        (JsonSchema({"type": "integer", "multipleOf": 3}), {"length": 9}, "unsupported keyword; got 'multipleOf'"),
        (JsonSchema({"type": "text"}), {"length": 9}, "unknown type; got 'text'"),
        (JsonSchema({"$ref": "#/$defs/x"}), {"length": 9}, "a $ref that leads nowhere"),
        (JsonSchema({"$ref": "#"}), {"length": 9}, "or a $ref leads only to itself"),
        (JsonSchema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), {"length": 9}, "oneOf may both fit"),
        (JsonSchema({"type": "string", "pattern": "^(?i:a)$"}), {"length": 9}, "the flags i, a and L"),
        (JsonSchema({"items": {"items": {}}, "minItems": 1}, max_depth=0), {"length": 9}, "with max_depth=0"),
        (JsonSchema("{"), {"length": 9}, "the JSON schema is not JSON"),
        (Spans({0: [5]}) & Spans({0: [6]}), {"length": 9}, "spans must agree; got tokens 5 and 6 for position 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_satisfied_is_refused_with_the_reason(constraint, how, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        check(constraint, **how)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Choice([]), "at least one option"),
        (lambda: Choice("yes"), "a list of at least one option; got 'yes'"),
        (lambda: Contains([]), "at least one substring"),
        (lambda: Length(min_chars=4, max_chars=3), "min_chars must be at most max_chars; got 4 and 3"),
        (lambda: Length(min_tokens=-1), "min_tokens must be at least 0; got -1"),
        (lambda: Length(max_chars=2.5), "max_chars must be one of int, None; got 2.5"),
        (lambda: Length(min_chars=None), "min_chars must be of type int; got None"),
        (lambda: Length(max_tokens=float("nan")), "max_tokens must be one of int, None; got nan"),
        (lambda: Regex(b"a"), "Regex takes text; got b'a'"),
        (lambda: Regex(None), "Regex takes text; got None"),
        (lambda: Regex("\udcff"), "Regex takes text that UTF-8 can write, without lone surrogates"),
        (lambda: Choice({"a": 1}), "a list of at least one option; got {'a': 1}"),
        (lambda: Choice(["a", None]), "Choice takes text; got None"),
        (lambda: Contains(np.array(["a"])), "a list of at least one substring; got array(['a']"),
        (lambda: Contains(["\ud800"]), "Contains takes text that UTF-8 can write"),
        (lambda: Spans([(0, [5])]), "Spans needs a dict of lists of token ids by position"),
        (lambda: Spans({-1: [5]}), "a span is a position, from 0, and a list of token ids; got -1: [5]"),
        (lambda: Spans({0: "ab"}), "a span is a position, from 0, and a list of token ids; got 0: 'ab'"),
        (lambda: Spans({0: [2.0]}), "a list of token ids; got 0: [2.0]"),
        (lambda: Spans({0: [-1]}), "a list of token ids; got 0: [-1]"),
        (lambda: Spans({0: torch.tensor([5])}), "a list of token ids; got 0: tensor([5])"),
        (lambda: Regex("a") & 5, "each a constraint; got (Regex(pattern='a'), 5)"),
        (lambda: All(parts=()), "All needs at least one part"),
        (lambda: All(parts=(x for x in ())), "All needs at least one part"),
        (lambda: JsonSchema(None), "a JSON schema must be a dict, a boolean or a text; got None"),
        (lambda: JsonSchema(True, max_depth=-1), "max_depth must be at least 0; got -1"),
        (lambda: JsonSchema(True, max_depth="3"), "max_depth must be of type int; got '3'"),
    ],
)
def test_settings_are_checked_when_they_are_made(unchecked, make, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        make()


def test_all_is_flat_in_what_it_asks_for():
    limits = All(parts=(Length(min_tokens=2), Length(min_tokens=3, max_tokens=9), Spans({1: [4, 5]}))).limits()
    assert (limits.min_tokens, limits.max_tokens, limits.spans) == (3, 9, {1: 4, 2: 5})


CIRCULAR = {}
CIRCULAR["items"] = CIRCULAR
HOSTILE_PATTERNS = [
    "(", "[", "*", "a{2,1}", "a**", "a{,}", "[z-a]", "a++", "(?>a)", "(?(1)a|b)", "(?P<x>a)(?P=x)", r"(a)\1", "(?<!a)b",
    "(?=a)", r"\b", "^a$", "(?i)a", r"(?a)\w", "(?L)a", r"\p{L}", r"\Z", "\\", "[]", "[^]", "(?#", "(?P<1>a)", "[[a]",
    "a{99999999999999}", "[a&&b]", "(?:)*", "(?:a*)*", "()", "|", "a|", "(?s)", "\x00", "", "(" * 5000 + ")" * 5000,
]  # fmt: skip
HOSTILE = [
    *map(Regex, HOSTILE_PATTERNS),
    JsonSchema(CIRCULAR),
    JsonSchema({"enum": [object()]}),
    JsonSchema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    JsonSchema({"oneOf": [{"$ref": "#"}, {"type": "null"}]}),
    JsonSchema({"oneOf": [{"required": [1]}, {"required": [2]}]}),
    JsonSchema({"items": {"$ref": "#"}}, max_depth=10**9),
    Spans({0: [10**9]}),
    Spans({10**30: [5]}),
    Length(min_chars=10**30),
    Length(min_tokens=10**30),
    Length(max_tokens=10**30),
    Length(max_chars=0, min_tokens=3),
    Choice(["", ""]),
    Contains([""]),
    All(parts=(Regex("a*"),) * 1000),
]


@pytest.mark.parametrize("constraint", HOSTILE, ids=lambda constraint: repr(constraint)[:40])
def test_a_hostile_constraint_works_or_ends_in_one_line(unchecked, constraint):
    problem = None
    try:
        check(constraint, 12)
    except ValueError as error:
        problem = error
    # Subclasses of ValueError have messages that are not ours.
    assert problem is None or (type(problem) is ValueError and len(str(problem)) < 900)
    assert "\n" not in str(problem)


def test_many_constraints_joined_are_flat():
    joined = Regex("a*")
    for _ in range(1500):
        joined = joined & Regex("a*")
    assert len(joined.parts) == 1501


def shared(depth, of):
    """A schema whose text, written out, doubles with each level."""
    definitions = {f"d{i + 1}": of({"$ref": f"#/$defs/d{i}"}) for i in range(depth)}
    return {"$ref": f"#/$defs/d{depth}", "$defs": {"d0": {"type": "string"}, **definitions}}


TOO_LARGE = [
    Regex("(a{0,99}){0,99}"),
    Regex("(?:a?){5000}"),
    Regex("a{1000000000}"),
    Regex("(a|b)*a(a|b){20}"),
    Regex(r"\w{1,300}"),
    Regex("|".join(f"w{i}" for i in range(100_000))),
    Regex("(?:a{97})*") & Regex("(?:a{89})*") & Regex("(?:a{83})*"),
    Length(max_chars=6000) & Regex("(?:[a-z]+ )*"),
    Contains([f"word{i:02}" for i in range(20)]),
    Choice([f"option {i}" for i in range(100_000)]),
    Length(max_chars=10**9),
    JsonSchema({"enum": [f"option {i}" for i in range(40_000)]}),
    JsonSchema({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    JsonSchema({"maxLength": 10**9}),
    JsonSchema({"type": "array", "minItems": 10**30}),
    JsonSchema(shared(30, lambda to: {"required": ["a", "b"], "properties": {"a": to, "b": to}}), max_depth=40),
    JsonSchema({"pattern": "(a{0,99}){0,99}"}),
    JsonSchema({"enum": ["x" * 2_000_000]}),
]


@pytest.mark.parametrize("constraint", TOO_LARGE, ids=lambda constraint: repr(constraint)[:40])
def test_too_much_work_is_refused_before_it_is_done(unchecked, constraint):
    with pytest.raises(ValueError, match=r"too large|more than \d+"):
        constraint.automaton()


WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=4 + i % 11)) for i in range(3000)]
RECORD = {"name": "a", "description": "", "address": "é"}
LEGITIMATE = {
    "nothing, very often": (Regex("(?:){1000000000}"), ""),
    "one text of two, again and again": (JsonSchema(shared(60, lambda to: {"anyOf": [to, to]})), '"x"'),
    "a string of 1000": (JsonSchema({"maxLength": 1000}), '"' + "é" * 1000 + '"'),
    "1000 characters": (Length(min_chars=1000, max_chars=1000), "日" * 1000),
    "40 optional properties": (
        JsonSchema({"properties": {f"property_{i}": {"type": "string"} for i in range(40)}}),
        '{"property_3":"a","property_39":""}',
    ),
    "an enum of 3000": (JsonSchema({"enum": WORDS}), f'"{WORDS[2999]}"'),
    "a choice of 3000": (Choice(WORDS), WORDS[77]),
    "two enums of 5000": (
        JsonSchema({"properties": {key: {"enum": [7, *(f"value_{i}" for i in range(5000)), 'a"b']} for key in "ab"}}),
        '{"a":"value_4999","b":"a\\"b"}',
    ),
    "oneOf 3000 constants": (JsonSchema({"oneOf": [{"const": i} for i in range(3000)]}), "2999"),
    "100 objects of 3 strings": (
        JsonSchema(
            {
                "items": {"properties": {name: {"type": "string"} for name in RECORD}, "required": [*RECORD]},
                "maxItems": 100,
            }
        ),
        json.dumps([RECORD] * 100, separators=(",", ":"), ensure_ascii=False),
    ),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_real_schemas_hold_is_let_through(unchecked, name):
    constraint, text = LEGITIMATE[name]
    automaton, state = constraint.automaton(), 0
    for byte in text.encode():
        state = automaton.table[state, byte]
    assert automaton.is_final[state]


@pytest.mark.parametrize("seed", range(20))
def test_states_are_merged_if_and_only_if_no_text_tells_them_apart(seed):
    rng = np.random.default_rng(seed)
    num, copies = int(rng.integers(2, 6)), int(rng.integers(1, 9))
    # Copies of a small machine that lead into each other, some of them different in one place.
    table = np.tile(rng.integers(0, num, (num, 2)), (copies, 1)) + num * rng.integers(0, copies, (num * copies, 2))
    is_final = np.tile(rng.random(num) < 0.4, copies)
    is_final[[0, rng.integers(num * copies)]] = True
    table = np.concatenate([table[:, rng.integers(0, 2, 256)], np.full((1, 256), num * copies)])
    states = ByteAutomaton(table=table.astype(np.int32), is_final=np.append(is_final, False))
    everything = ByteAutomaton(table=np.array([[0] * 256, [1] * 256], np.int32), is_final=np.array([True, False]))
    merged = states & everything

    reached = {0}
    while not reached.issuperset(following := set(table[sorted(reached)].flat)):
        reached |= following
    group, num_groups = states.is_final.astype(int), 0
    while num_groups < (num_groups := len(set(group[sorted(reached)]))):
        group = np.unique(np.column_stack([group, group[table]]), axis=0, return_inverse=True)[1].ravel()
    is_dead_among = group[-1] in group[sorted(reached)]
    assert len(merged.table) == num_groups + (not is_dead_among)
    for text in rng.integers(0, 256, (50, 12)):
        a = b = 0
        for byte in text:
            a, b = table[a, byte], merged.table[b, byte]
            assert states.is_final[a] == merged.is_final[b]


def test_a_long_string_takes_its_length_in_tokens(unchecked):
    compiled = JsonSchema({"minLength": 300, "maxLength": 300}).compile(VOCAB, eos_token_id=EOS)
    ids = decode(compiled, 310, generator=torch.Generator().manual_seed(0), temperature=1.0)
    assert len(json.loads(text_of(ids))) == 300


def test_a_constraint_keeps_what_can_be_filled_for_few_lengths():
    compiled = Regex("a*").compile(VOCAB, eos_token_id=EOS)
    for length in range(1, 40):
        compiled.check(torch.full((length,), MASK), torch.ones(length, dtype=torch.bool))
    assert compiled._fillable.cache_info().currsize == MAX_TAILS
