"""Which tokens of a continuation are masked in each sample, and what a sample weighs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from redraft.likelihood.control import controlled
from redraft.randomness import uniform

DRAW_STRATUM, DRAW_ORDER = 0, 1
COMMON_VARIANCE = 0.1  # of all tokens under one mask together, in variances of one token


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks of a continuation and their weights: the bound is sum_r weight_r * sum of log p over mask r."""

    is_masked: Bool[Tensor, "samples l"]
    weight: Float[Tensor, "samples"]
    is_exact: bool = False


def draw_masks(
    length: int, samples: int, *, key: int, number: int = 0, seed: int = 0, scheme: str = "weighted", most: int = 0
) -> Masks:
    """Draw the masks of one round, or list all of them where they are at most `most`.

    Equal (seed, key, number) give equal strata and orders at every length.
    """
    if 2 ** min(length, 62) - 1 <= most:
        return _all_masks(length)
    index = torch.arange(samples)
    stratum = uniform(seed, key, number, index, DRAW_STRATUM)
    order = uniform(seed, key, number, index[:, None], torch.arange(length), DRAW_ORDER).argsort(dim=1).argsort(dim=1)
    u = stratum if scheme == "independent" else (index + stratum) / samples
    p = _density(length) if scheme == "weighted" else torch.full((length,), 1 / length, dtype=torch.float64)
    count = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=length - 1) + 1
    if scheme == "antithetic":
        half = samples // 2
        count = torch.cat([count[:half], length + 1 - count[:half]])
        order = torch.cat([order[:half], length - 1 - order[:half]])
    return Masks(is_masked=order < count[:, None], weight=1 / (p[count - 1] * count * samples))


def _density(length: int) -> Float[Tensor, "l"]:
    """Draw a count as often as its samples spread: the mean over few masked tokens is the noisiest (Neyman, 1934)."""
    count = torch.arange(1, length + 1, dtype=torch.float64)
    spread = (1 / count - 1 / length + COMMON_VARIANCE).sqrt()
    return spread / spread.sum()


def _all_masks(length: int) -> Masks:
    """List every mask of a short continuation, weighed by its probability."""
    code = torch.arange(1, 2**length)
    is_masked = (code[:, None] >> torch.arange(length)) % 2 == 1
    count = is_masked.sum(dim=1)
    subsets = torch.tensor([math.comb(length, n) for n in range(length + 1)], dtype=torch.float64)
    return Masks(is_masked=is_masked, weight=1 / (count * subsets[count]), is_exact=True)


def units_of(
    nats: Float[Tensor, "samples l"], masks: Masks, num_units: int, *, control: bool
) -> Float[Tensor, "units"]:
    """Combine weighted samples into units whose mean is the estimate: single samples, antithetic pairs, or the sum."""
    values = nats.sum(dim=1) * masks.weight
    if masks.is_exact:
        return values.sum().expand(num_units)
    if control and nats.isfinite().all():
        unit = torch.arange(len(values)) % num_units
        values = controlled(nats, masks.is_masked, masks.weight, unit=unit)
    return values.view(-1, num_units).sum(dim=0) * num_units
