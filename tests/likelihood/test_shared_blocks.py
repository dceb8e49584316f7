"""Block-causal likelihoods: clean blocks run once give what whole rows give, at a fraction of the positions."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from tiny import tiny_lm

from redraft.likelihood import spans
from redraft.likelihood.blocks import ROOT, SharedBlocks
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, loglikelihoods, mask_bounds, score_questions
from redraft.likelihood.masks import Masks
from redraft.likelihood.spans import MaskedSpan

CONFIG = LikelihoodConfig(num_samples=8)


def draw(generator, n):
    return torch.randint(3, 40, (n,), generator=generator)


def question(*, context_len=21, lengths=(9, 14, 3), key=0):
    generator = torch.Generator().manual_seed(key)
    context = draw(generator, context_len)
    return [Request(context=context, continuation=draw(generator, n), key=key) for n in lengths]


def count_positions(lm, run):
    fed = []
    handle = lm.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].numel()))
    run()
    handle.remove()
    return sum(fed)


@pytest.mark.parametrize("architecture", ["llama", "modernbert"])
@pytest.mark.parametrize("shift_logits", [False, True])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("context_len", [0, 2, 21])
def test_shared_blocks_give_the_likelihoods_of_whole_rows(
    architecture, shift_logits, cfg_scale, block_size, context_len
):
    lm = tiny_lm(architecture=architecture, shift_logits=shift_logits, block_size=block_size)
    questions = [question(context_len=context_len), question(context_len=context_len + 1, lengths=(7, 7), key=5)]
    config = replace(CONFIG, cfg_scale=cfg_scale)
    shared = score_questions(lm.denoiser, questions, config)
    whole = mask_bounds(lm.denoiser, list(chain(*questions)), config, shares_blocks=False)
    for found, expected in zip(chain(*shared), whole, strict=True):
        assert found.nats == pytest.approx(expected.nats, abs=1e-5)
        assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-5)
        assert found.forwards == expected.forwards


@pytest.mark.parametrize("num_tokens", [1, 11])
def test_small_forwards_change_nothing(monkeypatch, num_tokens):
    lm = tiny_lm(block_size=4)
    asked = question()
    expected = score_questions(lm.denoiser, [asked], CONFIG)[0]
    monkeypatch.setitem(spans.TOKENS_PER_FORWARD, "cpu", num_tokens)
    found = score_questions(lm.denoiser, [asked], CONFIG)[0]
    assert [one.nats for one in found] == pytest.approx([one.nats for one in expected], abs=1e-5)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("context_len", [0, 1, 21])
def test_an_autoregressive_model_runs_the_context_of_a_question_once(cfg_scale, context_len):
    lm = tiny_lm(shift_logits=True, block_size=1)
    lm.model.config.is_causal = True
    object.__setattr__(lm.denoiser, "settings", replace(lm.denoiser.settings, process="autoregressive"))
    asked = question(context_len=context_len)
    config = replace(CONFIG, cfg_scale=cfg_scale)
    shared = score_questions(lm.denoiser, [asked], config)[0]
    whole = mask_bounds(lm.denoiser, asked, config, shares_blocks=False)
    for found, expected in zip(shared, whole, strict=True):
        assert found.nats == pytest.approx(expected.nats, abs=1e-5)
        assert (found.forwards, found.is_greedy) == (expected.forwards, expected.is_greedy)
    if context_len and not cfg_scale:
        fed = count_positions(lm, lambda: score_questions(lm.denoiser, [asked], config))
        assert fed == context_len + sum(1 + len(one.continuation) for one in asked)


def test_another_block_before_is_another_likelihood():
    """The control of the tests above: what is shared is read."""
    lm = tiny_lm(block_size=4)
    one = question()[0]
    other = replace(one, context=one.context.clone().index_fill(0, torch.tensor([0]), 39))
    found = loglikelihoods(lm.denoiser, [one, other], CONFIG)
    assert abs(found[0].nats - found[1].nats) > 1e-3


def test_a_context_is_run_once_for_all_choices_and_samples():
    lm = tiny_lm(block_size=4)
    asked = question(context_len=64, lengths=(8, 8, 8, 8))
    copies = 4 * 2 * 8 * 4  # choices, blocks, samples, tokens of a block
    shared = count_positions(lm, lambda: score_questions(lm.denoiser, [asked], CONFIG))
    assert shared == 64 + 4 * 4 + copies  # the last block of a choice is never clean
    whole = count_positions(lm, lambda: mask_bounds(lm.denoiser, asked, CONFIG, shares_blocks=False))
    assert whole >= 4 * 8 * (68 + 72)


def test_equal_blocks_after_equal_blocks_are_one():
    texts = [torch.tensor(text) for text in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], [1, 2, 7, 8, 9], [1, 2])]
    mask = Masks(is_masked=torch.ones(1, 1, dtype=torch.bool), weight=torch.ones(1))
    asked = [MaskedSpan(tokens=text, masks=mask, context_len=0) for text in texts]
    shared = SharedBlocks(tiny_lm(block_size=2).denoiser, asked, hides_context=False)
    assert shared.tokens.tolist() == [1, 2, 3, 4, 7, 8]
    assert shared.positions.tolist() == [0, 1, 2, 3, 2, 3]
    first, second, third, fourth = (shared.parents[span] for span in asked)
    assert first == second != third
    assert fourth == ROOT
    assert shared.is_seen[third].tolist() == [True, True, False, False, True, True]
