"""Control variates: most of what a masked token's log-probability is can be foretold from other samples.

Some tokens are hard under every mask, and all are harder the more is masked around them. A linear model

    h_i(M) = a_i + b . x_i(M),    x_i = (share of the others masked, is the left one masked, is the right one) - 1/2

is fitted to the samples of other folds, and so knows nothing of the mask it is applied to: taking h away from every
log-probability and adding its mean leaves the estimate unbiased. That mean is the sum of a_i alone: over a uniform
count, every other token is masked with probability 1/2.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FOLDS = 4
TOKEN_PRIOR, SLOPE_PRIOR = 0.5, 5.0  # in observations: a_i and b are drawn towards the mean token and 0


def controlled(
    nats: Float[Tensor, "samples l"],
    is_masked: Bool[Tensor, "samples l"],
    weight: Float[Tensor, "samples"],
    *,
    unit: Int[Tensor, "samples"],
) -> Float[Tensor, "samples"]:
    """Evaluate weighted sums over masks with most of their variance taken off; their sum is the estimate.

    Samples of one `unit` depend on each other, and share a fold.
    """
    x = _features(is_masked)
    fold = unit % min(FOLDS, int(unit.max()) + 1)
    values = torch.zeros_like(weight)
    for number in fold.unique().tolist():
        here = fold == number
        token, slope = _fit(nats[~here], x[~here], is_masked[~here].double())
        rest = (nats[here] - token - x[here] @ slope) * is_masked[here]
        values[here] = weight[here] * rest.sum(dim=1) + token.sum() / len(weight)
    return values


def _features(is_masked: Bool[Tensor, "samples l"]) -> Float[Tensor, "samples l 3"]:
    """Describe what is masked around each token, with mean 0 over all masks that hold it; 0 beyond the ends."""
    other = is_masked.double() - 0.5
    share = (other.sum(dim=1, keepdim=True) - other) / max(1, is_masked.shape[1] - 1)
    left, right = torch.zeros_like(other), torch.zeros_like(other)
    left[:, 1:], right[:, :-1] = other[:, :-1], other[:, 1:]
    return torch.stack([share, left, right], dim=-1)


def _fit(
    y: Float[Tensor, "samples l"], x: Float[Tensor, "samples l p"], is_masked: Float[Tensor, "samples l"]
) -> tuple[Float[Tensor, "l"], Float[Tensor, "p"]]:
    """Fit (a, b) by ridge regression on the masked tokens, a eliminated first."""
    mean = (y * is_masked).sum() / is_masked.sum()
    y, x = (y - mean) * is_masked, x * is_masked[..., None]
    shrunk = is_masked.sum(dim=0) + TOKEN_PRIOR
    sum_x, sum_y = x.sum(dim=0), y.sum(dim=0)  # of each token: (l, p), (l,)
    xx = torch.einsum("slp,slq->pq", x, x) - torch.einsum("lp,lq->pq", sum_x / shrunk[:, None], sum_x)
    xy = torch.einsum("slp,sl->p", x, y) - sum_x.T @ (sum_y / shrunk)
    slope = torch.linalg.solve(xx + SLOPE_PRIOR * torch.eye(len(xy), dtype=xx.dtype), xy)
    return mean + (sum_y - sum_x @ slope) / shrunk, slope
