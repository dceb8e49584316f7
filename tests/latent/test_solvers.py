"""Solvers against the exact denoiser of a mixture of two Gaussians, and against diffusers."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from redraft.latent.solvers import SOLVERS, Ancestral, Churn, Heun, solve, solver_from_name
from redraft.processes.gaussian import PARAMETRIZATIONS, GaussianDiffusion
from redraft.schedules import GAUSSIAN_SCHEDULES, GaussianSchedule, gaussian_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' tables

MEANS, STD = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.3
RANDOM = ("ancestral", "churn")
GENERATOR = torch.Generator()


def exact_x_0(path, z, t):
    """E[x_0 | z_t] where x_0 is -1 or 1 with equal odds, plus noise of std 0.3."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = (alpha * STD) ** 2 + sigma**2
    misfit = z[..., None] - alpha * MEANS
    posterior = (-(misfit**2) / (2 * variance)).softmax(-1)
    return (posterior * (MEANS + alpha * STD**2 / variance * misfit)).sum(-1)


def normal(count):
    """Quantiles of N(0, 1): a sample without chance."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def mixture(count):
    """Quantiles of the mixture."""
    grid = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    cdf = torch.special.ndtr((grid[:, None] - MEANS) / STD).mean(1)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return grid[torch.searchsorted(cdf, wanted)]


def distance(solver, path, *, steps, start=1.0, count=4000, denoise=exact_x_0):
    """Wasserstein-1 between what the solver makes and the mixture."""
    GENERATOR.manual_seed(0)
    noise = lambda _: torch.randn(count, dtype=torch.float64, generator=GENERATOR)  # noqa: E731
    made = solve(
        solver,
        path,
        lambda z, t: denoise(path, z, t),
        normal(count),
        path.even_times(steps, start=start),
        noise=noise,
    )
    return float((made.sort().values - mixture(count)).abs().mean())


BOUNDS = [
    ("ddim", 50, 0.03),
    ("ancestral", 50, 0.05),
    ("heun", 50, 0.01),
    ("midpoint", 50, 0.01),
    ("churn", 50, 0.03),
    ("dpm++2m", 20, 0.06),
    ("heun", 20, 0.01),
    ("midpoint", 20, 0.01),
]


@pytest.mark.parametrize(("name", "steps", "bound"), BOUNDS)
def test_flow_reaches_the_mixture(name, steps, bound):
    """200,000 samples for the random solvers; quantiles, which need fewer, for the others."""
    count = 200_000 if name in RANDOM else 4000
    assert distance(SOLVERS[name], gaussian_schedule("flow"), steps=steps, count=count) <= bound


def through(schedule, parametrization):
    """The path, where to start, and the exact estimate handed over in the network's own terms."""
    path = gaussian_schedule(schedule)
    process = GaussianDiffusion(schedule=path, parametrization=parametrization)

    def denoise(path, z, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        x_0 = exact_x_0(path, z, t)
        at = t.expand(z.shape)
        return process.predict_x_0(
            process.target(x_0[:, None], ((z - alpha * x_0) / sigma)[:, None], at), z[:, None], at
        )[:, 0]

    start = 0.999 if parametrization == "eps" else 1.0  # at t = 1 eps says nothing of x_0
    return {"path": path, "start": start, "denoise": denoise}


@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize(("name", "steps", "bound"), BOUNDS)
def test_every_schedule_and_parametrization_reaches_it_as_well(schedule, parametrization, name, steps, bound):
    count = 20_000 if name in RANDOM else 2000
    assert distance(SOLVERS[name], steps=steps, count=count, **through(schedule, parametrization)) <= bound


@pytest.mark.parametrize("schedule", GAUSSIAN_SCHEDULES)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_converges_for_every_schedule_and_parametrization(schedule, parametrization, name):
    settings = {"count": 4000 if name in RANDOM else 400, **through(schedule, parametrization)}
    fine, coarse = (distance(SOLVERS[name], steps=steps, **settings) for steps in (40, 4))
    assert fine < 0.7 * coarse or fine < 0.02
    assert fine < (0.06 if name in RANDOM else 0.03)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("curve", GAUSSIAN_SCHEDULES)
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_vp_and_flow_are_one_process_in_other_coordinates(name, curve, shift):
    """z_flow = z_vp / (alpha + sigma) all the way to the end, where both are the data."""
    draws = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vp, flow = (GaussianSchedule(curve=curve, path=path, shift=shift) for path in ("vp", "flow"))
    times = vp.even_times(7)
    found = [
        solve(SOLVERS[name], path, partial(exact_x_0, path), start, times, noise=lambda i: draws[i])
        for path, start in ((vp, normal(64)), (flow, normal(64) / (vp.alpha(times[0]) + vp.sigma(times[0]))))
    ]
    assert (found[0] - found[1]).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [1.0, 0.25])
@pytest.mark.parametrize("curve", GAUSSIAN_SCHEDULES)
def test_times_are_even_in_the_flow_time_of_their_curve(curve, shift):
    times = gaussian_schedule(curve, shift=shift).even_times(6, start=0.9)
    plain = gaussian_schedule(curve)
    taus = plain.sigma(times) / (plain.alpha(times) + plain.sigma(times))
    assert torch.allclose(taus.diff(), taus.diff()[:1], atol=1e-9)
    assert (float(times[0]), float(times[-1])) == (0.9, 0.0)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_churn_converges_where_elfs_rule_does_not(gamma):
    path = gaussian_schedule("flow")
    assert distance(Churn(gamma=gamma), path, steps=200, count=20_000) < 0.02
    GENERATOR.manual_seed(0)
    z, times = normal(20_000), path.even_times(200)
    for t, s in pairwise(times):
        keep = 1 - gamma / 200
        z = keep * z + (1 - keep) * torch.randn(20_000, dtype=torch.float64, generator=GENERATOR)
        back = 1 - keep * (1 - t)
        z = z + (s - back) * (z - exact_x_0(path, z, back)) / back
    assert (z.sort().values - mixture(20_000)).abs().mean() > 0.1  # the negative control


