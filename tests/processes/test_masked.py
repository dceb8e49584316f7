"""The masked process against closed forms on a toy: 3 tokens of 2 symbols, a tabular denoiser."""

from itertools import product
from math import gamma

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.processes.masked import MaskedDiffusion
from redraft.schedules import SCHEDULES, schedule_from_name, stratified_times

MASK = 2
LENGTH = 3


@pytest.fixture(scope="module")
def table():
    """Logits (symbol or mask)^3 -> (3, 3): any denoiser over 2 symbols and the mask."""
    return torch.randn(3**LENGTH, LENGTH, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def row_nelbos(table, process, x_0, t, u):
    """Sample the NELBO of each row with the tabular denoiser."""
    noised = process.corrupt(x_0, t, u=u)
    where = noised.targets()
    index = (noised.x_t * torch.tensor([9, 3, 1])).sum(dim=1)
    logits = table[index].flatten(0, 1)[where]
    losses = process.loss(logits, noised.flatten()[where])
    return losses.new_zeros(len(x_0)).index_add(0, where // LENGTH, losses)


def closed_form(table, x_0):
    """Sum over mask patterns of Beta(k, L - k + 1) times the cross-entropy at the masked positions.

    With m = 1 - alpha the weight is dm / m, so a pattern of k masks has the weight of the integral of
    m^(k - 1) (1 - m)^(L - k) over m from 0 to 1: the schedule drops out.
    """
    total = 0.0
    for pattern in product([False, True], repeat=LENGTH):
        is_masked = torch.tensor(pattern)
        k = int(is_masked.sum())
        if k == 0:
            continue
        x_t = torch.where(is_masked, MASK, x_0)
        logits = table[int((x_t * torch.tensor([9, 3, 1])).sum())]
        nll = -logits[:, :MASK].log_softmax(-1)[torch.arange(LENGTH), x_0]
        beta = gamma(k) * gamma(LENGTH - k + 1) / gamma(LENGTH + 1)
        total += beta * float(nll[is_masked].sum())
    return total


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_monte_carlo_nelbo_equals_the_closed_form_for_every_schedule(table, name):
    x_0, samples = torch.tensor([0, 1, 1]), 200_000
    generator = torch.Generator().manual_seed(1)
    t = stratified_times(
        torch.arange(samples, dtype=torch.float64), total=samples, offset=torch.rand((), generator=generator)
    )
    u = torch.rand(samples, LENGTH, generator=generator, dtype=torch.float64)
    process = MaskedDiffusion(mask_token_id=MASK, schedule=schedule_from_name(name))
    nelbo = row_nelbos(table, process, x_0.expand(samples, -1), t, u)
    standard_error = nelbo.std() / samples**0.5
    assert abs(float(nelbo.mean()) - closed_form(table, x_0)) < 4 * float(standard_error)


def test_the_closed_form_is_not_met_with_a_wrong_weight(table):
    x_0, samples = torch.tensor([0, 1, 1]), 200_000
    t = stratified_times(torch.arange(samples, dtype=torch.float64), total=samples, offset=torch.tensor(0.5))
    u = torch.rand(samples, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cosine = MaskedDiffusion(mask_token_id=MASK, schedule=schedule_from_name("cosine"))
    nelbo = row_nelbos(table, cosine, x_0.expand(samples, -1), t, u) * 1.1
    assert abs(float(nelbo.mean()) - closed_form(table, x_0)) > 4 * float(nelbo.std() / samples**0.5)


def test_stratified_times_have_a_smaller_variance_than_independent_ones():
    """2000 estimates of 16 rows each, 64 tokens that are the harder the more of the row is masked, as in text."""
    process, length, batches, rows = MaskedDiffusion(mask_token_id=MASK), 64, 2000, 16
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    index = torch.arange(rows, dtype=torch.float64).expand(batches, -1)
    stratified = 1e-3 + (1 - 1e-3) * stratified_times(index, total=rows, offset=draw(batches, 1))
    independent = 1e-3 + (1 - 1e-3) * draw(batches, rows)
    variances = []
    for t in (stratified, independent):
        x_0 = torch.zeros(batches * rows, length, dtype=torch.int64)
        noised = process.corrupt(x_0, t.flatten(), u=draw(batches * rows, length))
        num_masked = noised.is_target.sum(dim=1)
        nats = num_masked * (num_masked / length) / noised.t[:, 0]
        variances.append(float(nats.view(batches, rows).mean(dim=1).var()))
    assert variances[0] < 0.2 * variances[1]


@given(seed=st.integers(0, 1000), t=st.floats(0, 1), s=st.floats(0, 1))
@settings(max_examples=50)
def test_corrupt_is_the_identity_at_0_the_prior_at_1_and_nested_between(seed, t, s):
    process = MaskedDiffusion(mask_token_id=MASK)
    x_0 = torch.randint(0, 2, (4, 8), generator=torch.Generator().manual_seed(seed))
    u = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def corrupt(time):
        return process.corrupt(x_0, torch.full((4,), time, dtype=torch.float64), u=u)

    assert torch.equal(corrupt(0.0).x_t, x_0)
    assert torch.equal(corrupt(1.0).x_t, process.prior(u))
    low, high = corrupt(min(s, t)), corrupt(max(s, t))
    assert (low.is_target <= high.is_target).all()
    assert torch.equal(low.x_t == MASK, low.is_target)


def test_time_per_position_and_fixed_positions_are_honoured():
    x_0 = torch.zeros(2, 4, dtype=torch.int64)
    t = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    can_change = torch.tensor([[True, True, True, True], [False, False, True, True]])
    noised = MaskedDiffusion(mask_token_id=MASK).corrupt(x_0, t, u=torch.full((2, 4), 0.5), can_change=can_change)
    assert noised.is_target.int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_a_literal_mask_token_in_the_text_is_no_target():
    x_0 = torch.full((1, 4), MASK)
    noised = MaskedDiffusion(mask_token_id=MASK).corrupt(x_0, torch.tensor([0.0]), u=torch.rand(1, 4))
    assert not noised.is_target.any()


def test_llada_differs_from_mdlm_by_the_mask_token_in_the_softmax():
    x_0 = torch.tensor([[0, 1]])
    noised = MaskedDiffusion(mask_token_id=MASK).corrupt(x_0, torch.tensor([1.0]), u=torch.rand(1, 2))
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    targets = noised.flatten()[noised.targets()]
    mdlm = MaskedDiffusion(mask_token_id=MASK).loss(logits, targets)
    llada = MaskedDiffusion(mask_token_id=MASK, exclude_mask=False).loss(logits, targets)
    assert torch.allclose(mdlm, -logits[:, :2].log_softmax(-1)[[0, 1], [0, 1]])
    assert torch.allclose(llada, -logits.log_softmax(-1)[[0, 1], [0, 1]])


def test_a_negative_mask_token_is_told():
    with pytest.raises(ValueError, match="mask_token_id must be a row of the vocabulary; got -1"):
        MaskedDiffusion(mask_token_id=-1)
