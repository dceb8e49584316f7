"""What a caller can lay hands on: guides, streamers, transformers' own generate, sessions, samples, budgets."""

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from tiny import tiny_lm
from tiny_gemma import CANVAS, tiny_gemma
from transformers import LogitsProcessor, LogitsProcessorList

import redraft
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.settings import DiffusionSettings
from redraft.sampling import policies as p
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import Status
from redraft.sampling.config import SamplingConfig, with_saved
from redraft.sampling.guidance import Reward
from redraft.sampling.presets import PRESETS
from redraft.sampling.sampler import Sampler, build_sampler

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def uniform_lm():
    lm = tiny_lm()
    settings = replace(lm.denoiser.settings, process="uniform")
    return replace(lm, denoiser=replace(lm.denoiser, settings=settings))


@pytest.fixture(scope="module")
def blocks():
    return tiny_lm(block_size=4)


class Ban(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0]
        scores[:, self.token] = -math.inf
        return scores


def test_logits_processors_of_transformers_rule_what_is_drawn(lm):
    settings = {"max_new_tokens": 8, "stop": None}
    likeliest = lm.generate(PROMPT, **settings).tokens[0].mode().values.item()
    banned = lm.generate(PROMPT, logits_processor=LogitsProcessorList([Ban(likeliest)]), **settings)
    assert likeliest not in banned.tokens[0]


def test_a_reward_on_the_clean_estimate_moves_the_texts(lm):
    def many(rows):
        assert rows.shape[1] == len(PROMPT) + 8
        assert (rows[:, : len(PROMPT)] == torch.tensor(PROMPT)).all()
        return (rows == 17).sum(dim=1).float()

    settings = {"max_new_tokens": 8, "stop": None}
    plain = lm.generate(PROMPT, **settings).tokens[0]
    guided = lm.generate(PROMPT, guides=[Reward(reward=many, strength=100.0, top_k=40)], **settings).tokens[0]
    assert (guided == 17).all()
    assert not (plain == 17).all()


def test_guidance_moves_the_texts_and_zero_does_not(lm):
    settings = {"max_new_tokens": 12, "stop": None}
    plain = lm.generate(PROMPT, **settings).tokens[0]
    assert torch.equal(lm.generate(PROMPT, cfg_scale=0.0, **settings).tokens[0], plain)
    assert not torch.equal(lm.generate(PROMPT, cfg_scale=4.0, **settings).tokens[0], plain)


class Listener:
    def __init__(self):
        self.pieces, self.drafts, self.ended = [], [], False

    def put(self, tokens):
        self.pieces.append(tokens.tolist())

    def put_draft(self, tokens):
        self.drafts.append(tokens.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("stop", [None, "eos"])
def test_a_streamer_gets_the_prompt_and_then_every_token_once_in_reading_order(blocks, stop):
    listener = Listener()
    out = blocks.generate(PROMPT, max_new_tokens=10, stop=stop, streamer=listener)
    assert listener.pieces[0] == PROMPT
    assert [token for piece in listener.pieces[1:] for token in piece] == out.tokens[0].tolist()
    assert len(listener.pieces) > 2
    assert listener.ended
    assert all(len(draft) <= 10 for draft in listener.drafts)
    with pytest.raises(ValueError, match="a streamer follows one text; got 2 rows"):
        blocks.generate([PROMPT, PROMPT], max_new_tokens=4, streamer=listener)


def test_guides_that_work_in_place_see_fresh_logits_in_every_step(lm):
    seen = []

    def louder(logits, canvas, where):
        seen.append(round(float(logits[0, 0]), 9))
        logits[:, 0] += 1
        return logits

    lm.generate(PROMPT, preset="mdlm", steps=40, max_new_tokens=3, stop=None, guides=[louder])
    assert len(seen) > len(set(seen))  # steps that changed nothing saw the same logits again


def test_the_models_own_blocks_go_before_a_presets(blocks):
    for name in ("sdar", "llada2", "bd3lm", "fast-dllm"):
        config = blocks.sampling_config(preset=name, max_new_tokens=32)
        assert build_sampler(config, blocks.denoiser.settings).layout.block_size == 4


def test_a_session_of_other_blocks_is_not_taken_over(blocks):
    settings = {"max_new_tokens": 8, "stop": None, "preset": "sdar"}
    batch = Batch(blocks.denoiser)
    first = list(blocks.stream(PROMPT * 4, batch=batch, **settings))[-1].canvas.tokens[0].tolist()
    wider = settings | {"block_size": 8}
    kept = [step.confidence for step in blocks.stream(first, batch=batch, **wider)]
    alone = [step.confidence for step in blocks.stream(first, **wider)]
    assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))


def test_an_infilled_row_does_not_depend_on_the_holes_beside_it(lm):
    row, other = [5, 2, 7, 2, 9], [4] + [2] * 30
    for preset in ("mdlm", "llada"):
        alone = lm.infill(row, preset=preset).sequences[0]
        assert torch.equal(lm.infill([row, other], preset=preset).sequences[0], alone)
    assert 2 not in lm.infill(other, block_size=24).tokens[0]


