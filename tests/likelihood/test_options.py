"""Decisions among options: exact for single tokens, and the normalised likelihood with its error otherwise."""

import math

import pytest
import torch
from tiny import tiny_lm

from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, loglikelihoods
from redraft.likelihood.options import score_options

CONTEXT = torch.tensor([5, 6, 7])


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("shift", [False, True])
def test_options_of_one_token_are_compared_exactly_in_one_forward(block_size, shift, monkeypatch):
    lm, options = tiny_lm(block_size=block_size, shift_logits=shift), [torch.tensor([i]) for i in (8, 9, 10)]
    requests = [Request(context=CONTEXT, continuation=option) for option in options]
    nats = torch.tensor([one.nats for one in loglikelihoods(lm.denoiser, requests)]).double()
    calls, call = [], type(lm.denoiser).__call__
    monkeypatch.setattr(type(lm.denoiser), "__call__", lambda self, query: calls.append(1) or call(self, query))
    found = score_options(lm.denoiser, CONTEXT, options)
    scores = found.scores
    assert len(calls) == found.forwards == 1
    assert [score.log_p for score in scores] == pytest.approx(nats.log_softmax(dim=0).tolist(), abs=1e-5)
    assert [score.standard_error for score in scores] == [0, 0, 0]


def test_longer_options_have_a_probability_and_an_error():
    lm, options = tiny_lm(scale=2.0), [torch.tensor(ids) for ids in ([8], [9, 10, 11], [12, 13])]
    scores = score_options(lm.denoiser, CONTEXT, options, num_samples=4, seed=1).scores
    assert sum(math.exp(score.log_p) for score in scores) == pytest.approx(1)
    assert all(score.standard_error > 0 for score in scores)
    all_masks = score_options(lm.denoiser, CONTEXT, options, num_samples=64).scores
    assert [score.standard_error for score in all_masks] == [0, 0, 0]
    config = LikelihoodConfig(num_samples=64)
    exact = loglikelihoods(lm.denoiser, [Request(context=CONTEXT, continuation=one) for one in options], config)
    expected = torch.tensor([one.nats for one in exact]).log_softmax(dim=0).tolist()
    assert [score.log_p for score in all_masks] == pytest.approx(expected, abs=1e-6)
    for score, value in zip(scores, expected, strict=True):
        assert abs(score.log_p - value) < 5 * score.standard_error + 1e-3


@pytest.mark.parametrize("options", [[], [[8]], [[8], [8]], [[8], []]])
def test_what_is_no_choice_is_refused(lm, options):
    with pytest.raises(ValueError, match=f"a decision needs at least two options.*got {len(options)}"):
        score_options(lm.denoiser, CONTEXT, [torch.tensor(ids, dtype=torch.int64) for ids in options])
