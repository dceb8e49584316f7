"""What sampling has shown so far: means, their errors, and which choices of a question are beaten."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from torch import Tensor

Rounds = Sequence[Tensor]
"""Of each round of sampling, independent values (units,) whose mean is the estimate; rounds differ in their number."""


def mean_and_variance(rounds: Rounds) -> tuple[float, float]:
    """Average units over rounds; return it and its variance, by successive differences of neighbouring strata.

    Neighbours differ in the means of their strata too, so the variance is overestimated on average; the single estimate
    may well be too small, with few units above all (collapsed strata: Cochran, Sampling Techniques, Section 5A.12).
    Where all masks were summed the units are equal, and the variance is 0.
    """
    total = sum(len(units) for units in rounds)
    mean = sum(float(units.sum()) for units in rounds) / total
    variance = 0.0
    for units in rounds:
        squares = float((units[1:] - units[:-1]).square().sum()) / (2 * (len(units) - 1))
        variance += squares * len(units) / total**2
    return mean, variance


def undecided(
    choices: Mapping[int, Rounds], scales: Sequence[Sequence[float]], *, confidence: float, looks: int, rivals: int
) -> set[int]:
    """Find the choices to sample on: not those beaten in every ranking, and none once every ranking's best is known.

    A ranking divides the estimates by one of the scales (1, or lengths). Beaten means: the paired difference to the
    best one is further from 0 than its t quantile, shared among `rivals` and `looks` (Bonferroni).
    """
    tail = (1 - confidence) / (max(1, rivals) * looks)
    beaten = [
        _beaten({i: [units / scale[i] for units in rounds] for i, rounds in choices.items()}, tail=tail)
        for scale in scales
    ]
    if rivals and all(len(losers) == len(choices) - 1 for losers in beaten):
        return set()
    return {i for i in choices if not all(i in losers for losers in beaten)}


def _beaten(choices: Mapping[int, Rounds], *, tail: float) -> set[int]:
    """Find the choices whose paired difference to the best one is beyond doubt."""
    best = max(choices, key=lambda i: mean_and_variance(choices[i])[0])
    quantile = _t_quantile(1 - tail, sum(len(units) - 1 for units in choices[best]))
    found = set()
    for rival in set(choices) - {best}:
        mean, variance = mean_and_variance([a - b for a, b in zip(choices[best], choices[rival], strict=True)])
        if mean > quantile * math.sqrt(variance):
            found.add(rival)
    return found


def _t_quantile(p: float, freedom: int) -> float:
    """Approximate a quantile of Student's t (the first terms of Cornish and Fisher's expansion)."""
    z = NormalDist().inv_cdf(p)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
