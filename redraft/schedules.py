"""Noise schedules, t in [0, 1], 0 clean, 1 noise. Discrete diffusion: alpha(t) = P(a token is still clean at time t).

Gaussian diffusion (at the end): z_t = alpha(t) x_0 + sigma(t) eps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
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


@runtime_checkable
class GaussianPath(Protocol):
    """What a solver asks of a Gaussian schedule: z_t = alpha(t) x_0 + sigma(t) eps."""

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
    def inverse(self, log_snr: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


@dataclass(frozen=True, kw_only=True)
class GaussianSchedule:
    """A curve of the log-SNR lambda(t) = 2 log(alpha / sigma), falling from data (t = 0) to noise (t = 1), and a path.

    The path says what alpha and sigma sum to: "vp", alpha^2 + sigma^2 = 1 (variance preserving), or "flow",
    alpha + sigma = 1. Both are one process in other coordinates: z_flow = z_vp / (alpha_vp + sigma_vp).
    """

    curve: str = "flow"
    path: str = "flow"
    shift: float = 1.0
    """Moves lambda by 2 log(shift): below 1 is noisier. tan-d of TEncDM is shift 1 / d, the timestep shift s of SD3 is
    shift 1 / s, the noise scale k of ELF is shift 1 / k."""

    def __post_init__(self) -> None:
        if self.curve not in _CURVES:
            raise unknown_name("Gaussian schedule", self.curve, _CURVES)
        if self.path not in ("vp", "flow"):
            raise unknown_name("path", self.path, ("vp", "flow"))
        if not 0 < self.shift < math.inf:
            raise ValueError(
                f"shift must be positive and finite; got {self.shift}. Use 1 for none, less for more noise."
            )

    def log_snr(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _CURVES[self.curve].log_snr(t) + 2 * math.log(self.shift)

    def log_snr_derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _CURVES[self.curve].derivative(t)

    def inverse(self, log_snr: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _CURVES[self.curve].inverse(log_snr - 2 * math.log(self.shift))

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._part(self.log_snr(t))

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._part(-self.log_snr(t))

    def even_times(self, steps: int, *, start: float = 1.0) -> Float[Tensor, "steps_and_one"]:
        """Lay times from `start` to 0, evenly spaced in the curve's flow time tau = sigma / (alpha + sigma); float64.

        For the flow curve that is uniform t. In flow coordinates every curve's equation is the same, so a solver makes
        the same error on all of them; uniform t would not suit those that fall steeply (sqrt). `shift` moves no times.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}.")
        curve, first = _CURVES[self.curve], torch.tensor(start, dtype=torch.float64)
        if self.curve == "flow":
            return torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)
        taus = torch.linspace(float((-curve.log_snr(first) / 2).sigmoid()), 0.0, steps + 1, dtype=torch.float64)
        inner = curve.inverse(2 * torch.logit(1 - taus[1:-1]))
        return torch.cat([first[None], inner, taus[-1:]])

    def _part(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (log_ratio / 2).sigmoid() if self.path == "flow" else log_ratio.sigmoid().sqrt()


def gaussian_schedule(name: str, *, shift: float = 1.0) -> GaussianSchedule:
    """Build a Gaussian schedule by name: flow, or variance preserving cosine, linear-beta, sqrt, sigmoid."""
    return GaussianSchedule(curve=name, path="flow" if name == "flow" else "vp", shift=shift)


@dataclass(frozen=True)
class _Curve:
    """lambda(t), its derivative and its inverse."""

    log_snr: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


_BETA_0, _BETA_1 = 0.1, 20.0  # DDPM's in continuous time (arXiv 2011.13456, Appendix B)
_SQRT_OFFSET = 1e-4
_SQRT_RANGE = math.sqrt(1 + _SQRT_OFFSET) - math.sqrt(_SQRT_OFFSET)
_SIGMOID_STEEPNESS = 1.5


def _beta_integral(t: Tensor) -> Tensor:
    return t * (_BETA_0 + t * (_BETA_1 - _BETA_0) / 2)


def _beta_inverse(log_snr: Tensor) -> Tensor:
    integral = F.softplus(-log_snr)
    return 2 * integral / (_BETA_0 + torch.sqrt(_BETA_0**2 + 2 * (_BETA_1 - _BETA_0) * integral))


def _sqrt_noise(t: Tensor) -> Tensor:
    return ((torch.sqrt(t + _SQRT_OFFSET) - math.sqrt(_SQRT_OFFSET)) / _SQRT_RANGE).clamp(0, 1)  # rounding


def _sqrt_derivative(t: Tensor) -> Tensor:
    noise = _sqrt_noise(t)
    return -1 / (2 * _SQRT_RANGE * torch.sqrt(t + _SQRT_OFFSET) * noise * (1 - noise))


_CURVES = {
    # alpha = 1 - t, sigma = t: linear interpolation, rectified flow
    "flow": _Curve(lambda t: 2 * torch.logit(1 - t), lambda t: -2 / (t * (1 - t)), lambda lam: (-lam / 2).sigmoid()),
    # alpha = cos(pi t / 2): arXiv 2102.09672 without its offset
    "cosine": _Curve(
        lambda t: 2 * (torch.cos(math.pi / 2 * t).clamp(min=0).log() - torch.sin(math.pi / 2 * t).log()),
        lambda t: -2 * math.pi / torch.sin(math.pi * t),
        lambda lam: 2 / math.pi * torch.atan(torch.exp(-lam / 2)),
    ),
    # alpha^2 = exp(-integral of beta): keeps alpha(1) = 0.0066
    "linear-beta": _Curve(
        lambda t: -torch.log(torch.expm1(_beta_integral(t))),
        lambda t: (_BETA_0 + t * (_BETA_1 - _BETA_0)) / torch.expm1(-_beta_integral(t)),
        _beta_inverse,
    ),
    # alpha^2 = 1 - sqrt(t + 1e-4) (Diffusion-LM, arXiv 2205.14217). Differs: rescaled to reach 1 and 0 exactly
    "sqrt": _Curve(
        lambda t: -torch.logit(_sqrt_noise(t)),
        _sqrt_derivative,
        lambda lam: ((-lam).sigmoid() * _SQRT_RANGE + math.sqrt(_SQRT_OFFSET)) ** 2 - _SQRT_OFFSET,
    ),
    # alpha^2 = sigmoid(-1.5 logit t) (LCM, arXiv 2412.08821)
    "sigmoid": _Curve(
        lambda t: -_SIGMOID_STEEPNESS * torch.logit(t),
        lambda t: -_SIGMOID_STEEPNESS / (t * (1 - t)),
        lambda lam: (-lam / _SIGMOID_STEEPNESS).sigmoid(),
    ),
}  # fmt: skip
GAUSSIAN_SCHEDULES = tuple(_CURVES)