def test_a_solver_with_two_estimates_asks_twice_a_step():
    asked = []
    solve(
        Heun(),
        gaussian_schedule("flow"),
        lambda z, t: asked.append(float(t)) or z,
        normal(8),
        gaussian_schedule("flow").even_times(4),
        noise=normal,
    )
    assert asked == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]  # the last step is Euler's


@dataclass(frozen=True)
class Table:
    """A schedule read from diffusers' tables: t is an index."""

    alphas: Tensor
    sigmas: Tensor

    def alpha(self, t):
        return self.alphas[t.long()]

    def sigma(self, t):
        return self.sigmas[t.long()]

    def inverse(self, log_snr):
        raise AssertionError


def drive(scheduler, path, z, *, prediction, steps, **step_arguments):
    """Run a scheduler of diffusers on the exact denoiser; `prediction` turns x_0 into what it expects."""
    for i, timestep in enumerate(scheduler.timesteps):
        x_0 = exact_x_0(path, z, torch.tensor(i))
        z = scheduler.step(prediction(i, z, x_0), timestep, z, **step_arguments).prev_sample
    assert len(scheduler.timesteps) == steps
    return z


def follow(solver, path, *, steps, noise=normal):
    """Run a solver of ours along a table, on the exact denoiser."""
    estimate = partial(exact_x_0, path)
    return solve(solver, path, estimate, normal(64), torch.arange(steps + 1.0), noise=noise)


@pytest.fixture(params=[4, 20])
def steps(request):
    return request.param


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_and_ancestral_equal_diffusers(eta, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    path = Table(kept.sqrt(), (1 - kept).sqrt())
    draws = torch.randn(steps, 64, dtype=torch.float64)
    z = normal(64)
    for i, timestep in enumerate(scheduler.timesteps):
        x_0 = exact_x_0(path, z, torch.tensor(i))
        noise = {"variance_noise": draws[i]} if eta else {}
        z = scheduler.step(x_0, timestep, z, eta=eta, **noise).prev_sample
    ours = follow(Ancestral(eta=eta), path, steps=steps, noise=lambda i: draws[i])
    assert (ours - z).abs().max() < 1e-5


def test_ancestral_equals_the_ddpm_of_diffusers(steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(steps)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    path, z = Table(kept.sqrt(), (1 - kept).sqrt()), normal(64)
    generator = torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        x_0 = exact_x_0(path, z, torch.tensor(i))[:, None]
        z = scheduler.step(x_0, timestep, z[:, None], generator=generator).prev_sample[:, 0]
    generator.manual_seed(0)
    noise = lambda _: torch.randn(64, dtype=torch.float64, generator=generator)  # noqa: E731
    ours = follow(SOLVERS["ancestral"], path, steps=steps, noise=noise)
    assert (ours - z).abs().max() < 1e-4


def test_euler_on_flow_equals_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    path = Table(1 - sigmas, sigmas)
    theirs = drive(scheduler, path, normal(64), steps=steps, prediction=lambda i, z, x_0: (z - x_0) / sigmas[i])
    ours = follow(SOLVERS["ddim"], path, steps=steps)
    assert (ours - theirs).abs().max() < 1e-5


def test_heun_on_flow_equals_diffusers(steps):
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    path, z = Table(1 - sigmas, sigmas), normal(64)
    order = [0, *(i for i in range(1, steps) for _ in (0, 1))]  # which sigma each of its half steps stands at
    for index, timestep in zip(order, scheduler.timesteps, strict=True):
        slope = (z - exact_x_0(path, z, torch.tensor(index))) / sigmas[index]
        z = scheduler.step(slope, timestep, z).prev_sample
    ours = follow(Heun(), path, steps=steps)
    assert (ours - z).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_dpm_solver_2m_equals_diffusers(steps, kind):
    from diffusers import DPMSolverMultistepScheduler

    more = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if kind == "flow" else {}
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, **{"prediction_type": "sample", **more}
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    alphas = 1 / (1 + sigmas**2).sqrt()
    path = Table(1 - sigmas, sigmas) if kind == "flow" else Table(alphas, alphas * sigmas)

    def predicted(i, z, x_0):
        return (z - x_0) / sigmas[i] if kind == "flow" else x_0

    theirs = drive(scheduler, path, normal(64), steps=steps, prediction=predicted)
    ours = follow(SOLVERS["dpm++2m"], path, steps=steps)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: solver_from_name("dpm2m"), "unknown solver 'dpm2m'.*Did you mean 'dpm\\+\\+2m'"),
        (lambda: gaussian_schedule("sqrt").even_times(0), "steps must be at least 1; got 0"),
        (lambda: Ancestral(eta=1.5), "eta must be in"),
        (lambda: Churn(gamma=-1.0), "gamma must be a number and not negative"),
        (lambda: solver_from_name("heun", eta=0.5), "eta is the noise of ancestral and churn; got eta 0.5 for heun"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
