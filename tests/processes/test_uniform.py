"""The uniform process against enumeration: 2 tokens of 3 symbols."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.processes.noised import Process
from redraft.processes.uniform import UniformDiffusion
from redraft.schedules import SCHEDULES, schedule_from_name, stratified_times

N, LENGTH = 3, 2
STATES = torch.tensor(list(product(range(N), repeat=LENGTH)))  # (9, 2)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def uniforms(shape, seed):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def posterior(process, x_t, probs, t, s, *, kind):
    """P(x_s | x_t, prediction) for s < t over the vocabulary: what `posterior_draw` draws from.

    "plug_in" puts the prediction into q(x_s | x_t, x_0) in x_0's place, "mixture" averages q(x_s | x_t, x_0) over it.
    """
    n, alpha_t, alpha_s = process.vocab_size, process.schedule.alpha(t[:, None]), process.schedule.alpha(s[:, None])
    is_x_t = torch.nn.functional.one_hot(x_t, n).to(probs.dtype)
    forward = alpha_t / alpha_s * is_x_t + (1 - alpha_t / alpha_s) / n  # q(x_t | x_s)
    if kind == "plug_in":
        reached = (probs * is_x_t).sum(dim=-1, keepdim=True) * alpha_t + (1 - alpha_t) / n
        return forward * (alpha_s * probs + (1 - alpha_s) / n) / reached
    scaled = probs / (alpha_t * is_x_t + (1 - alpha_t) / n)  # p(x_0) / q(x_t | x_0)
    return forward * (alpha_s * scaled + (1 - alpha_s) / n * scaled.sum(dim=-1, keepdim=True))


@pytest.fixture(scope="module")
def joint():
    """P(x_0) over the 9 states, far from a product."""
    return (2 * torch.randn(len(STATES), generator=generator(3), dtype=torch.float64)).softmax(0)


@pytest.fixture(scope="module")
def table():
    """Logits of a random denoiser for each x_t, one column more than there are symbols."""
    return torch.randn(len(STATES), LENGTH, N + 1, generator=generator(0), dtype=torch.float64)


def index_of(x):
    return (x * torch.tensor([N, 1])).sum(dim=-1)


def kernel(alpha):
    """q(x_t | x_0) of one token, (..., x_0, x_t)."""
    return alpha[..., None, None] * torch.eye(N, dtype=torch.float64) + (1 - alpha[..., None, None]) / N


def exact_denoiser(joint, alpha, *, without_own):
    """p(x_0^l | x_t) of every x_t, or of x_t without its token at l: (times, 9, 2, 3)."""
    q = kernel(alpha)  # (T, 3, 3)
    seen = [q[:, STATES[:, None, i], STATES[None, :, i]] for i in range(LENGTH)]  # (T, x_0, x_t)
    columns = []
    for i in range(LENGTH):
        weights = joint[:, None] * (seen[1 - i] if without_own else seen[0] * seen[1])  # (T, x_0, x_t)
        is_token = torch.nn.functional.one_hot(STATES[:, i], N).to(weights)  # (x_0, 3)
        columns.append(torch.einsum("tab,ac->tbc", weights, is_token))
    probs = torch.stack(columns, dim=2)
    return probs / probs.sum(dim=-1, keepdim=True)


def exact_nelbo(process, x_0, predict, *, points=2000):
    """Integrate over t the gap between true and predicted reverse rates, summed over all x_t and all jumps.

    With v the ratio of q_t at two tokens and v' the predicted one, the gap is v log(v / v') - v + v', the relative
    entropy of two jump processes. Time goes as t = w^2, midpoint rule, because the rates grow fast near 0.
    """
    w = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    t = w**2
    alpha = process.schedule.alpha(t)
    q = kernel(alpha)
    probs = predict(alpha)  # (T, 9, 2, 3)
    total = torch.zeros_like(t)
    for state, x_t in enumerate(STATES):
        reach = q[:, x_0[0], x_t[0]] * q[:, x_0[1], x_t[1]]
        for i in range(LENGTH):
            true = q[:, x_0[i], :]  # (T, 3)
            guess = torch.einsum("ta,tab->tb", probs[:, state, i], q)
            v, v_guess = true / true[:, x_t[i], None], guess / guess[:, x_t[i], None]
            gap = v * (v / v_guess).log() - v + v_guess  # 0 at x_t itself
            total += reach * -process.schedule.derivative(t) / alpha / N * gap.sum(dim=1)
    return float((total * 2 * w).mean())


def sampled_nelbo(process, x_0, logits_of, *, samples=200_000):
    """Mean and standard error of the process' own loss."""
    t = stratified_times(
        torch.arange(samples, dtype=torch.float64), total=samples, offset=torch.rand((), generator=generator(1))
    )
    u = torch.rand(samples, LENGTH, generator=generator(2), dtype=torch.float64)
    noised = process.corrupt(x_0.expand(samples, -1), t, u=u)
    assert noised.is_target.all()
    logits = logits_of(noised.t[:, 0], index_of(noised.x_t))
    nats = process.loss(logits.flatten(0, 1), noised.flatten()).view(samples, LENGTH).sum(dim=1).double()
    return float(nats.mean()), float(nats.std() / samples**0.5)


