import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.randomness import uniform
from redraft.sampling.propose import propose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 3.0, -1.0])
NEVER = 3


def frequencies(logits, draws=20_000, **settings):
    rows = logits.repeat(draws, 1)
    proposal = propose(rows, never=NEVER, u=uniform(0, torch.arange(draws)), **settings)
    return torch.bincount(proposal.x_0, minlength=logits.numel()) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax_without_the_mask(temperature):
    expected = (LOGITS / temperature).index_fill(0, torch.tensor([NEVER]), -torch.inf).softmax(0)
    assert (frequencies(LOGITS, temperature=temperature) - expected).abs().max() < 0.015


def test_draws_over_a_large_vocabulary_follow_the_softmax():
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits.index_fill(0, torch.tensor([NEVER]), -torch.inf).softmax(0)
    assert 0.5 * (frequencies(logits, temperature=1.0) - expected).abs().sum() < 0.05


def test_top_k_and_top_p_cut_the_tail():
    assert (frequencies(LOGITS, temperature=1.0, top_k=2) > 0).tolist() == [True, True, False, False, False]
    assert (frequencies(LOGITS, temperature=1.0, top_p=0.6) > 0).tolist() == [True, False, False, False, False]
    assert (frequencies(LOGITS, temperature=1.0, top_p=0.7) > 0).tolist() == [True, True, False, False, False]
    assert (frequencies(LOGITS, temperature=1.0, top_k=99, top_p=1.0) > 0).sum() == 4


def test_temperature_0_takes_the_best_that_is_not_the_mask_with_its_plain_probability():
    proposal = propose(LOGITS[None], never=NEVER)
    assert proposal.x_0.tolist() == [0]
    assert torch.allclose(proposal.confidence, LOGITS.softmax(0)[:1])


@given(u=st.floats(0, 1, exclude_max=True), size=st.integers(2, 1100), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_draw_is_never_a_token_without_mass(u, size, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 30
    logits[size // 2 :] = -torch.inf
    logits[0] = 0.0
    proposal = propose(logits[None], never=size - 1, u=torch.tensor([u], dtype=torch.float64), temperature=1.0)
    assert logits[proposal.x_0].isfinite().all()


def test_a_temperature_without_random_numbers_is_told():
    with pytest.raises(ValueError, match="needs random numbers"):
        propose(LOGITS[None], never=NEVER, temperature=1.0)
