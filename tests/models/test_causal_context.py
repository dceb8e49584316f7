"""A causal context: committed text is causal, an open block is not. Against plain transformers, and block by block."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm

from redraft.layouts import Layout, attention_mask
from redraft.likelihood.estimate import Request, loglikelihoods, score_questions
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.options import score_options
from redraft.likelihood.problem import CleanRows, NoiseKey, problem_loss
from redraft.models.attention import choose_attention
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings
from redraft.processes.masked import MaskedDiffusion
from redraft.sampling.config import SamplingConfig

SIZE, LENGTH, VOCAB, MASK = 4, 11, 40, 2
KINDS = [(within, shift) for within in ("full", "causal") for shift in (False, True)]
kinds = pytest.mark.parametrize(("within", "shift"), KINDS)


def causal_lm(within, shift, **others):
    return tiny_lm(block_size=SIZE, within=within, shift_logits=shift, **others)


def by_hand(model, ids, committed, within, size=SIZE):
    """Plain transformers under a mask built pair by pair, for blocks that begin at `committed`; logits (L, V)."""
    length = len(ids)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            block_end = query + 1
            if query >= committed and within == "full":
                block_end = committed + ((query - committed) // size + 1) * size
            mask[query, key] = key < block_end
    return model(input_ids=ids[None], attention_mask=mask[None, None]).logits[0]


def predictions(logits, committed, shift):
    """Which logits predict each position: the left neighbour's under a shift, and where that one is committed."""
    rows = [p - 1 if p > 0 and (shift or p <= committed) else p for p in range(len(logits))]
    return logits[rows]


@kinds
@pytest.mark.parametrize("committed", [0, 3, 4, 8, LENGTH])
def test_a_forward_equals_plain_transformers_under_a_mask_made_by_hand(within, shift, committed):
    lm, ids = causal_lm(within, shift), torch.randint(3, VOCAB, (LENGTH,))
    where = torch.arange(LENGTH)
    origin = torch.tensor([committed % SIZE])  # the blocks begin where the committed text ends
    query = Query(input_ids=ids[None], where=where, grid_origin=origin, committed=torch.tensor([committed]))
    with torch.no_grad():
        expected = predictions(by_hand(lm.model, ids, committed, within), committed, shift)
        assert (lm.denoiser(query) - expected).abs().max() < 1e-10


@kinds
def test_without_an_open_block_it_is_the_plain_autoregressive_model(within, shift):
    lm, ids = causal_lm(within, shift), torch.randint(3, VOCAB, (2, LENGTH))
    with torch.no_grad():
        plain = lm.model(input_ids=ids).logits  # no mask: the config says that the model is causal
    assert lm.model.config.is_causal
    assert (lm.logits(ids)[:, 1:] - plain[:, :-1]).abs().max() < 1e-4  # float32
    assert (lm.denoiser.logits(ids, shift=False) - plain).abs().max() < 1e-10


def problem_of(within, *, size=SIZE, segments=None, **options):
    x_0 = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    ids = torch.ones_like(x_0) if segments is None else torch.tensor(segments).expand(2, -1)
    rows = CleanRows(x_0=x_0, segment_ids=ids, is_target=ids > 0, has_padding=False, isolate_segments=bool(segments))
    process = MaskedDiffusion(mask_token_id=MASK)
    objective = Diffusion(process=process, block_size=size, context="causal", within=within, **options)
    return objective.problem(rows, NoiseKey(seed=1, step=0, rows=torch.arange(2), total_rows=2)), rows