@every_schedule
def test_the_monte_carlo_nelbo_equals_exact_enumeration_for_every_schedule(table, name):
    process, x_0 = UniformDiffusion(vocab_size=N, schedule=schedule_from_name(name)), torch.tensor([0, 2])
    probs = table[..., :N].softmax(-1)
    expected = exact_nelbo(process, x_0, lambda alpha: probs.expand(len(alpha), -1, -1, -1))
    mean, standard_error = sampled_nelbo(process, x_0, lambda t, index: table[index])
    assert abs(mean - expected) < 4 * standard_error
    assert abs(1.1 * mean - expected) > 4 * standard_error  # the test can fail


@every_schedule
def test_the_nelbo_of_the_exact_denoiser_is_the_log_likelihood_itself(joint, name):
    """No jump changes two tokens at once, so nothing is lost by predicting each token alone."""
    process = UniformDiffusion(vocab_size=N, schedule=schedule_from_name(name))
    for x_0, p in ((STATES[1], joint[1]), (STATES[8], joint[8])):

        def logits_of(t, index):
            probs = exact_denoiser(joint, process.schedule.alpha(t), without_own=True)
            return probs[torch.arange(len(t)), index].log()

        mean, standard_error = sampled_nelbo(process, x_0, logits_of, samples=40_000)
        assert abs(mean + math.log(p)) < 4 * standard_error


def test_the_minimum_of_the_nelbo_is_the_prediction_that_has_not_seen_its_own_token(joint):
    process, entropy = UniformDiffusion(vocab_size=N), -float((joint * joint.log()).sum())

    def mean_bound(without_own):
        bounds = [
            exact_nelbo(process, x_0, lambda alpha: exact_denoiser(joint, alpha, without_own=without_own))
            for x_0 in STATES
        ]
        return sum(float(p) * bound for p, bound in zip(joint, bounds, strict=True))

    assert mean_bound(True) == pytest.approx(entropy, abs=1e-4)
    assert mean_bound(False) > entropy + 0.1


def test_the_loss_stays_finite_and_exact_at_extreme_times_and_large_vocabularies():
    n = 50_000
    process = UniformDiffusion(vocab_size=n)
    logits = torch.randn(6, n, generator=generator(4))
    for t in (0.0, 1e-6, 1e-3, 0.5, 1 - 1e-6, 1.0):
        x_0 = torch.arange(6)[None]
        noised = process.corrupt(x_0, torch.tensor([t], dtype=torch.float64), u=uniforms(x_0.shape, 5)).flatten()
        found = process.loss(logits, noised)
        alpha = torch.tensor(min(max(1 - t, 1e-9), 1 - 1e-9), dtype=torch.float64)
        y = n * alpha * torch.nn.functional.one_hot(noised.x_0, n) + 1 - alpha
        guess = n * alpha * logits.double().softmax(-1) + 1 - alpha
        v, v_guess = (each / each.gather(1, noised.x_t[:, None]) for each in (y, guess))
        expected = (v * (v / v_guess).log() - v + v_guess).sum(1) / (n * alpha)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.999])
