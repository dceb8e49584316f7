"""Unmasking: which of the open noise to commit."""

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.errors import check_types
from redraft.sampling.policies.candidates import DRAW_UNMASK, Candidates, Window
from redraft.schedules import Linear, Schedule

EQUAL_WITHIN = 1e-6
"""Relative difference up to which two scores are equal."""


@runtime_checkable
class Unmask(Protocol):
    """Choose what to commit among the open noise; by the last step of a block's clock, or one by one, all of it."""

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]: ...


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Commit as many as the schedule asks: (alpha_s - alpha_t) / (1 - alpha_t) of what is left, at times t -> s.

    Rounded half to even, at least one; the last step of a block commits all that is left. With the linear schedule this
    is LLaDA's even quota.
    """

    schedule: Schedule = field(default_factory=Linear)

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        return best(score, candidates, quota(self.schedule, is_open.sum(dim=1), candidates.window))


def quota(schedule: Schedule, num_left: Int[Tensor, "batch"], window: Window) -> Int[Tensor, "batch"]:
    """Count what a schedule commits of `num_left` positions in this step."""
    t, s = window.times
    share = num_left * committed_share(schedule, t, s)
    count = share.round(decimals=9).round()  # the first rounding puts 10.500000000000002 back on the half
    return torch.where(window.is_last, num_left, count.clamp(min=1).long())


def committed_share(schedule: Schedule, t: Float[Tensor, "batch"], s: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Return P(a token masked at t is decided at s) = (alpha_s - alpha_t) / (1 - alpha_t) (Eq. 7, arXiv 2406.07524)."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    return (alpha_s - alpha_t) / (1 - alpha_t)


@dataclass(frozen=True, kw_only=True)
class _Some:
    """Commit k tokens in every step."""

    k: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        if self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k}.")


@dataclass(frozen=True, kw_only=True)
class TopK(_Some):
    """Commit the k surest in every step, however many steps that takes."""

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        return best(score, candidates, torch.full_like(candidates.window.step, self.k))


@dataclass(frozen=True, kw_only=True)
class Sequential(_Some):
    """Commit the k leftmost in every step: autoregression with a look ahead."""

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        return is_open & (is_open.long().cumsum(dim=1) <= self.k)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Commit whatever the model is sure enough of (Section 3.3 of arXiv 2505.22618).

    Where fewer pass than `at_least` asks for, the best ones are committed instead: one ("one", Fast-dLLM), or as many
    as the even quota of the block ("quota": SDAR, LLaDA2).
    """

    threshold: float
    strict: bool = False
    """Fast-dLLM commits at >= threshold, LLaDA2 at > threshold."""
    at_least: Literal["one", "quota"] = "one"

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability in [0, 1]; got {self.threshold}.")

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open, confidence = candidates.is_open_noise, candidates.confidence
        passes = is_open & (confidence > self.threshold if self.strict else confidence >= self.threshold)
        least = torch.ones_like(candidates.window.step)
        if self.at_least == "quota":
            least = self._even_quota(candidates)
        enough = passes.sum(dim=1) >= least
        return torch.where(enough[:, None], passes, best(score, candidates, least))

    def _even_quota(self, candidates: Candidates) -> Int[Tensor, "batch"]:
        """Share the whole block evenly over its steps, the remainder first."""
        window = candidates.window
        size = window.block_size
        base, extra = size // window.num_steps, size % window.num_steps
        return (base + (window.step < extra).long()).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """Commit the r surest, r the largest such that the r-th best confidence is at least 1 - factor / (r + 1).

    Fast-dLLM's factor rule (Section 3.3 of arXiv 2505.22618); at least one.
    """

    factor: float

    def __post_init__(self) -> None:
        check_types(self)
        if not self.factor > 0:
            raise ValueError(f"factor must be positive; got {self.factor}.")

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        ordered = candidates.confidence.masked_fill(~is_open, -1.0).sort(dim=1, descending=True).values
        rank = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        passes = (ordered >= 1 - self.factor / (rank + 1)) & (ordered >= 0)
        count = (passes * rank).amax(dim=1).clamp(min=1)
        return best(score, candidates, count)


@dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """Commit the longest prefix, by ascending entropy, whose sum of entropies less the largest is at most `bound` nats.

    That difference bounds the mutual information of what is committed together (EB-Sampler, arXiv 2505.24857).
    """

    bound: float

    def __post_init__(self) -> None:
        check_types(self)
        if self.bound < 0:
            raise ValueError(f"entropy_bound must not be negative; got {self.bound}. It is in nats.")

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        entropy = candidates.spread(candidates.proposal.entropy()).masked_fill(~is_open, torch.inf)
        ordered = entropy.sort(dim=1).values
        before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :-1].cumsum(dim=1)], dim=1)
        count = (before <= self.bound).sum(dim=1)  # ascending: the sum less its largest is the sum of those before
        return best(-entropy, candidates, count)


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Commit each position with probability (alpha_s - alpha_t) / (1 - alpha_t), independently: ancestral sampling.

    Eq. 7 of MDLM (arXiv 2406.07524); the last step commits the rest.
    """

    schedule: Schedule = field(default_factory=Linear)

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        window = candidates.window
        share = torch.where(window.is_last, 1.0, committed_share(self.schedule, *window.times))
        return candidates.is_open_noise & (candidates.spread(candidates.draws.uniform(DRAW_UNMASK)) < share[:, None])


@dataclass(frozen=True, kw_only=True)
class FirstHitting:
    """Commit one position at a time, drawn uniformly: the jump times of the process play no part in its tokens.

    First-hitting sampling (Section 4 of arXiv 2409.02908): as exact as ancestral sampling with infinitely many steps,
    with one forward per token.
    """

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        u = candidates.spread(candidates.draws.uniform(DRAW_UNMASK))
        return best(u, candidates, torch.ones_like(candidates.window.step))


@dataclass(frozen=True, kw_only=True)
class AtTheEnd:
    """Commit nothing before the last step, and then everything: for processes that move noise to noise."""

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        return candidates.is_open_noise & candidates.window.is_last[:, None]


def best(
    score: Float[Tensor, "batch seq"],
    candidates: Candidates,
    count: Int[Tensor, "batch"],
    *,
    among: Bool[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch seq"]:
    """Pick each row's `count` best open positions (by default noise); of those equal to the last of them the leftmost.

    Equal means within 1e-6 of the score, or of the probability where that is larger: a margin or an entropy near 0 is a
    difference of larger numbers. What is equal in mathematics comes out about 1e-7 apart, and how far depends on the
    batch. Each score is compared with the last that is picked, not with its neighbour: neighbours would chain scores
    that differ, and a grid would part equal scores at its lines.
    """
    among = candidates.is_open_noise if among is None else among
    score = score.masked_fill(~among, -torch.inf)
    place = (count - 1).clamp(min=0, max=score.shape[1] - 1)[:, None]
    last = score.sort(dim=1, descending=True).values.gather(1, place)
    tolerance = EQUAL_WITHIN * torch.maximum(last.abs(), candidates.confidence)
    is_equal = (score == last) | ((score - last).abs() < tolerance)  # the first: infinities
    is_better = (score > last) & ~is_equal
    num_left = count[:, None] - is_better.sum(dim=1, keepdim=True)
    return (is_better | (is_equal & ((is_equal & among).long().cumsum(dim=1) <= num_left))) & among