def block_by_block(lm, problem, rows, within, shift, size):
    """Forward each noisy block of each document after its clean text; logits of all wanted positions."""
    found = torch.zeros(2, LENGTH, VOCAB, dtype=torch.float64)
    x_t = problem.query.input_ids[:, :LENGTH]
    for row in range(2):
        for segment in rows.segment_ids[row].unique():
            index = (rows.segment_ids[row] == segment).nonzero()[:, 0]
            for start in range(0, len(index), size):
                block = index[start : start + size]
                canvas = torch.cat([rows.x_0[row, index[:start]], x_t[row, block]])
                logits = predictions(by_hand(lm.model, canvas, start, within, size), start, shift)
                found[row, block] = logits[start:]
    return found[problem.query.where // (2 * LENGTH), problem.query.where % (2 * LENGTH)]


@kinds
@pytest.mark.parametrize("attention", ["mask", "pieces"])
@pytest.mark.parametrize(
    ("size", "segments"), [(1, None), (SIZE, None), (5, [1] * 3 + [2] * 7 + [3])], ids=["tokens", "whole", "packed"]
)
def test_two_copies_equal_separate_forwards_in_logits_and_gradients(
    within, shift, attention, size, segments, monkeypatch
):
    monkeypatch.setattr("redraft.layouts.TOKENS_PER_PIECE", 4)
    lm = causal_lm(within, shift, scale=3.0)
    problem, rows = problem_of(within, size=size, segments=segments)
    expected = block_by_block(lm, problem, rows, within, shift, size)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    problem = replace(problem, nats=lambda logits, part: (logits.log_softmax(-1) * weights[part]).sum(-1))
    problem.nats(expected, slice(None)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in lm.model.parameters()]
    lm.model.zero_grad()
    name = choose_attention(lm.model, attention, device=torch.device("cpu"), dtype=torch.float64)
    denoiser = replace(lm.denoiser, attention=name)
    with torch.no_grad():
        assert (denoiser(problem.query) - expected).abs().max() < 1e-10
    problem_loss(denoiser, problem, num_rows=2, has_plain_head=False)[0].backward()
    for parameter, gradient in zip(lm.model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-6 * gradient.abs().max()  # RMSNorm is float32


@kinds
@pytest.mark.parametrize("options", [{}, {"is_complementary": True}, {"is_plain": True, "t_min": 1.0}])
@pytest.mark.parametrize("segments", [None, [1] * 3 + [2] * 7 + [3]], ids=["whole", "packed"])
def test_the_joint_loss_is_the_sum_of_the_diffusion_loss_and_the_autoregressive_one(within, shift, segments, options):
    lm = causal_lm(within, shift)
    joint, rows = problem_of(within, segments=segments, ar_weight=0.2, **options)
    alone, _ = problem_of(within, segments=segments, **options)
    with torch.no_grad():
        found, diffusion = (problem_loss(lm.denoiser, each, num_rows=2) for each in (joint, alone))
        logits = lm.denoiser.logits(
            rows.x_0, segment_ids=rows.attended_segments, isolate_segments=rows.isolate_segments
        )
    logits[:, :, MASK] = -torch.inf
    nats = -logits.log_softmax(-1).gather(2, rows.x_0[:, :, None])[:, :, 0]
    is_first = torch.ones_like(rows.is_target)
    is_first[:, 1:] = rows.segment_ids[:, 1:] != rows.segment_ids[:, :-1]
    autoregressive = nats.masked_fill(is_first, 0).sum(dim=1)
    assert torch.allclose(found[1].double(), diffusion[1].double() + 0.2 * autoregressive, atol=1e-4)
    assert torch.allclose(found[0], found[1].sum())
    if options.get("is_plain"):  # a fully masked copy: every token is asked for, with weight 1
        assert (alone.query.input_ids[:, :LENGTH] == MASK).all()
        logits = lm.denoiser(alone.query).double()
        logits[:, MASK] = -torch.inf
        every = -logits.log_softmax(-1).gather(1, rows.x_0.flatten()[:, None]).view(2, LENGTH)
        assert torch.allclose(diffusion[1].double(), every.sum(dim=1), atol=1e-4)


def test_blocks_grow_in_equal_parts_and_have_the_full_size_at_the_end():
    _, rows = problem_of("full")
    process = MaskedDiffusion(mask_token_id=MASK)
    objective = Diffusion(process=process, block_size=6, context="causal", smallest_block=1, grow_steps=9)
    sizes = []
    for step in range(12):
        key = NoiseKey(seed=1, step=step, rows=torch.arange(2), total_rows=2)
        sizes.append(objective.problem(rows, key).query.layout.block_size)
    assert sizes == [1] * 3 + [2] * 3 + [4] * 3 + [6] * 3


def test_the_mask_of_two_copies_has_a_causal_clean_copy():
    positions = torch.arange(4).repeat(2)[None]
    mask = attention_mask(Layout(block_size=2, context="causal", is_two_copy=True), positions)[0, 0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


@kinds
def test_the_preset_ar_is_greedy_decoding_of_transformers(within, shift):
    lm = causal_lm(within, shift)
    for cache in ("exact", "none"):
        for prompt in ([5, 6, 7], [8, 9, 10, 11, 12]):
            ours = lm.generate([prompt], preset="ar", max_new_tokens=12, cache=cache, stop=None)
            no_mask = [[MASK]]  # the sampler never draws the mask token
            theirs = lm.model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                bad_words_ids=no_mask,
            )  # fmt: skip
            assert ours.tokens[0].tolist() == theirs[0, len(prompt) :].tolist()
            assert ours.forwards == [12]
    together = lm.generate([[5, 6, 7], [8, 9, 10, 11, 12]], preset="ar", max_new_tokens=12, stop=None)
    assert together.tokens[1].tolist() == ours.tokens[0].tolist()


@kinds
def test_the_likelihood_is_exact_and_that_of_the_autoregressive_model(within, shift):
    lm, ids = causal_lm(within, shift), torch.randint(3, VOCAB, (LENGTH,))
    with torch.no_grad():
        logits = lm.model(input_ids=ids[None]).logits[0]
    logits[:, MASK] = -torch.inf
    log_p = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    requests = [Request(context=ids[:n], continuation=ids[n:]) for n in (1, 5, 10)]
    for request, score in zip(requests, loglikelihoods(lm.denoiser, requests), strict=True):
        assert abs(score.nats - log_p[len(request.context) - 1 :].sum().item()) < 1e-10
        assert (score.standard_error, score.forwards) == (0, 1)
    choices = [Request(context=ids[:6], continuation=ids[6:n]) for n in (8, LENGTH)]
    shared = score_questions(lm.denoiser, [choices])[0]
    assert abs(shared[1].nats - log_p[5:].sum().item()) < 1e-10
    options = score_options(lm.denoiser, ids[:6], [torch.tensor([token]) for token in (7, 8)]).scores
    assert abs(options[0].log_p - options[1].log_p - float(logits[5, 7] - logits[5, 8])) < 1e-10


def test_preset_ar_on_a_model_without_a_causal_context_names_the_training_that_gives_one():
    for lm, how in ((tiny_lm(), "to everything"), (tiny_lm(block_size=4), "in blocks")):
        with pytest.raises(
            ValueError, match=f"attends {how}. Train one with --objective.kind block --objective.context"
        ):
            lm.generate([[5]], preset="ar", max_new_tokens=4)


@pytest.mark.parametrize("setting", [{"steps": 4}, {"forwards": 2}, {"block_size": 4}, {"budget": 0.5}])
def test_preset_ar_has_no_number_of_steps(setting):
    with pytest.raises(ValueError, match="decides the next token in each forward pass; got"):
        SamplingConfig(preset="ar", **setting)


def test_a_block_larger_than_that_of_training_is_refused():
    with pytest.raises(ValueError, match="block_size must be at most that of the model's training, 4; got 8"):
        causal_lm("full", False).generate([[5]], preset="sdar", block_size=8, max_new_tokens=8)


def test_settings_of_a_causal_context_are_whole():
    saved = {"mask_token_id": 2, "block_size": 4, "context": "causal"}
    with pytest.raises(ValueError, match="diffusion.within does not say"):
        DiffusionSettings.from_saved(saved)
    with pytest.raises(ValueError, match="block_size is absent"):
        DiffusionSettings.from_saved({"mask_token_id": 2, "context": "causal", "within": "full"})
    with pytest.raises(ValueError, match="within is for context causal"):
        DiffusionSettings.from_saved({"mask_token_id": 2, "within": "full"})
    assert DiffusionSettings.from_saved(saved | {"within": "full"}).saved()["context"] == "causal"
    assert set(DiffusionSettings(mask_token_id=2).saved()) == {
        "mask_token_id", "process", "schedule", "shift_logits", "block_size",
    }  # fmt: skip


def test_layouts_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="a causal context needs a block_size"):
        Layout(context="causal")
    with pytest.raises(ValueError, match="within 'causal' needs context 'causal'"):
        Layout(block_size=2, within="causal")
