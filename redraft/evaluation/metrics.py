"""Measures of texts and of samples: pure functions."""

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Estimate, without bias, the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Raises ValueError where k exceeds the samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(
            f"pass@k needs 1 <= k <= samples and 0 <= right <= samples; got k={k}, {num_samples} samples, "
            f"{num_right} right. Draw more samples or lower k."
        )
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def vote(answers: Sequence[T]) -> T:
    """Return the most frequent answer, of equally frequent ones the first (self-consistency, arXiv 2203.11171)."""
    if not answers:
        raise ValueError("there are no answers to choose from.")
    return Counter(answers).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    values: Sequence[float], *, weights: Sequence[float] | None = None, rounds: int = 2000, seed: int = 0
) -> Interval:
    """Give the mean of values over items a percentile interval. For a paired test pass the items' differences.

    With weights the mean is the sum of the values over that of the weights (texts of unequal length).
    """
    if not values:
        raise ValueError("there is nothing to average: no item was scored.")
    draw = random.Random(seed)
    pairs = list(zip(values, weights or [1.0] * len(values), strict=True))
    means = sorted(_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(rounds))
    low, high = means[round(0.025 * rounds)], means[round(0.975 * rounds) - 1]
    return Interval(mean=_ratio(pairs), low=low, high=high, count=len(pairs))


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of similar confidence."""

    confidence: float
    """Mean confidence of the model."""
    right: float
    """Share that was right."""
    count: int


def calibration(pairs: Sequence[tuple[float, float]], *, num_bins: int = 10) -> list[Bin]:
    """Sort (confidence, right) pairs into bins of equal width: a calibrated model is right as often as it says."""
    rows: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for confidence, right in pairs:
        rows[min(int(confidence * num_bins), num_bins - 1)].append((confidence, right))
    means = [(fmean(c for c, _ in row), fmean(r for _, r in row), len(row)) for row in rows if row]
    return [Bin(confidence=confidence, right=right, count=count) for confidence, right, count in means]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Average |confidence - right| over all predictions (expected calibration error, arXiv 1706.04599)."""
    return sum(b.count * abs(b.confidence - b.right) for b in bins) / sum(b.count for b in bins)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return math.fsum(value for value, _ in pairs) / math.fsum(weight for _, weight in pairs)


RATIOS: dict[str, Callable[[float], float]] = {
    "nats_per_token": lambda nats: -nats,
    "bits_per_byte": lambda nats: -nats / math.log(2),
    "byte_perplexity": lambda nats: math.exp(-nats),
    "word_perplexity": lambda nats: math.exp(-nats),
}
"""Scores of whole texts, as functions of the log-likelihood in nats per token, byte, byte and word."""


def ratio_score(name: str, pairs: Sequence[Sequence[float]]) -> Interval:
    """Score texts of unequal length together, by pairs of log-likelihood in nats and length."""
    nats, sizes = zip(*pairs, strict=True)
    mean, score = bootstrap(nats, weights=sizes), RATIOS[name]
    low, high = score(mean.high), score(mean.low)  # a higher likelihood is a lower perplexity
    return Interval(mean=score(mean.mean), low=low, high=high, count=mean.count)