def test_the_gradient_of_the_loss_is_that_of_its_formula(t):
    n = 200
    process, x_0 = UniformDiffusion(vocab_size=n), torch.arange(6)[None]
    noised = process.corrupt(x_0, torch.tensor([t], dtype=torch.float64), u=uniforms(x_0.shape, 5)).flatten()
    logits = (2 * torch.randn(6, n, generator=generator(4))).requires_grad_()
    guess = n * (1 - t) * logits.double().softmax(-1) + t
    y = n * (1 - t) * torch.nn.functional.one_hot(noised.x_0, n) + t
    v, v_guess = (each / each.gather(1, noised.x_t[:, None]) for each in (y, guess))
    formula = (v * (v / v_guess).log() - v + v_guess).sum() / (n * (1 - t))
    (expected,), (found,) = (
        torch.autograd.grad(loss, logits) for loss in (formula, process.loss(logits, noised).sum())
    )  # fmt: skip
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_rows_of_the_head_beyond_the_vocabulary_play_no_part(table):
    process = UniformDiffusion(vocab_size=N)
    noised = process.corrupt(STATES, torch.full((9,), 0.5), u=uniforms(STATES.shape, 6)).flatten()
    logits = table.flatten(0, 1)
    assert torch.equal(process.loss(logits, noised), process.loss(logits[:, :N], noised))


@given(seed=st.integers(0, 1000), t=st.floats(0, 1), n=st.integers(2, 10))
@settings(max_examples=50)
def test_corrupt_is_the_identity_at_0_the_prior_at_1_and_moves_no_fixed_position(seed, t, n):
    process = UniformDiffusion(vocab_size=n)
    x_0 = torch.randint(0, n, (4, 8), generator=generator(seed))
    u = torch.rand(4, 8, generator=generator(seed), dtype=torch.float64)
    can_change = torch.rand(4, 8, generator=generator(seed + 1)) < 0.5

    def corrupt(time):
        return process.corrupt(x_0, torch.full((4,), time, dtype=torch.float64), u=u, can_change=can_change)

    assert torch.equal(corrupt(0.0).x_t, x_0)
    assert torch.equal(corrupt(1.0).x_t, torch.where(can_change, process.prior(u), x_0))
    noised = corrupt(t)
    assert torch.equal(noised.is_target, can_change)
    assert torch.equal(noised.x_t[~can_change], x_0[~can_change])
    assert noised.x_t.min() >= 0
    assert noised.x_t.max() < n


def test_corrupt_draws_from_the_forward_kernel_and_the_prior_is_uniform():
    x_0, t = torch.ones(1, 200_000, dtype=torch.int64), torch.tensor([0.3], dtype=torch.float64)
    noised = UniformDiffusion(vocab_size=N).corrupt(x_0, t, u=uniforms(x_0.shape, 7))
    found = noised.x_t.flatten().bincount(minlength=N) / x_0.numel()
    assert torch.allclose(found.double(), kernel(1 - t)[0, 1], atol=0.005)
    prior = UniformDiffusion(vocab_size=N).prior(uniforms((200_000,), 8))
    assert torch.allclose(prior.bincount() / 200_000, torch.full((N,), 1 / N), atol=0.005)


def posterior_by_bayes(q_s, q_t, transition, x_t, x_0):
    """q(x_s | x_t, x_0) from the forward kernels alone: q(x_s | x_0) q(x_t | x_s) / q(x_t | x_0)."""
    return q_s[x_0] * transition[:, x_t] / q_t[x_0, x_t]


@every_schedule
def test_the_posterior_is_bayes_by_enumeration(name):
    process = UniformDiffusion(vocab_size=N, schedule=schedule_from_name(name))
    assert isinstance(process, Process)
    t, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    alpha_t, alpha_s = process.schedule.alpha(t), process.schedule.alpha(s)
    q_s, q_t, transition = (kernel(a)[0] for a in (alpha_s, alpha_t, alpha_t / alpha_s))
    probs = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    for x_t in range(N):
        at = torch.tensor([x_t])
        exact = [posterior_by_bayes(q_s, q_t, transition, x_t, x_0) for x_0 in range(N)]
        for x_0 in range(N):
            certain = torch.eye(N, dtype=torch.float64)[x_0][None]
            for kind in ("plug_in", "mixture"):
                assert torch.allclose(posterior(process, at, certain, t, s, kind=kind)[0], exact[x_0], atol=1e-12)
        mixture = posterior(process, at, probs, t, s, kind="mixture")[0]
        assert torch.allclose(mixture, sum(p * q for p, q in zip(probs[0], exact, strict=True)), atol=1e-12)
        plug_in = posterior(process, at, probs, t, s, kind="plug_in")[0]
        forward = probs[0] @ q_s, probs[0] @ q_t
        assert torch.allclose(plug_in, forward[0] * transition[:, x_t] / forward[1][x_t], atol=1e-12)
        assert (plug_in - mixture).abs().max() > 0.01


