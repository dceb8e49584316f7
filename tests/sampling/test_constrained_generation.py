"""Constraints in the loop: every policy, cache and batch gives text that satisfies them."""

import json
import re
from dataclasses import dataclass, field, replace

import jsonschema
import pytest
import torch
from hypothesis import given
from test_every_combination import MASK, choices, few, sampler_of, start
from tiny import tiny_lm

import redraft
from redraft.constraints.kinds import Constraint
from redraft.data.tokenizer import train_tokenizer
from redraft.language_model import MAX_COMPILED
from redraft.sampling.batch import denoise
from redraft.sampling.constrain import TextConstraint
from redraft.sampling.presets import PRESETS

TEXTS = ["the quick brown fox, 日本語", '{"name": "Ann", "age": 12}', "yes no 😀 it depends"]
PATTERN = "[ab]{2,7}(?:日|1)?"
VOCAB = [
    None,
    None,
    None,
    b"a",
    b"b",
    b"ab",
    "日".encode(),
    b"\xe6",
    b"\x97\xa5",
    b"1",
    *(bytes([c]) for c in range(60, 90)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=275)


@pytest.fixture(scope="module", params=["full", "block-causal"])
def lm(request, tokenizer):
    lm = tiny_lm(vocab_size=275, block_size=4 if request.param == "block-causal" else None, dtype=torch.float32)
    return replace(lm, tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,))


@few
@given(chosen=choices)
@pytest.mark.parametrize("block_size", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_every_combination_of_policies_keeps_to_the_constraint(block_size, chosen):
    lm = tiny_lm(block_size=block_size)
    compiled = redraft.Regex(PATTERN).compile(VOCAB, eos_token_id=1)
    sampler = replace(sampler_of(lm, **chosen), constraint=TextConstraint(completion=lambda before: compiled))
    prompts = [[5], [9, 1, 2, 7], [30] * 6]
    canvas, keys = start(prompts)
    finals = {}
    for step in denoise(lm.denoiser, canvas, sampler, row_keys=keys):
        for place, row in enumerate(step.rows.tolist()):
            finals[row] = step.canvas.tokens[place, len(prompts[row]) :].tolist()[:12]
    for ids in finals.values():
        text = ids[: ids.index(1)] if 1 in ids else ids
        assert MASK not in text
        assert re.fullmatch(PATTERN, b"".join(VOCAB[i] for i in text).decode())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_writes_what_is_asked_for(lm, preset):
    is_full = lm.denoiser.settings.block_size is None
    if preset in ("duo", "diffusion-gemma"):
        of_noise = replace(lm.denoiser.settings, process="uniform")
        lm = replace(lm, denoiser=replace(lm.denoiser, settings=of_noise))
    if PRESETS[preset].blocks == "token":
        of_causal = replace(lm.denoiser.settings, block_size=4, context="causal", within="full")
        lm = replace(lm, denoiser=replace(lm.denoiser, settings=of_causal))
    settings = {} if is_full else {"cache": "auto"}  # approximate caches are for full attention
    out = lm.generate(
        ["the", "yes no", "12"], preset=preset, **settings, max_new_tokens=16, constraint=redraft.Regex(PATTERN)
    )
    assert all(re.fullmatch(PATTERN, text) for text in out.texts), out.texts


def test_a_constrained_row_is_as_it_would_be_alone(lm):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "constraint": redraft.Regex("[a-z ]{3,20}")}
    together = lm.generate(["the", "quick brown fox yes"], **settings)
    alone = [lm.generate(prompt, **settings).texts[0] for prompt in ("the", "quick brown fox yes")]
    assert together.texts == alone


def test_json_choices_and_samples(lm):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    out = lm.generate("the", max_new_tokens=32, constraint=redraft.JsonSchema(schema), num_samples=3, temperature=1.0)
    for text in out.texts:
        jsonschema.validate(json.loads(text), schema)
    assert lm.generate("the", max_new_tokens=8, constraint=redraft.Choice(["yes", "no"])).texts[0] in ("yes", "no")