def test_a_session_feeds_only_what_is_new_and_changes_nothing(blocks, monkeypatch):
    fed = []
    forward = type(blocks.denoiser).__call__

    def counted(self, query):
        fed.append(query.input_ids.shape[1])
        return forward(self, query)

    monkeypatch.setattr(type(blocks.denoiser), "__call__", counted)
    settings = {"max_new_tokens": 8, "stop": None}
    batch = Batch(blocks.denoiser)
    first = list(blocks.stream(PROMPT * 4, batch=batch, **settings))[-1].canvas.tokens[0].tolist()
    second = [*first, 11, 12, 13]
    fed.clear()
    kept = list(blocks.stream(second, batch=batch, **settings))[-1].canvas.tokens[0]
    num_kept = fed[0]
    fed.clear()
    alone = list(blocks.stream(second, **settings))[-1].canvas.tokens[0]
    assert torch.equal(kept, alone)
    assert num_kept <= 16 < fed[0]
    other = [3, *second[1:]]  # another beginning: nothing of the session fits
    expected = list(blocks.stream(other, **settings))[-1].canvas.tokens[0]
    assert torch.equal(list(blocks.stream(other, batch=batch, **settings))[-1].canvas.tokens[0], expected)


def test_samples_of_a_prompt_follow_each_other_and_differ(blocks):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "stop": None}
    out = blocks.generate([PROMPT, [3, 4]], num_samples=3, **settings)
    assert [sequence[:2].tolist() for sequence in out.sequences] == [[5, 6]] * 3 + [[3, 4]] * 3
    assert len({tuple(tokens.tolist()) for tokens in out.tokens[:3]}) == 3
    first = blocks.generate(PROMPT, **settings).tokens[0]
    assert torch.equal(out.tokens[0], first)


def test_a_shared_prompt_is_fed_once(blocks, monkeypatch):
    fed = []
    forward = type(blocks.denoiser).__call__

    def counted(self, query):
        fed.append(query.input_ids.numel())
        return forward(self, query)

    monkeypatch.setattr(type(blocks.denoiser), "__call__", counted)
    blocks.generate(PROMPT * 8, num_samples=5, max_new_tokens=4, steps=1, stop=None)
    assert fed == [40, 5 * 4]


@pytest.mark.parametrize(("chosen", "forwards"), [({"budget": 0.25}, 3), ({"forwards": 5}, 5), ({"budget": 1.0}, 12)])
def test_one_knob_goes_from_fast_to_careful(lm, chosen, forwards):
    assert lm.generate(PROMPT, max_new_tokens=12, stop=None, **chosen).forwards == [forwards]


def test_a_step_whose_input_is_the_last_ones_is_no_forward(lm):
    chosen = {"preset": "mdlm", "steps": 60, "max_new_tokens": 4, "stop": None}
    steps = list(lm.stream(PROMPT, **chosen))
    assert len(steps) > 10
    num_changes = sum(bool(step.is_committed.any()) for step in steps)
    assert lm.generate(PROMPT, **chosen).forwards == [num_changes]  # the last commit is not looked at again


def test_neighbours_change_no_rows_forwards(lm):
    chosen = {"preset": "mdlm", "steps": 40, "max_new_tokens": 4, "stop": None}
    rows = [PROMPT, [3], [4, 4], [11] * 9]
    alone = [lm.generate(row, **chosen).forwards[0] for row in rows]
    assert lm.generate(rows, **chosen).forwards == alone
    assert max(alone) <= 4


