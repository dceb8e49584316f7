import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.processes.gaussian import (
    PARAMETRIZATIONS,
    WEIGHTINGS,
    AdaptiveTimes,
    GaussianDiffusion,
    LogitNormalTimes,
    UniformTimes,
)
from redraft.schedules import GAUSSIAN_SCHEDULES, GaussianSchedule, gaussian_schedule

every_schedule = pytest.mark.parametrize("name", GAUSSIAN_SCHEDULES)
every_parametrization = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_schedule
@every_parametrization
@settings(max_examples=20)
@given(t=st.floats(1e-3, 1 - 1e-3), seed=st.integers(0, 9))
def test_the_target_gives_x_0_back(name, parametrization, t, seed):
    process = GaussianDiffusion(schedule=gaussian_schedule(name), parametrization=parametrization)
    x_0, eps, t = draw(2, 3, 4, seed=seed), draw(2, 3, 4, seed=seed + 10), torch.full((2, 3), t, dtype=torch.float64)
    noised = process.corrupt(x_0, t, eps=eps)
    assert torch.allclose(process.predict_x_0(process.target(x_0, eps, t), noised.z_t, t), x_0, atol=1e-8)
    assert process.loss(process.target(x_0, eps, t), noised).abs().max() < 1e-20


@every_schedule
def test_every_position_has_its_own_time(name):
    process = GaussianDiffusion(schedule=gaussian_schedule(name))
    x_0, eps, t = draw(5, 3, 4), draw(5, 3, 4, seed=1), torch.rand(5, 3, dtype=torch.float64)
    whole = process.corrupt(x_0, t, eps=eps).z_t
    one = process.corrupt(x_0[2:3, 1:2], t[2:3, 1:2], eps=eps[2:3, 1:2]).z_t
    assert torch.equal(whole[2:3, 1:2], one)
    assert torch.allclose(process.corrupt(x_0, torch.zeros_like(t), eps=eps).z_t, x_0)


@every_schedule
def test_noise_recovered_from_z_t_is_the_noise_that_was_added(name):
    process = GaussianDiffusion(schedule=gaussian_schedule(name))
    x_0, eps, t = draw(5, 3, 4), draw(5, 3, 4, seed=1), 0.1 + 0.8 * torch.rand(5, 3, dtype=torch.float64)
    noised = process.corrupt(x_0, t, eps=eps)
    again = process.noised_from(x_0, t, z_t=noised.z_t)
    assert torch.allclose(again.eps, eps)
    assert torch.equal(again.z_t, noised.z_t)


@every_schedule
@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
def test_a_weighting_is_the_same_loss_under_every_parametrization(name, path, weighting):
    """An error of x_0 at a fixed z_t costs the same, whatever the network predicts."""
    schedule, t = GaussianSchedule(curve=name, path=path), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x_0, eps, wrong = draw(9, 4), draw(9, 4, seed=1), draw(9, 4, seed=2)
    losses = []
    for parametrization in PARAMETRIZATIONS:
        process = GaussianDiffusion(schedule=schedule, parametrization=parametrization, weighting=weighting)
        noised = process.corrupt(x_0, t, eps=eps)
        alpha, sigma = process.coefficients(t, like=x_0)
        output = process.target(wrong, (noised.z_t - alpha * wrong) / sigma, t)
        losses.append(process.loss(output, noised))
    assert all(torch.allclose(loss, losses[0], rtol=1e-4) for loss in losses)
    if weighting in PARAMETRIZATIONS:  # and it is the plain squared error where that is what is predicted
        plain = GaussianDiffusion(schedule=schedule, parametrization=weighting)
        noised = plain.corrupt(x_0, t, eps=eps)
        alpha, sigma = plain.coefficients(t, like=x_0)
        output = plain.target(wrong, (noised.z_t - alpha * wrong) / sigma, t)
        assert torch.allclose(plain.loss(output, noised), losses[0], rtol=1e-4)


def test_published_weights():
    vp = gaussian_schedule("cosine")
    t = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
    snr = vp.log_snr(t).exp()

    def weight(parametrization, weighting):
        return GaussianDiffusion(schedule=vp, parametrization=parametrization, weighting=weighting).weight(t)

    assert torch.allclose(weight("x0", "min-snr"), snr.clamp(max=5))
    assert torch.allclose(weight("eps", "min-snr"), snr.clamp(max=5) / snr)
    assert torch.allclose(weight("v", "min-snr"), snr.clamp(max=5) / (snr + 1))
    sigmoid = (-1 - vp.log_snr(t)).sigmoid()
    assert torch.allclose(weight("eps", "sigmoid"), sigmoid)
    assert torch.allclose(weight("v", "sigmoid"), sigmoid * vp.log_snr(t).sigmoid())
    assert torch.allclose(weight("eps", "elbo"), -vp.log_snr_derivative(t) / 2)


def test_weights_stay_finite_at_both_ends():
    for name in GAUSSIAN_SCHEDULES:
        for weighting in set(WEIGHTINGS) - {"elbo"}:  # the ELBO's own weight is infinite at t = 1
            for parametrization in ("x0", "flow", "v"):
                process = GaussianDiffusion(
                    schedule=gaussian_schedule(name), parametrization=parametrization, weighting=weighting
                )
                assert process.weight(torch.tensor([0.0, 1e-6, 1.0])).isfinite().all()


