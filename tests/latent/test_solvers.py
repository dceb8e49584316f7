"""Solvers against the exact denoiser of a mixture of two Gaussians, and against diffusers."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from redraft.latent.solvers import SOLVERS
from redraft.schedules import FlowSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' tables

MEANS, STD = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.3
FLOW = FlowSchedule()


def exact_x_0(z, alpha, sigma):
    """E[x_0 | z_t] where x_0 is -1 or 1 with equal odds, plus noise of std 0.3."""
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


def distance(name, *, steps, count=4000):
    """Wasserstein-1 between what the solver makes and the mixture."""
    times = FLOW.grid(steps)
    alphas, sigmas = FLOW.alpha(times), FLOW.sigma(times)
    made = SOLVERS[name](lambda z, i: exact_x_0(z, alphas[i], sigmas[i]), normal(count), alphas, sigmas)
    return float((made.sort().values - mixture(count)).abs().mean())


@pytest.mark.parametrize(("name", "steps", "bound"), [("ddim", 50, 0.03), ("dpm++2m", 20, 0.06)])
def test_flow_reaches_the_mixture(name, steps, bound):
    assert distance(name, steps=steps) <= bound


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_converges(name):
    fine, coarse = distance(name, steps=40), distance(name, steps=4)
    assert fine < 0.7 * coarse
    assert fine < 0.03


@pytest.mark.parametrize("name", SOLVERS)
def test_vp_and_flow_are_one_process_in_other_coordinates(name):
    """z_flow = z_vp / (alpha + sigma) all the way to the end, where both are the data."""
    times = FLOW.grid(7)
    alphas, sigmas = FLOW.alpha(times), FLOW.sigma(times)
    norm = (alphas**2 + sigmas**2).sqrt()
    vp = alphas / norm, sigmas / norm  # at the same log-SNRs
    flow_made, vp_made = (
        SOLVERS[name](lambda z, i, a=a, s=s: exact_x_0(z, a[i], s[i]), normal(64), a, s)
        for a, s in ((alphas, sigmas), vp)
    )
    assert (flow_made - vp_made).abs().max() < 1e-6


@dataclass(frozen=True)
class Table:
    """Alphas and sigmas read from diffusers' tables."""

    alphas: Tensor
    sigmas: Tensor

    def estimate(self, z, i):
        return exact_x_0(z, self.alphas[i], self.sigmas[i])

    def follow(self, name):
        """Run a solver of ours along the table, on the exact denoiser."""
        return SOLVERS[name](self.estimate, normal(64), self.alphas, self.sigmas)


def drive(scheduler, path, z, *, prediction, steps):
    """Run a scheduler of diffusers on the exact denoiser; `prediction` turns x_0 into what it expects."""
    for i, timestep in enumerate(scheduler.timesteps):
        z = scheduler.step(prediction(i, z, path.estimate(z, i)), timestep, z).prev_sample
    assert len(scheduler.timesteps) == steps
    return z


@pytest.fixture(params=[4, 20])
def steps(request):
    return request.param


def test_ddim_equals_diffusers(steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    path = Table(kept.sqrt(), (1 - kept).sqrt())
    theirs = drive(scheduler, path, normal(64), steps=steps, prediction=lambda i, z, x_0: x_0)
    assert (path.follow("ddim") - theirs).abs().max() < 1e-5


def test_euler_on_flow_equals_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    path = Table(1 - sigmas, sigmas)
    theirs = drive(scheduler, path, normal(64), steps=steps, prediction=lambda i, z, x_0: (z - x_0) / sigmas[i])
    assert (path.follow("ddim") - theirs).abs().max() < 1e-5


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
    assert (path.follow("dpm++2m") - theirs).abs().max() < 1e-5
