"""Solvers of Gaussian diffusion, from noise to data along a grid of times. They never see a network.

A solver is a coroutine: it yields (z_t, t) where it wants an estimate of x_0, is sent one, and returns the latents at
the last time. Whoever drives it decides what answers: a network, guidance, an exact formula. It knows a process only
by alpha, sigma and the inverse of the log-SNR, so it serves every schedule and every parametrisation.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import unknown_name
from redraft.schedules import GaussianPath

Queries = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
"""Yields (z_t, t), is sent x_0, returns the latents at the last time."""

Noise = Callable[[int], Tensor]
"""Standard normal numbers of the latents' shape for a step."""


@runtime_checkable
class Solver(Protocol):
    """Steps from times[0] to times[-1]; `noise` is asked only by solvers that are random."""

    def __call__(
        self, path: GaussianPath, z: Float[Tensor, "*shape"], times: Float[Tensor, "steps_and_one"], *, noise: Noise
    ) -> Queries: ...


def solve(
    solver: Solver,
    path: GaussianPath,
    denoise: Callable[[Tensor, Tensor], Tensor],
    z: Float[Tensor, "*shape"],
    times: Float[Tensor, "steps_and_one"],
    *,
    noise: Noise,
) -> Float[Tensor, "*shape"]:
    """Drive a solver with a function (z_t, t) -> x_0."""
    queries = solver(path, z, times, noise=noise)
    try:
        query = next(queries)
        while True:
            query = queries.send(denoise(*query))
    except StopIteration as end:
        latents: Tensor = end.value
        return latents


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """DDIM (eta = 0, arXiv 2010.02502, Eq. 12) to DDPM's posterior (eta = 1, arXiv 2006.11239, Eq. 6).

        var = eta^2 (sigma_s^2 / sigma_t^2) (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)
        z_s = alpha_s x_0 + sqrt(sigma_s^2 - var) eps + sqrt(var) n

    On the flow path, eta = 0 is Euler's method.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}. 0 is DDIM, 1 ancestral sampling.")

    def __call__(self, path: GaussianPath, z: Tensor, times: Tensor, *, noise: Noise) -> Queries:
        alphas, sigmas = _coefficients(path, times, z)
        for i in range(len(times) - 1):
            x_0 = yield z, times[i]
            alpha_t, alpha_s, sigma_t, sigma_s = alphas[i], alphas[i + 1], sigmas[i], sigmas[i + 1]
            eps = (z - alpha_t * x_0) / sigma_t
            if self.eta == 0:
                z = alpha_s * x_0 + sigma_s * eps
                continue
            step_var = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0)
            var = self.eta**2 * (sigma_s / sigma_t) ** 2 * step_var
            z = alpha_s * x_0 + (sigma_s**2 - var).clamp(min=0).sqrt() * eps + var.sqrt() * noise(i)
        return z


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method on dz/dtau = (z - x_0) / tau, in flow coordinates (tau = sigma / (alpha + sigma)); last step Euler.

    There every schedule's equation is bounded at both ends: in z / alpha it explodes near t = 1, and in t where a
    schedule's derivative does (sqrt). For the flow schedule, tau is t.
    """

    def __call__(self, path: GaussianPath, z: Tensor, times: Tensor, *, noise: Noise) -> Queries:
        sums, taus = _flow_coordinates(path, times, z)
        z = z / sums[0]
        for i in range(len(times) - 1):
            width = taus[i + 1] - taus[i]
            slope = (z - (yield z * sums[i], times[i])) / taus[i]
            ahead = z + width * slope
            if i + 2 < len(times):
                slope = (slope + (ahead - (yield ahead * sums[i + 1], times[i + 1])) / taus[i + 1]) / 2
            z = z + width * slope
        return z * sums[-1]


@dataclass(frozen=True, kw_only=True)
class Midpoint:
    """The midpoint method in the flow coordinates of `Heun`: two estimates for each step."""

    def __call__(self, path: GaussianPath, z: Tensor, times: Tensor, *, noise: Noise) -> Queries:
        sums, taus = _flow_coordinates(path, times, z)
        middles = (taus[1:] + taus[:-1]) / 2
        between = path.inverse(2 * torch.logit(1 - middles.to(times.dtype)))
        middle_sums, _ = _flow_coordinates(path, between, z)
        z = z / sums[0]
        for i in range(len(times) - 1):
            slope = (z - (yield z * sums[i], times[i])) / taus[i]
            half = z + (middles[i] - taus[i]) * slope
            slope = (half - (yield half * middle_sums[i], between[i])) / middles[i]
            z = z + (taus[i + 1] - taus[i]) * slope
        return z * sums[-1]