def test_a_budget_of_forwards_is_spent_on_forwards_alone(lm):
    canvas = lm._canvas_after([torch.tensor(PROMPT)], 6, Sampler())
    lazy = Sampler(steps=12, unmask=p.at_the_end, revise=p.Remasking(), forwards=3)
    *_, last = denoise(lm.denoiser, canvas, lazy, row_keys=torch.tensor([0]))
    assert (last.age.tolist(), last.num_forwards.tolist()) == ([2], [1])  # the clock has three steps with one input


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"budget": 0.5, "steps": 3}, "steps and budget each set the number of forward passes"),
        ({"budget": 1.5}, "budget must lie in .0, 1.; got 1.5"),
        ({"forwards": 0}, "forwards must lie in .1, 1048576.; got 0"),
        ({"num_samples": 0}, "num_samples must lie in .1, 1048576.; got 0"),
        ({"threshold": 0.5}, "preset 'llada' has no setting 'threshold'; got 0.5. Use fast-dllm"),
        ({"cache": "exact"}, "needs block-causal attention"),
        ({"section": "train"}, "unknown setting 'section'; known are preset, max_new_tokens"),
        ({"seconds": 2.0}, "setting 'seconds' was removed; got 2.0. Use forwards"),
        ({"preset": "remdm", "eta": 0.1}, r"setting 'eta' was removed; got 0.1.*MODULE:NAME.*Remasking\(eta=...\)"),
    ],
)
def test_what_does_not_fit_is_told(lm, chosen, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(PROMPT, max_new_tokens=8, **chosen)


FLOATS = {
    "temperature": "llada", "top_p": "llada", "cfg_scale": "llada", "alg_temperature": "llada", "budget": "llada",
    "threshold": "sdar", "factor": "fast-dllm", "entropy_bound": "eb", "editing_threshold": "llada2.1",
    "entropy_threshold": "wedlm",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *((name, "llada") for name in ("max_new_tokens", "steps", "forwards", "num_samples", "block_size")),
        ("steps_per_block", "mdlm"), ("block_size", "sdar"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [10**9, 10**18, 10**30])
def test_counts_that_can_only_be_mistakes_are_refused_at_once(lm, name, preset, value, monkeypatch):
    monkeypatch.setattr(type(lm), "encode", None)  # refused before a prompt is looked at
    with pytest.raises(ValueError, match=rf"{name} must lie in .*; got {value}\."):
        lm.generate(PROMPT, preset=preset, **{name: value})


def test_many_long_texts_at_once_are_refused():
    with pytest.raises(
        ValueError, match="num_samples times max_new_tokens must be at most 4194304; got 100000 and 128"
    ):
        SamplingConfig(num_samples=100_000)
    assert SamplingConfig(num_samples=32, max_new_tokens=2**17).block_size is None


def test_a_saved_block_size_stays_where_it_does_not_divide_the_length():
    assert with_saved({"preset": "sdar", "block_size": 32}, {"max_new_tokens": 20}).block_size == 32  # blocks on a grid
    saved = {"preset": "llada", "block_size": 32}
    for preset in ("llada", "eb"):  # blocks of the model, which lie on a grid too
        given = {"preset": preset, "block_size": 32, "max_new_tokens": 20}
        assert with_saved({}, given, has_grid=True).block_size == 32
    with pytest.raises(ValueError, match="block_size must divide max_new_tokens; got 32 and 20"):
        with_saved({}, {"preset": "bd3lm", "block_size": 32, "max_new_tokens": 20}, has_grid=True)
    assert with_saved(saved, {"max_new_tokens": 999_983}).block_size == 32  # a prime
    assert with_saved(saved, {"max_new_tokens": 40}).block_size == 32
    assert with_saved(saved, {"max_new_tokens": 20}).block_size == 20
    with pytest.raises(ValueError, match="max_new_tokens must lie in .1, 1048576."):
        with_saved(saved, {"max_new_tokens": 10**18 + 1})


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_has_64_bits(seed):
    with pytest.raises(ValueError, match="seed must lie in"):
        SamplingConfig(seed=seed)
    assert SamplingConfig(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_setting_may_be_infinite_or_nan(value):
    for name, preset in FLOATS.items():
        with pytest.raises(ValueError, match=f"{name} must be a finite number; got {value}"):
            SamplingConfig(preset=preset, **{name: value})
    hints = get_type_hints(SamplingConfig)
    assert set(FLOATS) == {name for name, kind in hints.items() if float in (kind, *get_args(kind))}


@pytest.mark.parametrize(
    "build",
    [
        lambda x: Sampler(temperature=x), lambda x: Sampler(cfg_scale=x), lambda x: Sampler(top_p=x),
        lambda x: p.LinearAnneal(start=x), lambda x: p.Factor(factor=x),
        lambda x: p.EntropyBound(bound=x), lambda x: p.GumbelScore(score=p.random_order, temperature=x),
        lambda x: p.Threshold(threshold=x),
        lambda x: p.Remasking(loop_on=x), lambda x: p.TokenEdit(threshold=x),
        lambda x: p.Renoise(accept=p.EntropyBound(bound=0.1), confident=x),
        lambda x: Reward(reward=torch.ones_like, strength=x),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_setting_of_a_policy_may_be_infinite_or_nan(build, value):
    with pytest.raises(ValueError, match=f"must be a finite number; got {value}"):
        build(value)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_fills_every_position(name, blocks):
    if name == "diffusion-gemma":
        settings = DiffusionSettings(mask_token_id=0, process="uniform", block_size=CANVAS)
        lm = redraft.LanguageModel(denoiser=EncoderDecoder(tiny_gemma(), settings))
    elif name == "duo":
        lm = uniform_lm()
    else:
        lm = tiny_lm() if name.startswith("fast") else blocks
        lm = tiny_lm(block_size=4, within="full") if PRESETS[name].blocks == "token" else lm
    config = lm.sampling_config(preset=name, max_new_tokens=8, stop=None)
    sampler = build_sampler(config, lm.denoiser.settings)
    canvas = lm._canvas_after([torch.tensor(PROMPT)], 8, sampler)
    num_asked = int(canvas.is_noise.sum())
    assert num_asked >= 8
    *_, last = denoise(lm.denoiser, canvas, sampler, row_keys=torch.tensor([0]))
    assert not (last.canvas.is_noise | last.canvas.is_draft).any()
    assert int((last.canvas.status == Status.COMMITTED).sum()) == num_asked
