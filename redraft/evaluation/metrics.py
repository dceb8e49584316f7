"""Measures of texts and of samples: pure functions."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from redraft.language_model import LanguageModel
from redraft.models.query import Query

T = TypeVar("T", bound=Hashable)
Tokens = Sequence[Hashable]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A bound on the likelihood of whole texts, in the units that others report."""

    nats: float
    """Total log-likelihood, at most 0."""
    standard_error: float
    num_tokens: int
    num_words: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token; its exponential is the token perplexity."""
        return -self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer."""
        return -self.nats / self.num_bytes / math.log(2)

    @property
    def word_perplexity(self) -> float:
        """exp(nats / words), words split at white space."""
        return math.exp(-self.nats / self.num_words)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A point of the frontier: a low perplexity at a low entropy is repetition, neither says anything alone."""

    judge_nats_per_token: float
    """Under the judge's bound; its exponential is the generative perplexity."""
    unigram_entropy: float
    """Nats; of the tokens of each text, averaged over the texts."""


def quality(texts: Sequence[str], judge: LanguageModel, *, samples: int = 32) -> Quality:
    """Judge texts by another diffusion model, together with their entropy under its tokenizer."""
    kept = [text for text in texts if text]
    if not kept:
        raise ValueError(f"there is no text to judge: all {len(texts)} are empty.")
    found = [judge.loglikelihood("", text, samples=samples) for text in kept]
    tokens = [judge.encode(text).tolist() for text in kept]
    return Quality(
        judge_nats_per_token=-sum(one.nats for one in found) / sum(one.num_tokens for one in found),
        unigram_entropy=fmean(unigram_entropy(row) for row in tokens),
    )


def mauve(texts: Sequence[str], references: Sequence[str], judge: LanguageModel, *, seed: int = 0) -> float:
    """Compare two sets of texts as a whole: MAUVE in (0, 1], 1 for equal sets (arXiv 2102.01454, package mauve-text).

    A text's features are the judge's hidden states before its head, averaged over the tokens (the paper takes GPT-2
    large's at the last one): compare values of one judge only. Raises ValueError where the package is missing.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ValueError("MAUVE needs the package mauve-text: pip install mauve-text faiss-cpu.") from error
    sets = [[text for text in some if text] for some in (texts, references)]
    if min(map(len, sets)) < 2:
        raise ValueError(f"MAUVE compares sets of texts; got {len(sets[0])} and {len(sets[1])} that are not empty.")
    features = [torch.stack([_features(text, judge) for text in some]).numpy() for some in sets]
    return float(compute_mauve(p_features=features[0], q_features=features[1], seed=seed).mauve)


@torch.no_grad()
def _features(text: str, judge: LanguageModel) -> Tensor:
    """Average a text's hidden states (dim,)."""
    tokens = judge.encode(text)[None].to(judge.denoiser.device)
    return judge.denoiser.hidden(Query.everywhere(tokens)).float().mean(dim=0).cpu()


def unigram_entropy(tokens: Tokens) -> float:
    """Entropy in nats of the empirical distribution of one text's tokens."""
    counts = Counter(tokens)
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values()) if tokens else 0.0


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Share of the n-grams of all texts that are distinct (arXiv 1510.03055); 0 where there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(tokens: Tokens, n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before: 1 - distinct-n (seq-rep-n of arXiv 1908.04319)."""
    return 1 - distinct_n([tokens], n) if len(tokens) >= n else 0.0


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> float:
    """Mean BLEU-n in [0, 1] of each text against all others (arXiv 1802.01886): high where texts are alike."""
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other; got {len(texts)}.")
    return fmean(bleu(text, [*texts[:i], *texts[i + 1 :]], n) for i, text in enumerate(texts))


def bleu(text: Tokens, references: Sequence[Tokens], n: int = 4) -> float:
    """Score a text against references: clipped n-gram precisions, brevity penalty; 0 counts smoothed to 1/2."""
    if not text:
        return 0.0
    logs = []
    for size in range(1, min(n, len(text)) + 1):
        grams = Counter(_ngrams(text, size))
        most: Counter[tuple[Hashable, ...]] = Counter()
        for reference in references:
            most |= Counter(_ngrams(reference, size))
        hits = sum((grams & most).values())
        logs.append(math.log(max(hits, 0.5) / sum(grams.values())))
    nearest = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
    return math.exp(fmean(logs) + min(0.0, 1 - nearest / len(text)))


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


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
    """Return the most frequent answer, of equals the first (self-consistency, arXiv 2203.11171)."""
    if not answers:
        raise ValueError("there is no answer to vote on.")
    return Counter(answers).most_common(1)[0][0]


def edit_similarity(a: str, b: str) -> float:
    """Ratcliff-Obershelp similarity of two texts in [0, 1], as difflib computes it."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


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
    """Predictions of like confidence."""

    confidence: float
    """Mean of what the model said."""
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
