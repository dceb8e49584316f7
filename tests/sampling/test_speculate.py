"""Speculation decides several tokens in a forward, and the text is that of preset `ar`, token for token."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm

import redraft
from redraft.prompts import row_keys
from redraft.sampling.batch import Batch
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.speculate import look_up

MODELS = {
    f"{within}{' shifted' if shift else ''}": tiny_lm(block_size=5, within=within, shift_logits=shift)
    for within in ("full", "causal")
    for shift in (False, True)
}
PRESETS = ("speculate", "speculate-ahead", "lookup")
PROMPTS = ([5, 6, 7, 5, 6], [8], [9, 10, 11, 12, 13, 14], [])


def tokens(lm, prompts, **chosen):
    return [row.tolist() for row in lm.generate(list(prompts), **{"max_new_tokens": 12, "stop": None} | chosen).tokens]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("model", "temperature"), [*((model, 0.7) for model in MODELS), ("full", 0.0)])
def test_the_text_is_that_of_preset_ar(model, preset, temperature):
    lm, chosen = MODELS[model], {"temperature": temperature, "num_samples": 2, "top_p": 0.9}
    expected = tokens(lm, PROMPTS, preset="ar", **chosen)
    assert tokens(lm, PROMPTS, preset=preset, **chosen) == expected
    assert tokens(lm, PROMPTS[:1], preset=preset, **chosen | {"num_samples": 1}) == expected[:1]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_ends_a_text_ends_it_inside_a_run(preset):
    lm = MODELS["full"]
    for seed in range(3):
        chosen = {"temperature": 2.0, "seed": seed, "stop": "eos"}
        assert tokens(lm, PROMPTS, preset=preset, **chosen) == tokens(lm, PROMPTS, preset="ar", **chosen)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_any_number_of_drafts_gives_the_same_text(preset, size):
    lm = MODELS["causal shifted"]
    assert tokens(lm, PROMPTS, preset=preset, block_size=size) == tokens(lm, PROMPTS, preset="ar")


@pytest.mark.parametrize(("model", "preset"), [("full", "speculate"), ("causal shifted", "speculate-ahead")])
def test_holes_are_filled_as_preset_ar_fills_them(model, preset):
    row = torch.tensor([5, 6, 2, 2, 2, 7, 8, 9, 10, 11, 12, 13, 14, 2, 2, 7, 2])
    expected = MODELS[model].infill([row, row[:5]], preset="ar", temperature=0.7).sequences
    found = MODELS[model].infill([row, row[:5]], preset=preset, temperature=0.7).sequences
    assert [one.tolist() for one in found] == [one.tolist() for one in expected]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_constraint_and_a_processor_see_the_text_before_each_token(text_lm, preset):
    from transformers import RepetitionPenaltyLogitsProcessor

    lm = causal_text(text_lm)
    given = {"max_new_tokens": 16, "temperature": 0.8}
    processors = [RepetitionPenaltyLogitsProcessor(3.0)]
    constraint = redraft.Regex("(yes|no|[a-c]{3,9})( [x-z]+)?")
    for more in ({"logits_processor": processors}, {"constraint": constraint}):
        expected = lm.generate(["a", "bc"], preset="ar", **given, **more).texts
        assert lm.generate(["a", "bc"], preset=preset, **given, **more).texts == expected


def causal_text(lm):
    """The model with the weights of another one, whose context is causal, and the tokenizer of the fixture."""
    return replace(tiny_lm(vocab_size=len(lm.tokenizer), block_size=5, within="full"), tokenizer=lm.tokenizer)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow if n > 3 else []) for n in range(16)])
def test_rows_that_join_and_leave_change_no_other(seed):
    """Rows of four presets and any prompts in one batch, whose prompts are fed in chunks."""
    chance, lm = random.Random(seed), list(MODELS.values())[seed % len(MODELS)]
    batch, running, done = Batch(lm.denoiser, max_rows=2, max_positions=32, chunk=3), {}, 0
    chosen = [
        {
            "preset": chance.choice([*PRESETS, "ar"]),
            "temperature": chance.choice([0.0, 0.7]),
            "max_new_tokens": chance.randint(1, 12),
            "stop": None,
        }
        for _ in range(chance.randint(2, 6))
    ]
    waiting = [(chance.choice(PROMPTS), one) for one in chosen]
    while waiting or running:
        while waiting and chance.random() < 0.5:
            prompt, one = waiting.pop()
            prepared = lm.prepare([prompt], **one)
            (id,) = batch.join(prepared.canvas, prepared.sampler, row_keys=prepared.row_keys)
            running[id] = (prompt, one, prepared)
        for step in batch.tick():
            for place, id in enumerate(step.rows.tolist()):
                if not step.is_done[place]:
                    continue
                prompt, one, prepared = running.pop(id)
                new, *_ = prepared.finish(0, step.canvas.tokens[place], step.canvas.status[place])
                assert [new.tolist()] == tokens(lm, [prompt], **one | {"preset": "ar"})
                done += 1
    assert done == len(chosen)


def test_a_suspended_row_goes_on_where_others_joined_meanwhile():
    lm = MODELS["full"]
    prepared = lm.prepare([PROMPTS[0]], preset="speculate", max_new_tokens=12, stop=None)
    batch = Batch(lm.denoiser)
    ids = batch.join(prepared.canvas, prepared.sampler, row_keys=prepared.row_keys)
    for _ in range(3):
        (step,) = batch.tick()
    (row,) = batch.suspend(ids)
    other = lm.prepare([PROMPTS[1]], preset="ar", max_new_tokens=12, stop=None)
    batch.join(other.canvas, other.sampler, row_keys=other.row_keys)
    batch.tick()
    batch.resume(row)
    while len(batch):
        for one in batch.tick():
            step = one if ids[0] in one.rows.tolist() else step
    new, *_ = prepared.finish(0, step.canvas.tokens[0], step.canvas.status[0])
    assert [new.tolist()] == tokens(lm, [PROMPTS[0]], preset="ar")


@pytest.mark.parametrize("preset", PRESETS)
def test_forwards_acceptances_and_traces_agree(preset):
    lm = MODELS["causal"]
    prompts = [[5, 6, 7, 5, 6]] * 2
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(None))
    out = lm.generate(prompts, preset=preset, max_new_tokens=24, stop=None, trace=True)
    handle.remove()
    assert out.forwards == [len(calls) - 1] * 2  # and one that feeds the prompts
    assert out.forwards[0] < 24
    for forwards, accepted, trace in zip(out.forwards, out.accepted, out.trace, strict=True):
        assert sum(accepted) == forwards
        assert 24 <= sum(number * (accepted_drafts + 1) for accepted_drafts, number in enumerate(accepted)) < 24 + 8
        final = {}
        for event in trace.events:
            final[event.position] = event.token_id if event.kind != "reopen" else None
        assert [final[position] for position in range(5, 29)] == trace.token_ids[5:]
    assert lm.generate(prompts, preset="ar", max_new_tokens=4).accepted is None


def test_listed_tokens_are_those_of_preset_ar():
    lm, listed = MODELS["full shifted"], []
    for preset in ("ar", "speculate"):
        prepared = lm.prepare([[5, 6, 7]], preset=preset, max_new_tokens=16, stop=None)
        sampler, found = replace(prepared.sampler, num_listed=3), {}
        batch = Batch(lm.denoiser)
        batch.join(prepared.canvas, sampler, row_keys=row_keys([torch.tensor([5, 6, 7])], seed=0))
        while len(batch):
            for step in batch.tick():
                rows = zip(step.likeliest.positions.tolist(), step.likeliest.tokens, step.likeliest.log_p, strict=True)
                found |= {position: (tokens.tolist(), log_p) for position, tokens, log_p in rows}
        listed.append(found)
    assert sorted(listed[0]) == sorted(listed[1]) == list(range(3, 19))
    for position, (ids, log_p) in listed[0].items():
        assert listed[1][position][0] == ids
        torch.testing.assert_close(listed[1][position][1], log_p, atol=1e-5, rtol=0)


def test_a_draft_is_what_followed_the_last_tokens_before():
    rows = torch.tensor([[1, 2, 3, 4, 2, 3, 9, 1, 2, 3, 0, 0], [7, 8, 9, 6, 5, 4, 3, 2, 1, 0, 0, 0]])
    canvas = Canvas(
        tokens=rows,
        status=torch.full(rows.shape, int(Status.GIVEN), dtype=torch.uint8),
        confidence=torch.zeros(rows.shape),
    )
    drafts, is_known = look_up(canvas, torch.tensor([10, 9]), 4)
    assert drafts[0].tolist() == [4, 2, 3, 9]  # three tokens match there; two a little later
    assert is_known.tolist() == [[True] * 4, [False] * 4]
    assert look_up(canvas, torch.tensor([0, 1]), 2)[1].tolist() == [[False] * 2] * 2
    drafts, is_known = look_up(canvas, torch.tensor([6, 9]), 4)
    assert drafts[0][is_known[0]].tolist() == [4, 2, 3]


def test_an_autoregressive_model_looks_up_and_does_not_draft():
    torch.manual_seed(0)
    lm = tiny_lm(block_size=1, shift_logits=True)
    lm = replace(lm, denoiser=replace(lm.denoiser, settings=replace(lm.denoiser.settings, process="autoregressive")))
    assert tokens(lm, PROMPTS, preset="lookup") == tokens(lm, PROMPTS, preset="ar")
    with pytest.raises(ValueError, match="needs a model that drafts blocks after a causal context"):
        tokens(lm, PROMPTS, preset="speculate")


def test_what_does_not_fit_is_told():
    lm = MODELS["full"]
    with pytest.raises(ValueError, match="drafts at most 4 tokens .blocks of 5 in training.; got block_size 5"):
        tokens(lm, [[5]], preset="speculate", block_size=5)
    with pytest.raises(ValueError, match="needs the exact cache and no guidance; got cache='none'"):
        tokens(lm, [[5]], preset="speculate", cache="none")
    with pytest.raises(ValueError, match="and no guidance; got cache=None and cfg_scale=1.0"):
        tokens(lm, [[5]], preset="lookup", cfg_scale=1.0)
    with pytest.raises(ValueError, match="'speculate' decides the next token in each forward pass; got steps=4"):
        tokens(lm, [[5]], preset="speculate", steps=4)
    with pytest.raises(ValueError, match="preset 'speculate' needs a model whose committed text is causal"):
        tokens(tiny_lm(block_size=4), [[5]], preset="speculate")
    reordered = tiny_lm(block_size=4, within="reordered")
    with pytest.raises(ValueError, match="needs a model that drafts blocks"):
        tokens(reordered, [[5]], preset="speculate")
    assert tokens(reordered, PROMPTS, preset="lookup") == tokens(reordered, PROMPTS, preset="ar")


def test_infilling_drafts_as_many_tokens_as_it_is_told():
    lm = MODELS["causal"]
    row = torch.tensor([5, 6, 2, 2, 2, 2, 2, 2, 7])
    assert lm.prepare([row], holes=True, preset="speculate", block_size=2).sampler.speculation.num_drafts == 2
    with pytest.raises(ValueError, match="drafts at most 4 tokens"):
        lm.infill([row], preset="speculate", block_size=9)
    with pytest.raises(ValueError, match="'ar' decides the next token in each forward pass; got block_size=2"):
        lm.infill([row], preset="ar", block_size=2)


def test_a_round_that_is_decided_again_after_an_error_leaves_no_wrong_prefix():
    """A guide fails once; a row that joins after the first one left copies its keys and values."""
    lm, fails = MODELS["causal"], [True]

    def guide(logits, canvas, where):
        if int((canvas.status == Status.COMMITTED).sum()) > 4 and fails:
            fails.clear()
            raise RuntimeError("once")
        return logits

    prepared = lm.prepare([PROMPTS[0]], preset="lookup", max_new_tokens=12, stop=None, guides=[guide])
    batch = Batch(lm.denoiser, max_rows=1)
    (id,) = batch.join(prepared.canvas, prepared.sampler, row_keys=prepared.row_keys)
    place = batch.place(id)
    while fails:
        try:
            (step,) = batch.tick()
        except RuntimeError:
            batch.tick()
    assert place.final <= place.unfinished - 1
    text = step.canvas.tokens[0, : place.unfinished].tolist()
    batch.leave([id])
    other = lm.prepare([text], preset="lookup", max_new_tokens=12, stop=None)
    batch.join(other.canvas, other.sampler, row_keys=other.row_keys)
    while len(batch):
        (step,) = batch.tick()
    new, *_ = other.finish(0, step.canvas.tokens[0], step.canvas.status[0])
    assert [new.tolist()] == tokens(lm, [text], preset="ar")
