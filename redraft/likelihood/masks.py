"""Which tokens of a continuation are masked in each sample, and the estimate that the samples give together.

Two ideas lower the variance of LLaDA's estimator (`redraft.likelihood`); benchmarks/evaluation.py measures both and
their alternatives.

Counts. How many tokens a sample masks is stratified over the samples. Small counts are drawn more often, because the
mean over few masked tokens varies most (Neyman, 1934).

Control variates. Some tokens are hard under every mask, and all are harder the more is masked around them. A linear
model of a token's log-probability,

    h_i(M) = a_i + b . x_i(M),    x_i = (share of the others masked, is the left one masked, is the right one) - 1/2

is subtracted from each log-probability, and its mean is added back. The estimate stays unbiased, because h is fitted to
other samples than those it is applied to (cross-fitting over FOLDS). The mean of h is the sum of a_i alone: over a
uniform count, every other token is masked with probability 1/2.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from redraft.randomness import uniform

DRAW_STRATUM, DRAW_ORDER = 0, 1
COMMON_VARIANCE = 0.1  # variance that all tokens under one mask share, in variances of one token
FOLDS = 4
TOKEN_PRIOR, SLOPE_PRIOR = 0.5, 5.0  # in observations: a_i shrinks towards the mean token, b towards 0


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks of a continuation and their weights: the bound is sum_r weight_r * sum of log p over mask r."""

    is_masked: Bool[Tensor, "samples l"]
    weight: Float[Tensor, "samples"]
    is_exact: bool = False
    """These are all masks, so the bound has no error."""

    def estimate(self, nats: Float[Tensor, "samples l"]) -> tuple[float, float]:
        """Return the bound and the variance of its estimate. `nats` is log p of each masked token, 0 at the others.

        The variance is taken from successive differences of neighbouring strata. Their means differ too, so it is
        overestimated on average; with few samples it can come out too small (collapsed strata: Cochran, Sampling
        Techniques, Section 5A.12).
        """
        values, count = nats.sum(dim=1) * self.weight, len(nats)
        if self.is_exact:
            return float(values.sum()), 0.0
        if nats.isfinite().all():
            values = _controlled(nats, self.is_masked, self.weight)
        values = values * count  # each is an estimate of the bound by one sample
        variance = float((values[1:] - values[:-1]).square().sum()) / (2 * (count - 1)) * count / count**2
        return float(values.sum()) / count, variance


def draw_masks(length: int, num_samples: int, *, key: int, seed: int = 0) -> Masks:
    """Draw masks, or list all of them where they are at most as many as the samples.

    Equal (seed, key) give equal strata and orders at every length.
    """
    if 2 ** min(length, 62) - 1 <= num_samples:
        return _all_masks(length)
    index = torch.arange(num_samples)
    u = (index + uniform(seed, key, 0, index, DRAW_STRATUM)) / num_samples
    order = uniform(seed, key, 0, index[:, None], torch.arange(length), DRAW_ORDER).argsort(dim=1).argsort(dim=1)
    counts = torch.arange(1, length + 1, dtype=torch.float64)
    spread = (1 / counts - 1 / length + COMMON_VARIANCE).sqrt()  # of the mean over a sample's masked tokens
    p = spread / spread.sum()
    count = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=length - 1) + 1
    return Masks(is_masked=order < count[:, None], weight=1 / (p[count - 1] * count * num_samples))


def _all_masks(length: int) -> Masks:
    """List every mask of a short continuation, weighed by its probability."""
    code = torch.arange(1, 2**length)
    is_masked = (code[:, None] >> torch.arange(length)) % 2 == 1
    count = is_masked.sum(dim=1)
    subsets = torch.tensor([math.comb(length, n) for n in range(length + 1)], dtype=torch.float64)
    return Masks(is_masked=is_masked, weight=1 / (count * subsets[count]), is_exact=True)


def _controlled(
    nats: Float[Tensor, "samples l"], is_masked: Bool[Tensor, "samples l"], weight: Float[Tensor, "samples"]
) -> Float[Tensor, "samples"]:
    """Return each sample's weighted sum with the control variate subtracted; their sum is the estimate."""
    x = _features(is_masked)
    fold = torch.arange(len(weight)) % FOLDS
    values = torch.zeros_like(weight)
    for number in range(FOLDS):
        here = fold == number
        token, slope = _fit(nats[~here], x[~here], is_masked[~here].double())
        rest = (nats[here] - token - x[here] @ slope) * is_masked[here]
        values[here] = weight[here] * rest.sum(dim=1) + token.sum() / len(weight)
    return values


def _features(is_masked: Bool[Tensor, "samples l"]) -> Float[Tensor, "samples l 3"]:
    """Compute x_i: what is masked around each token, with mean 0 over all masks that hold it; 0 beyond the ends."""
    other = is_masked.double() - 0.5
    share = (other.sum(dim=1, keepdim=True) - other) / max(1, is_masked.shape[1] - 1)
    left, right = torch.zeros_like(other), torch.zeros_like(other)
    left[:, 1:], right[:, :-1] = other[:, :-1], other[:, 1:]
    return torch.stack([share, left, right], dim=-1)


def _fit(
    y: Float[Tensor, "samples l"], x: Float[Tensor, "samples l p"], is_masked: Float[Tensor, "samples l"]
) -> tuple[Float[Tensor, "l"], Float[Tensor, "p"]]:
    """Fit (a, b) by ridge regression on the masked tokens: a in closed form given b, then b from the residuals."""
    mean = (y * is_masked).sum() / is_masked.sum()
    y, x = (y - mean) * is_masked, x * is_masked[..., None]
    shrunk = is_masked.sum(dim=0) + TOKEN_PRIOR
    sum_x, sum_y = x.sum(dim=0), y.sum(dim=0)  # of each token: (l, p), (l,)
    xx = torch.einsum("slp,slq->pq", x, x) - torch.einsum("lp,lq->pq", sum_x / shrunk[:, None], sum_x)
    xy = torch.einsum("slp,sl->p", x, y) - sum_x.T @ (sum_y / shrunk)
    slope = torch.linalg.solve(xx + SLOPE_PRIOR * torch.eye(len(xy), dtype=xx.dtype), xy)
    return mean + (sum_y - sum_x @ slope) / shrunk, slope
