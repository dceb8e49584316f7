"""Gaussian diffusion of continuous latents: z_t = alpha(t) x_0 + sigma(t) eps, with a time for every position."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import unknown_name
from redraft.schedules import FlowSchedule

Weighting = Literal["inverse-t", "unit", "elbo"]
TimeDensity = Literal["logit-normal", "uniform"]
FLOW = FlowSchedule()
LARGEST_WEIGHTED_T = 1 - 1e-6  # at 1 itself the ELBO's weight is infinity times 0


@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """The flow schedule, and how errors at different noise levels are weighted. The network predicts x_0."""

    weighting: str = "inverse-t"
    """Factor of the squared error of x_0. inverse-t: 1 / t. unit: 1. elbo: the likelihood bound of arXiv 2107.00630
    where times are uniform, except below `smallest_t`."""
    smallest_t: float = 0.05
    """Weights are evaluated at times of at least this, as they grow without bound towards t = 0."""

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise unknown_name("weighting", self.weighting, get_args(Weighting))

    def corrupt(
        self, x_0: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"], *, eps: Float[Tensor, "*shape dim"]
    ) -> Float[Tensor, "*shape dim"]:
        """Add noise at each position's own time; eps ~ N(0, 1)."""
        alpha, sigma = (part[..., None].to(x_0.dtype) for part in (FLOW.alpha(t), FLOW.sigma(t)))
        return alpha * x_0 + sigma * eps

    def loss(
        self, predicted: Float[Tensor, "*shape dim"], x_0: Float[Tensor, "*shape dim"], t: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Return the weighted squared error of each position, averaged over dimensions; float32."""
        error = (predicted - x_0).float().square().mean(-1)
        return error * self.weight(t).to(error.dtype)

    def weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the factor of the squared error of x_0."""
        t = t.clamp(min=self.smallest_t, max=LARGEST_WEIGHTED_T)
        if self.weighting == "unit":
            return torch.ones_like(t)
        if self.weighting == "elbo":  # -d(log-SNR)/dt SNR / 2
            return FLOW.log_snr(t).exp() / (t * (1 - t))
        sigma = FLOW.sigma(t)
        return (FLOW.alpha(t) + sigma) / sigma


def times_from_uniform(u: Float[Tensor, "*shape"], *, density: TimeDensity) -> Float[Tensor, "*shape"]:
    """Map u ~ U(0, 1), best stratified over the batch, to times.

    logit-normal: t = sigmoid(1 + n) with n ~ N(0, 1) (arXiv 2403.03206), which puts more times near the noise.
    """
    if density == "uniform":
        return u
    normal: Tensor = torch.special.ndtri(u)
    return (1 + normal).sigmoid()
