"""Noise schedules, t in [0, 1], 0 clean, 1 noise. Discrete diffusion: alpha(t) = P(a token is still clean at time t).

Gaussian diffusion (at the end): z_t = alpha(t) x_0 + sigma(t) eps.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import unknown_name


@runtime_checkable
class Schedule(Protocol):
    """A decreasing alpha with alpha(0) = 1 and alpha(1) = 0, and its derivative in t."""

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


def weight(schedule: Schedule, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Weigh the cross-entropy of a noised token: -alpha'(t) / (1 - alpha(t)) (Eq. 10, arXiv 2406.07524)."""
    return -schedule.derivative(t) / (1 - schedule.alpha(t))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """alpha = 1 - t. LLaDA's schedule, and the one MDLM's code calls `loglinear`."""

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - t

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha = 1 - cos(pi (1 - t) / 2) (MaskGIT, arXiv 2202.04200; MDLM, arXiv 2406.07524)."""

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """alpha = 1 - t ** power (MD4, arXiv 2406.04329)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power must be positive; got {self.power}. Use 1 for the linear schedule.")

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - t**self.power

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -self.power * t ** (self.power - 1)


@dataclass(frozen=True, kw_only=True)
class Geometric:
    """alpha ~ exp(-sigma(t)), sigma = sigma_min^(1-t) sigma_max^t: log sigma is linear in t (SEDD, arXiv 2310.16834).

    Differs from SEDD: rescaled so that alpha(0) = 1 and alpha(1) = 0 exactly, because the likelihood bound covers
    all noise levels only then.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must lie in (0, sigma_max); got {self.sigma_min} and {self.sigma_max}.")

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        clean, noise = math.exp(-self.sigma_min), math.exp(-self.sigma_max)
        return (torch.exp(-self._sigma(t)) - noise) / (clean - noise)

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        clean, noise = math.exp(-self.sigma_min), math.exp(-self.sigma_max)
        rate = math.log(self.sigma_max / self.sigma_min)
        return -rate * self._sigma(t) * torch.exp(-self._sigma(t)) / (clean - noise)

    def _sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t


SCHEDULES: dict[str, type[Linear | Cosine | Polynomial | Geometric]] = {
    "linear": Linear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "geometric": Geometric,
    "log-linear": Geometric,
}


def schedule_from_name(name: str) -> Schedule:
    """Build a schedule from its name in a saved config. Raises ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return SCHEDULES[name]()


def stratified_times(
    index: Float[Tensor, "*shape"], *, total: int, offset: Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Spread times evenly over (0, 1]: t_i = (i + 1 - offset) / total, offset ~ U[0, 1).

    Together they cover every noise level, so an estimate of the loss has a smaller variance than with independent times
    (Appendix I.1, arXiv 2107.00630). `index` numbers the strata of a batch of `total` rows; each t_i is uniform over
    all of (0, 1] only if rows are given their strata at random.
    """
    return (index + 1 - offset) / total


@dataclass(frozen=True)
class FlowSchedule:
    """The Gaussian schedule alpha = 1 - t, sigma = t: linear interpolation, rectified flow (arXiv 2209.03003).

    Variance-preserving schedules are the same process in other coordinates: z_flow = z_vp / (alpha_vp + sigma_vp).
    alpha and sigma are sigmoids of the log-SNR, which is exact at both ends.
    """

    def log_snr(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return 2 log(alpha / sigma)."""
        return 2 * torch.logit(1 - t)

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (self.log_snr(t) / 2).sigmoid()

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (-self.log_snr(t) / 2).sigmoid()

    def grid(self, steps: int) -> Float[Tensor, "steps_and_one"]:
        """Return evenly spaced times from 1 to 0; float64."""
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
