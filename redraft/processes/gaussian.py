"""Gaussian diffusion of continuous latents: z_t = alpha(t) x_0 + sigma(t) eps, with a time for every position."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from redraft.errors import unknown_name
from redraft.schedules import GaussianSchedule

PARAMETRIZATIONS = ("x0", "eps", "v", "flow")
LARGEST_WEIGHTED_T = 1 - 1e-6  # at 1 itself the ELBO's weight is infinity times 0
WEIGHTINGS = ("unit", "x0", "eps", "v", "flow", "inverse-t", "min-snr", "sigmoid", "elbo")


@dataclass(frozen=True, kw_only=True)
class NoisedLatents:
    """Clean latents x_0, noise eps, noised latents z_t, and the time of every position."""

    x_0: Float[Tensor, "*shape dim"]
    eps: Float[Tensor, "*shape dim"]
    z_t: Float[Tensor, "*shape dim"]
    t: Float[Tensor, "*shape"]


@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """A schedule, what the network predicts, and how errors at different noise levels are weighed.

    Parametrisations: "x0"; "eps"; "v" = alpha eps - sigma x_0 (arXiv 2202.00512); "flow" = eps - x_0. Conversions are
    exact for every path (Section 2 of docs/latent-thinking.md).
    """

    schedule: GaussianSchedule = field(default_factory=GaussianSchedule)
    parametrization: str = "x0"
    weighting: str = "unit"
    """unit: the squared error of the network's own target. x0, eps, v, flow: the squared error of that quantity,
    whatever is predicted. inverse-t: the x_0 error over the flow time. min-snr: gamma 5 (arXiv 2303.09556). elbo: the
    bound of arXiv 2107.00630 where times are uniform, but for `smallest_t`. sigmoid: sigmoid(-1 - lambda) times the eps
    error, as arXiv 2410.19324 has it for times uniform in the log-SNR lambda."""
    smallest_t: float = 0.05
    """Weights are evaluated at flow times of at least this, as they grow without bound towards t = 0."""

    def __post_init__(self) -> None:
        if self.parametrization not in PARAMETRIZATIONS:
            raise unknown_name("parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.weighting not in WEIGHTINGS:
            raise unknown_name("weighting", self.weighting, WEIGHTINGS)
        if not 0 < self.smallest_t < 1:
            raise ValueError(f"smallest_t must lie in (0, 1); got {self.smallest_t}. 0.05 is usual.")

    def corrupt(
        self, x_0: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"], *, eps: Float[Tensor, "*shape dim"]
    ) -> NoisedLatents:
        """Add noise at each position's own time; eps ~ N(0, 1)."""
        alpha, sigma = self.coefficients(t, like=x_0)
        return NoisedLatents(x_0=x_0, eps=eps, z_t=alpha * x_0 + sigma * eps, t=t)

    def noised_from(
        self, x_0: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"], *, z_t: Float[Tensor, "*shape dim"]
    ) -> NoisedLatents:
        """Take z_t as x_0 under the noise that leads there, as if `corrupt` had made it. (None does at sigma = 0.)"""
        alpha, sigma = self.coefficients(t, like=x_0)
        return NoisedLatents(x_0=x_0, eps=(z_t - alpha * x_0) / sigma, z_t=z_t, t=t)

    def target(
        self, x_0: Float[Tensor, "*shape dim"], eps: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape dim"]:
        """Return what the network should predict."""
        if self.parametrization == "v":
            alpha, sigma = self.coefficients(t, like=x_0)
            return alpha * eps - sigma * x_0
        return {"x0": x_0, "eps": eps, "flow": eps - x_0}[self.parametrization]

    def predict_x_0(
        self, output: Float[Tensor, "*shape dim"], z_t: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape dim"]:
        """Turn the network's output into an estimate of x_0. (From eps, there is none at alpha = 0.)"""
        alpha, sigma = self.coefficients(t, like=z_t)
        if self.parametrization == "eps":
            return (z_t - sigma * output) / alpha
        if self.parametrization == "v":
            return (alpha * z_t - sigma * output) / (alpha**2 + sigma**2)
        return output if self.parametrization == "x0" else (z_t - sigma * output) / (alpha + sigma)

    def start(self) -> float:
        """Return the time sampling begins at: 1, but an earlier one for eps, which says nothing of x_0 at alpha = 0."""
        if self.parametrization != "eps":
            return 1.0
        return min(1.0, float(self.schedule.inverse(torch.tensor(-2 * math.log(99.0)))))

    def loss(self, output: Float[Tensor, "*shape dim"], noised: NoisedLatents) -> Float[Tensor, "*shape"]:
        """Weigh the squared error of each position, averaged over dimensions; float32."""
        target = self.target(noised.x_0, noised.eps, noised.t)
        error = (output - target).float().square().mean(-1)
        return error if self.weighting == "unit" else error * self.weight(noised.t).to(error.dtype)

    def weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the factor that turns the squared error of the network's own target into the chosen weighting."""
        t = t.clamp(min=self._smallest(), max=LARGEST_WEIGHTED_T)
        if self.weighting == "unit":
            return torch.ones_like(t)
        return self._on_x_0(self.weighting, t) / self._on_x_0(self.parametrization, t)

    def _on_x_0(self, weighting: str, t: Tensor) -> Tensor:
        """Return w with w |x_0 error|^2 = the weighting's loss, at a fixed z_t."""
        alpha, sigma, log_snr = self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.log_snr(t)
        snr: Tensor = log_snr.exp()
        match weighting:
            case "x0":
                return torch.ones_like(t)
            case "eps":
                return snr
            case "v":
                return ((alpha**2 + sigma**2) / sigma).square()
            case "flow":
                return ((alpha + sigma) / sigma).square()
            case "inverse-t":
                return (alpha + sigma) / sigma
            case "min-snr":
                return snr.clamp(max=5)
            case "sigmoid":
                return snr * (-1 - log_snr).sigmoid()
            case _:
                return -self.schedule.log_snr_derivative(t) * snr / 2

    def coefficients(self, t: Float[Tensor, "*shape"], *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of each position, shaped (*shape, 1), in the dtype of `like`."""
        return self.schedule.alpha(t)[..., None].to(like.dtype), self.schedule.sigma(t)[..., None].to(like.dtype)

    def _smallest(self) -> float:
        flow_time = torch.tensor(self.smallest_t, dtype=torch.float64)
        return float(self.schedule.inverse(2 * torch.logit(1 - flow_time)))


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes:
    """t = sigmoid(mean + std n), n ~ N(0, 1) (arXiv 2403.03206); a positive mean puts more times near the noise."""

    mean: float = 1.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.std < math.inf and math.isfinite(self.mean)):
            raise ValueError(f"the times need a mean and a positive std; got {self.mean} and {self.std}. 1 is usual.")

    def __call__(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map u ~ U(0, 1), best stratified over the batch, to times."""
        normal: Tensor = torch.special.ndtri(u)
        return (self.mean + self.std * normal).sigmoid()


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """t = u."""

    def __call__(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return u


class AdaptiveTimes(nn.Module):
    """Draw times where the loss is: P(log-SNR bin) ~ the EMA of its loss (arXiv 2303.00848, Appendix F).

    Multiplied by `importance`, losses keep the mean that they have over times uniform in log-SNR, with less variance:
    they are flat in u. What is recorded in a step counts from the next one on, however its batch is split. The state
    is in buffers: a checkpoint carries it.
    """

    losses: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        schedule: GaussianSchedule,
        *,
        num_bins: int = 32,
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if num_bins < 2 or not 0 < decay < 1:
            raise ValueError(f"num_bins must be at least 2 and decay in (0, 1); got {num_bins} and {decay}.")
        self.schedule, self.num_bins, self.decay = schedule, num_bins, decay
        self.high, self.low = max(log_snr_range), min(log_snr_range)
        self._step: int | None = None
        self.register_buffer("losses", torch.ones(num_bins, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(num_bins, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_bins, dtype=torch.float64))

    def begin(self, step: int) -> None:
        """Let what an earlier step recorded move the mean loss of each bin that was drawn."""
        if step != self._step:
            rate = (1 - self.decay) * (self.counts > 0)
            self.losses += rate * (self.sums / self.counts.clamp(min=1) - self.losses)
            self.sums.zero_()
            self.counts.zero_()
            self._step = step

    def forward(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map u ~ U(0, 1) through the inverse of the piecewise linear distribution function; 0 is the cleanest."""
        heights = self._heights()
        share = heights / heights.sum()
        ends = share.cumsum(0)
        bin_ = torch.searchsorted(ends, u.to(ends.dtype).contiguous()).clamp(max=self.num_bins - 1)
        within = 1 - (ends[bin_] - u) / share[bin_]
        return self.schedule.inverse(self.high - (self.high - self.low) * (bin_ + within) / self.num_bins).to(u.dtype)

    def importance(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the density of times uniform in log-SNR over that of these."""
        heights = self._heights()
        return (heights.mean() / heights)[self._bins(t)].to(t.dtype)

    @torch.no_grad()
    def record(
        self, t: Float[Tensor, "*shape"], loss: Float[Tensor, "*shape"], *, where: Bool[Tensor, "*shape"]
    ) -> None:
        """Note the finite losses of the positions `where`, for the steps after this one."""
        is_counted = (where & loss.isfinite()).flatten()
        bin_ = self._bins(t).flatten()
        self.sums.scatter_add_(0, bin_, torch.where(is_counted, loss.flatten(), 0).to(self.sums.dtype))
        self.counts.scatter_add_(0, bin_, is_counted.to(self.counts.dtype))

    def _heights(self) -> Tensor:
        """The losses, but none so small that its bin is never seen again."""
        return self.losses.clamp(min=1e-3 * self.losses.mean())

    def _bins(self, t: Tensor) -> Tensor:
        place = (self.high - self.schedule.log_snr(t.double())) / (self.high - self.low) * self.num_bins
        return place.clamp(0, self.num_bins - 1).long()