def test_a_hole_is_filled_with_what_is_asked_for(lm):
    out = lm.infill(["x = [MASK:4]!", "yes [MASK:6] no"], constraint=redraft.Regex(r"\d+"))
    for row, text in zip(("x = {}!", "yes {} no"), out.texts, strict=True):
        assert re.fullmatch(re.escape(row).replace(r"\{\}", r"\d+"), text)
    with pytest.raises(ValueError, match="new text in one piece"):
        lm.infill("a [MASK:2] b [MASK:2]", constraint=redraft.Regex("[a-z]+"))


def test_what_cannot_be_satisfied_fails_before_the_first_forward(lm, monkeypatch):
    monkeypatch.setattr(type(lm.denoiser), "__call__", None)
    with pytest.raises(ValueError, match="the canvas is too short: the shortest text"):
        lm.generate("the", max_new_tokens=4, constraint=redraft.Regex("z{40}"))
    with pytest.raises(ValueError, match="which stop strings would cut"):
        lm.generate("the", max_new_tokens=4, stop=("a",), constraint=redraft.Regex("a+"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        replace(lm, tokenizer=None).generate([3], max_new_tokens=4, constraint=redraft.Regex("a+"))


def test_a_constraint_is_compiled_once(lm):
    assert lm.compile_constraint(redraft.Regex("a+b")) is lm.compile_constraint(redraft.Regex("a+b"))
    assert lm.compile_constraint(redraft.Regex("a+b")) is not lm.compile_constraint(redraft.Regex("a+c"))


@dataclass(frozen=True)
class Mine(Constraint):
    """A user's own constraint, whose repr and equality say nothing of what it asks for."""

    pattern: str = field(repr=False, compare=False)

    def automaton(self):
        return redraft.Regex(self.pattern).automaton()


def test_a_users_own_constraints_are_told_apart_whatever_their_repr(lm):
    a, b = Mine(pattern="a+"), Mine(pattern="b+")
    assert repr(a) == repr(b)
    assert a == b
    for constraint in (a, b, a & redraft.Length(max_chars=9), b & redraft.Length(max_chars=9)):
        pattern = "a+" if constraint is a or getattr(constraint, "parts", [None])[0] is a else "b+"
        texts = lm.generate("the", constraint=constraint, max_new_tokens=8, steps=8).texts
        assert re.fullmatch(pattern, texts[0])
    assert lm.compile_constraint(a) is lm.compile_constraint(a)


def test_equal_constraints_are_prepared_once_and_those_that_only_compare_equal_are_not(lm):
    assert lm.compile_constraint(redraft.JsonSchema({"const": 1})) is lm.compile_constraint(
        redraft.JsonSchema({"const": 1})
    )
    assert lm.compile_constraint(redraft.JsonSchema({"const": 1})) is not lm.compile_constraint(
        redraft.JsonSchema({"const": True})
    )
    schema = {"const": 1}
    before = lm.compile_constraint(redraft.JsonSchema(schema))
    schema["const"] = 2
    assert lm.compile_constraint(redraft.JsonSchema(schema)) is not before


def test_a_constraint_is_prepared_anew_for_another_tokenizer_or_end(lm):
    constraint = redraft.Regex("[a-z]+")
    compiled = lm.compile_constraint(constraint)
    other = replace(lm, tokenizer=train_tokenizer(["xyz " * 9, "the quick"], vocab_size=262))
    assert len(other.compile_constraint(constraint).automaton.class_of) == len(other.tokenizer)
    assert replace(lm, eos_token_ids=(5,)).compile_constraint(constraint) is not compiled
    assert lm.compile_constraint(constraint) is compiled


def test_a_model_keeps_few_constraints_prepared(lm):
    for i in range(MAX_COMPILED + 5):
        lm.compile_constraint(redraft.Regex("a" * (i + 1)))
    assert len(lm._compiled) == MAX_COMPILED


@pytest.mark.parametrize("constraint", ["[ab]+", redraft.Regex, 5])
def test_what_is_no_constraint_is_refused(unchecked, lm, constraint):
    with pytest.raises(ValueError, match=r"a constraint must be a redraft.Regex, JsonSchema, Choice"):
        lm.generate("the", constraint=constraint, max_new_tokens=4)
