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


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_a_nucleus_is_drawn_from_as_if_it_were_sorted_out(top_p):
    logits = torch.randn(1300, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.index_fill(0, torch.tensor([NEVER]), -torch.inf).softmax(0)
    ordered, order = p.sort(descending=True)
    inside = order[ordered.cumsum(0) - ordered < top_p]
    expected = torch.zeros_like(p).index_copy(0, inside, p[inside] / p[inside].sum())
    found = frequencies(logits, draws=5000, temperature=1.0, top_p=top_p)
    assert set(found.nonzero()[:, 0].tolist()) <= set(inside.tolist())
    assert 0.5 * (found - expected).abs().sum() < 0.15  # of 5000 draws


@pytest.mark.parametrize("chosen", [{}, {"top_p": 0.5}, {"top_k": 7, "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_token_in_any_batch(chosen, temperature, dtype):
    logits = torch.randn(300, 1300, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    u = uniform(0, torch.arange(300))
    whole = propose(logits, never=NEVER, u=u, temperature=temperature, **chosen)
    for some in (slice(0, 1), slice(5, 250), slice(250, 300)):
        part = propose(logits[some], never=NEVER, u=u[some], temperature=temperature, **chosen)
        assert torch.equal(part.x_0, whole.x_0[some])
        assert torch.equal(part.confidence, whole.confidence[some])
    assert torch.allclose(whole.confidence, logits.float().softmax(-1).gather(1, whole.x_0[:, None])[:, 0])


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