def test_time_densities_keep_their_shape():
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(LogitNormalTimes(mean=1.0, std=0.5)(u))
    assert abs(float(logits.mean()) - 1.0) < 1e-3
    assert abs(float(logits.std()) - 0.5) < 1e-2
    assert torch.equal(UniformTimes()(u), u)


@settings(max_examples=20)
@given(heights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
def test_adaptive_times_draw_each_bin_in_proportion_to_its_loss(heights):
    schedule = gaussian_schedule("flow")
    times = AdaptiveTimes(schedule, num_bins=4, log_snr_range=(-8.0, 8.0))
    times.losses = torch.tensor(heights, dtype=torch.float64)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = times(u)
    assert (t.diff() > 0).all()  # u = 0 is clean
    counts = torch.histc(-schedule.log_snr(t), bins=4, min=-8, max=8)
    assert torch.allclose(counts / 4000, times.losses / times.losses.sum(), atol=2e-3)


def test_importance_brings_adaptive_times_back_to_times_uniform_in_log_snr():
    schedule = gaussian_schedule("cosine")
    times = AdaptiveTimes(schedule, num_bins=4, log_snr_range=(-8.0, 8.0))
    times.losses = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    u = (torch.arange(40000, dtype=torch.float64) + 0.5) / 40000
    t = times(u)
    loss = (schedule.log_snr(t) + 9).square()
    uniform = (torch.linspace(8, -8, 40001, dtype=torch.float64) + 9).square().mean()
    assert float((loss * times.importance(t)).mean()) == pytest.approx(float(uniform), rel=1e-3)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear-beta", "sqrt", "sigmoid"])
def test_sampling_starts_where_the_output_says_what_x_0_is(name):
    schedule = gaussian_schedule(name)
    for parametrization in ("x0", "v", "flow"):
        assert GaussianDiffusion(schedule=schedule, parametrization=parametrization).start() == 1
    process = GaussianDiffusion(schedule=schedule, parametrization="eps")
    x_0, eps, t = torch.randn(3, 4), torch.randn(3, 4), torch.full((3,), process.start())
    z_t = process.corrupt(x_0, t, eps=eps).z_t
    assert torch.allclose(process.predict_x_0(eps, z_t, t), x_0, atol=1e-3)


def test_adaptive_times_learn_where_the_loss_is():
    times = AdaptiveTimes(gaussian_schedule("flow"), num_bins=4, log_snr_range=(-8.0, 8.0), decay=0.5)
    t = gaussian_schedule("flow").inverse(torch.tensor([6.0, 2.0, -6.0, -2.0, -2.0]))
    where = torch.tensor([True, True, True, False, True])
    for step in range(41):
        times.begin(step)
        times.record(t, torch.tensor([0.0, 3.0, 1.0, 9.0, math.inf]), where=where)
    assert torch.allclose(times.losses, torch.tensor([0.0, 3.0, 1.0, 1.0], dtype=torch.float64), atol=1e-6)
    assert 0 < float(times(torch.tensor(1e-4))) < float(t[0])  # a bin without loss is still seen


def test_a_bin_moves_towards_its_mean_loss_by_one_minus_decay_and_an_undrawn_one_stays():
    times = AdaptiveTimes(gaussian_schedule("cosine"), num_bins=2, log_snr_range=(-4.0, 4.0), decay=0.75)
    clean = torch.full((2,), 0.05, dtype=torch.float64)  # both of the bin of high log-SNR
    times.record(clean, torch.tensor([2.0, 4.0]), where=torch.tensor([True, True]))
    times.begin(1)
    assert times.losses.tolist() == pytest.approx([1 + 0.25 * (3.0 - 1), 1.0])


def test_adaptive_times_wait_for_the_end_of_a_step_and_carry_what_it_saw_in_their_buffers():
    times, whole = (AdaptiveTimes(gaussian_schedule("flow"), num_bins=4, decay=0.5) for _ in range(2))
    t, loss, where = torch.tensor([0.1, 0.1, 0.9]), torch.tensor([2.0, 4.0, 1.0]), torch.ones(3, dtype=torch.bool)
    for part in (slice(0, 1), slice(1, 3)):
        times.begin(0)
        times.record(t[part], loss[part], where=where[part])
    assert torch.equal(times.losses, torch.ones(4, dtype=torch.float64))
    whole.record(t, loss, where=where)
    resumed = AdaptiveTimes(gaussian_schedule("flow"), num_bins=4, decay=0.5)
    resumed.load_state_dict(times.state_dict())
    for each in (times, whole, resumed):
        each.begin(1)
        assert each.losses.tolist() == [1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianDiffusion(parametrization="epsilon"), "unknown parametrization 'epsilon'.*x0, eps, v, flow"),
        (lambda: GaussianDiffusion(weighting="snr"), "unknown weighting 'snr'"),
        (lambda: GaussianDiffusion(smallest_t=0.0), "smallest_t must lie in"),
        (lambda: LogitNormalTimes(std=0.0), "a positive std; got 1.0 and 0"),
        (lambda: AdaptiveTimes(gaussian_schedule("flow"), num_bins=1), "num_bins must be at least 2"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