@every_schedule
def test_plug_in_of_what_the_others_say_is_the_mixture_of_what_all_say(joint, name):
    """The two kinds are one posterior: they differ by whether the prediction has used x_t at its own position."""
    process = UniformDiffusion(vocab_size=N, schedule=schedule_from_name(name))
    t, s = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    alpha = process.schedule.alpha(t)
    without, whole = (exact_denoiser(joint, alpha, without_own=own)[0].flatten(0, 1) for own in (True, False))
    x_t, t, s = STATES.flatten(), t.expand(len(without)), s.expand(len(without))
    plug_in = posterior(process, x_t, without, t, s, kind="plug_in")
    assert torch.allclose(plug_in, posterior(process, x_t, whole, t, s, kind="mixture"), atol=1e-12)
    assert (plug_in - posterior(process, x_t, whole, t, s, kind="plug_in")).abs().max() > 0.01


@given(seed=st.integers(0, 1000), t=st.floats(0.05, 1), share=st.floats(0, 0.95), n=st.integers(2, 30))
@settings(max_examples=25)
def test_the_posterior_is_a_distribution_over_the_vocabulary(seed, t, share, n):
    probs = torch.rand(4, n, generator=generator(seed), dtype=torch.float64)
    probs, x_t = probs / probs.sum(-1, keepdim=True), torch.randint(0, n, (4,), generator=generator(seed))
    times = torch.full((4,), t, dtype=torch.float64), torch.full((4,), t * share, dtype=torch.float64)
    for kind in ("plug_in", "mixture"):
        found = posterior(UniformDiffusion(vocab_size=n), x_t, probs, *times, kind=kind)
        assert (found >= 0).all()
        assert torch.allclose(found.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("s", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plug_in", "mixture"])
def test_a_draw_follows_the_posterior(kind, s):
    samples, probs = 200_000, torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    process, x_t = UniformDiffusion(vocab_size=4), torch.ones(samples, dtype=torch.int64)
    t, s = torch.full((samples,), 0.7, dtype=torch.float64), torch.full((samples,), s, dtype=torch.float64)
    x_0 = torch.multinomial(probs, samples, replacement=True, generator=generator(9))
    u = torch.rand(samples, generator=generator(10), dtype=torch.float64)
    x_t_prob = probs[x_t] if kind == "plug_in" else None
    found = process.posterior_draw(x_0, x_t, t, s, u=u, x_t_prob=x_t_prob).bincount(minlength=4) / samples
    exact = posterior(process, x_t[:1], probs[None], t[:1], s[:1], kind=kind)
    assert (found - exact[0]).abs().sum() / 2 < 0.005


def ancestral(process, joint, *, steps, kind, without_own, samples=100_000):
    """Sample x_0 by `steps` draws from the posterior under the exact denoiser; return the total variation to P(x_0)."""
    x = process.prior(uniforms((samples, LENGTH), 11))
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    probs = exact_denoiser(joint, process.schedule.alpha(grid[:-1]), without_own=without_own)
    stream = generator(12)
    for step in range(steps):
        p = probs[step, index_of(x)].flatten(0, 1)  # (samples * 2, 3)
        u = torch.rand(2, len(p), generator=stream, dtype=torch.float64)
        x_0 = (p.cumsum(-1) < u[0, :, None]).sum(-1).clamp(max=N - 1)
        x_t = x.flatten()
        x_t_prob = p.gather(1, x_t[:, None])[:, 0] if kind == "plug_in" else None
        t, s = (grid[step + i].expand(len(p)) for i in (0, 1))
        x = process.posterior_draw(x_0, x_t, t, s, u=u[1], x_t_prob=x_t_prob).view(samples, LENGTH)
    found = index_of(x).bincount(minlength=len(STATES)) / samples
    return float((found - joint).abs().sum() / 2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ancestral_sampling_reaches_the_joint_distribution(joint, name):
    process = UniformDiffusion(vocab_size=N, schedule=schedule_from_name(name))
    assert ancestral(process, joint, steps=64, kind="plug_in", without_own=True) < 0.02
    assert ancestral(process, joint, steps=64, kind="mixture", without_own=False) < 0.02
    assert ancestral(process, joint, steps=1, kind="mixture", without_own=False) > 0.1  # all tokens at once
    assert ancestral(process, joint, steps=64, kind="plug_in", without_own=False) > 0.02  # the other's prediction


def test_a_vocabulary_without_a_choice_is_told():
    with pytest.raises(ValueError, match="vocab_size must be at least 2; got 1"):
        UniformDiffusion(vocab_size=1)