@dataclass(frozen=True, kw_only=True)
class DpmSolver2M:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2): second order from one estimate per step; ends are first order.

    z_s = (sigma_s / sigma_t) z - alpha_s (e^-h - 1) ((1 + r) x_0 - r x_0_before), r = h / (2 h_before), with h the
    step in log(alpha / sigma).
    """

    def __call__(self, path: GaussianPath, z: Tensor, times: Tensor, *, noise: Noise) -> Queries:
        alphas, sigmas = _coefficients(path, times, z)
        steps = (alphas / sigmas).log().diff()  # (steps,); infinite where alpha or sigma is 0
        before = z
        for i in range(len(times) - 1):
            x_0 = yield z, times[i]
            is_first_order = i == 0 or i + 2 == len(times)
            blend = x_0 if is_first_order else torch.lerp(before, x_0, 1 + steps[i] / (2 * steps[i - 1]))
            ratio = sigmas[i + 1] / sigmas[i]
            z = ratio * z + (alphas[i + 1] - alphas[i] * ratio) * blend
            before = x_0
        return z


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Euler's method in flow coordinates, each step from a noisier point: 1 - tau falls by `gamma` / steps of itself.

    The added noise is the process' own, so the marginals are kept and the method converges. (ELF's rule
    z <- a z + (1 - a) n keeps too little noise and does not.)
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be a number and not negative; got {self.gamma}. 0 is DDIM.")

    def __call__(self, path: GaussianPath, z: Tensor, times: Tensor, *, noise: Noise) -> Queries:
        _, taus = _flow_coordinates(path, times, z)
        keep = max(1 - self.gamma / (len(times) - 1), 0.0)
        signal = torch.cat([1 - taus[:1], keep * (1 - taus[1:-1])])  # the first step has no room for more noise
        starts = path.inverse(2 * torch.logit(signal.to(times.dtype)))
        alphas, sigmas = _coefficients(path, times, z)
        start_alphas, start_sigmas = _coefficients(path, starts, z)
        for i in range(len(times) - 1):
            if i and self.gamma:
                kept = start_alphas[i] / alphas[i]
                z = kept * z + (start_sigmas[i] ** 2 - (kept * sigmas[i]) ** 2).clamp(min=0).sqrt() * noise(i)
            x_0 = yield z, starts[i]
            z = alphas[i + 1] * x_0 + sigmas[i + 1] * (z - start_alphas[i] * x_0) / start_sigmas[i]
        return z


SOLVERS: dict[str, Solver] = {
    "ddim": Ancestral(eta=0.0),
    "ancestral": Ancestral(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "dpm++2m": DpmSolver2M(),
    "churn": Churn(),
}
ESTIMATES = {"heun": 2, "midpoint": 2}
"""Estimates of x_0 in a step, where there is not one."""


def solver_from_name(name: str, *, eta: float | None = None) -> Solver:
    """Return a solver by its name; `eta` is ancestral's, or churn's gamma.

    Raises ValueError that lists the names, or the solvers that have an eta.
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    if eta is None:
        return SOLVERS[name]
    if name not in ("ancestral", "churn"):
        raise ValueError(f"eta is the noise of ancestral and churn; got eta {eta} for {name}. Leave it out.")
    return Ancestral(eta=eta) if name == "ancestral" else Churn(gamma=eta)


def _coefficients(path: GaussianPath, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate alpha and sigma in the precision of the times, then move them to the latents."""
    return path.alpha(times).to(z), path.sigma(times).to(z)


def _flow_coordinates(path: GaussianPath, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha + sigma and tau = sigma / (alpha + sigma)."""
    alpha, sigma = path.alpha(times), path.sigma(times)
    return (alpha + sigma).to(z), (sigma / (alpha + sigma)).to(z)
