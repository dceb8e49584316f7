"""CART, complementary masks and preference losses against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm

from redraft.likelihood.objectives.diffusion import Diffusion, cart_weights, with_complement
from redraft.likelihood.objectives.preference import bounds, preference_loss, preference_margins
from redraft.likelihood.problem import CleanRows, NoiseKey, draw_noise, problem_loss
from redraft.processes.masked import MaskedDiffusion

LENGTH, MASK = 10, 2
MASKED = MaskedDiffusion(mask_token_id=MASK)


def key(rows, *, step=0):
    return NoiseKey(seed=3, step=step, rows=torch.arange(rows), total_rows=rows)


def clean_rows(batch, *, segments=None, **changes):
    x_0 = torch.randint(3, 40, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    segment_ids = torch.ones_like(x_0) if segments is None else torch.tensor(segments).expand(batch, -1)
    return CleanRows(x_0=x_0, segment_ids=segment_ids, is_target=segment_ids > 0, **changes)


def test_cart_weights_are_the_sum_over_clean_tokens_of_a_geometric_kernel():
    is_clean = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    for p in (0.1, 0.8, 1.0):
        found = cart_weights(is_clean, p=p)
        for row in range(3):
            for n in range(LENGTH):
                terms = [
                    0.5 * p * (1 - p) ** (abs(n - i) - 1) for i in range(LENGTH) if is_clean[row, i] and i != n
                ]  # fmt: skip
                assert float(found[row, n]) == pytest.approx(sum(terms), abs=1e-6)
    endless = cart_weights(torch.arange(4001)[None] != 2000, p=0.3)[0, 2000]
    assert float(endless) == pytest.approx(1, abs=1e-5)  # a hole in a clean text counts in full
    assert not cart_weights(torch.zeros(1, LENGTH, dtype=torch.bool), p=0.3).any()


def test_the_cart_objective_weighs_each_cross_entropy_and_is_reported_as_the_plain_bound():
    lm = tiny_lm(scale=4.0)
    rows = clean_rows(2, segments=[1] * 4 + [2] * 4 + [0] * 2, isolate_segments=True)
    objective = Diffusion(process=MASKED, cart=0.3)
    problem = objective.problem(rows, key(2))
    is_clean = (problem.query.input_ids != MASK) & (rows.segment_ids > 0)
    logits = torch.randn(len(problem.query.where), 40, generator=torch.Generator().manual_seed(2))
    targets = rows.x_0.flatten()[problem.query.where]
    nats = -logits.index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(1).gather(1, targets[:, None])[:, 0]
    apart = torch.zeros(2, LENGTH)
    for part in (slice(0, 4), slice(4, 8)):  # documents do not lend each other context
        apart[:, part] = cart_weights(is_clean[:, part], p=0.3)
    assert torch.allclose(problem.nats(logits, slice(None)), nats * apart.flatten()[problem.query.where], atol=1e-5)
    with torch.no_grad():
        reported = problem_loss(lm.denoiser, objective.evaluation().problem(rows, key(2)), num_rows=2)[1]
        plain = problem_loss(lm.denoiser, Diffusion(process=MASKED).problem(rows, key(2)), num_rows=2)[1]
    assert torch.equal(reported, plain)


def test_a_mask_and_its_complement_cover_every_target_exactly_once():
    rows = clean_rows(8, segments=[1] * 8 + [0] * 2)
    is_target = rows.is_target & (torch.arange(LENGTH) >= 2)
    noised = draw_noise(MASKED, replace(rows, is_target=is_target), key(8))
    both = with_complement(MASKED, noised, can_change=is_target)
    first, second = both.is_target.chunk(2)
    assert torch.equal(first.int() + second.int(), is_target.int())
    assert torch.equal(both.x_t == MASK, both.is_target)
    assert torch.allclose(both.t[:8] + both.t[8:], torch.ones(8, LENGTH, dtype=torch.float64))


@pytest.mark.parametrize("block_size", [None, 4])
def test_complementary_masks_are_unbiased_and_lower_the_variance(block_size):
    """Against two independent masks, which cost the same. A position is the harder the more of its row is masked."""
    samples = 40_000
    rows = clean_rows(samples)
    rows = replace(rows, x_0=torch.full_like(rows.x_0, 5))

    def estimate(is_complementary, step):
        options = {"process": MASKED, "t_min": 0.0, "is_complementary": is_complementary}
        problem = Diffusion(block_size=block_size, **options).problem(rows, key(samples, step=step))
        canvas = problem.query.input_ids[:, :LENGTH]
        hardness = (canvas == MASK).double().mean(dim=1)
        width = problem.query.input_ids.shape[1]
        logits = torch.zeros(len(problem.query.where), 8)
        logits[:, 5] = (2 - 4 * hardness[problem.query.where // width]).float()
        nats = problem.nats(logits, slice(None)).double()
        return torch.zeros(samples, dtype=torch.float64).index_add(0, problem.row, nats)

    pairs = estimate(True, 0)
    twice = (estimate(False, 1) + estimate(False, 2)) / 2
    error = float((pairs.var() + twice.var()).sqrt() / samples**0.5)
    assert abs(float(pairs.mean() - twice.mean())) < 4 * error
    assert pairs.var() < 0.8 * twice.var()


def test_the_preference_loss_is_that_of_its_formula():
    policy, reference = torch.tensor([10.0, 12.0, 20.0, 9.0]), torch.tensor([11.0, 12.0, 19.0, 9.5])
    found = preference_loss(preference_margins(policy, reference), beta=0.2)
    margins = [(11 - 10) - (19 - 20), (12 - 12) - (9.5 - 9)]
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.2 * margin)) for margin in margins], abs=1e-6)
    with pytest.raises(ValueError, match="rows must be pairs.*got 3 rows"):
        preference_margins(policy[:3], reference[:3])


def test_a_policy_that_is_its_reference_loses_log_2_under_shared_noise_alone():
    lm, rows = tiny_lm(scale=4.0), clean_rows(4)
    policy, same, elsewhere = (
        bounds(lm.denoiser, Diffusion(process=MASKED), rows, one, num_samples=2)
        for one in (key(4), key(4), key(4, step=1))
    )
    assert preference_loss(preference_margins(policy, same), beta=0.5).tolist() == pytest.approx(
        [math.log(2)] * 2, abs=1e-6
    )
    independent = preference_loss(preference_margins(policy, elsewhere), beta=0.5)
    assert (independent - math.log(2)).abs().max() > 0.1  # noise of its own for each model would be all there is


def test_the_bound_of_a_row_is_the_mean_of_its_draws():
    lm, rows, objective = tiny_lm(scale=2.0), clean_rows(2), Diffusion(process=MASKED)
    found = bounds(lm.denoiser, objective, rows, key(2), num_samples=3)
    singly = []
    for sample in range(3):
        drawn = replace(key(2), rows=torch.arange(2) + 2 * sample, total_rows=6)
        singly.append(problem_loss(lm.denoiser, objective.problem(rows, drawn), num_rows=2)[1])
    assert torch.allclose(found, torch.stack(singly).mean(0), atol=1e-4)


def test_preference_gradients_raise_the_chosen_and_lower_the_rejected_and_leave_the_reference_alone():
    policy, reference = tiny_lm(scale=1.0, seed=1), tiny_lm(scale=1.0, seed=2)
    rows, objective = clean_rows(2), Diffusion(process=MASKED)

    def of(lm, at, num_samples):
        return bounds(lm.denoiser, objective, rows, at, num_samples=num_samples)

    with torch.no_grad():
        before = of(policy, key(2, step=7), 64)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    for step in range(3):
        with torch.no_grad():
            fixed = of(reference, key(2, step=step), 4)
        preference_loss(preference_margins(of(policy, key(2, step=step), 4), fixed), beta=0.1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = of(policy, key(2, step=7), 64)
    assert after[1] - after[0] > before[1] - before[0] + 0.1
    assert all(p.grad is None for p in reference.model.parameters())
