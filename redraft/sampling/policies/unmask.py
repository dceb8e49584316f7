"""Unmasking: which of the open noise to commit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.sampling.policies.candidates import DRAW_UNMASK, Candidates, Window
from redraft.schedules import Linear, Schedule
from redraft.settings import Count, NonNegative, Positive, Probability, Settings

EQUAL_WITHIN = 1e-6
"""Relative difference up to which two scores are equal."""


Unmask = Callable[[Float[Tensor, "batch seq"], Candidates], Bool[Tensor, "batch seq"]]
"""(score, candidates) -> which of the open noise gets its token; all of it must have one by a block's last step."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Commit as many as the schedule asks: (alpha_s - alpha_t) / (1 - alpha_t) of what is left, at times t -> s.

    Rounded half to even, at least one; the last step of a block commits all that is left. With the linear schedule this
    is LLaDA's even quota.
    """

    schedule: Schedule = field(default_factory=Linear)

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        window, num_left = candidates.window, candidates.is_open_noise.sum(dim=1)
        share = num_left * committed_share(self.schedule, *window.times)
        count = share.round(decimals=9).round()  # the first rounding puts 10.500000000000002 back on the half
        return best(score, candidates, torch.where(window.is_last, num_left, count.clamp(min=1).long()))


def fixed_quota(score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
    """Commit block_size / steps in each step, whatever is left of the block (SDAR's static strategy).

    A block whose first positions are given, or where a threshold committed more, simply ends sooner.
    """
    return best(score, candidates, fixed_count(candidates.window))


def fixed_count(window: Window) -> Int[Tensor, "batch"]:
    """Count what a step commits where a whole block is shared out over its steps, the remainder first; at least one."""
    even, remainder = window.block_size // window.num_steps, window.block_size % window.num_steps
    return (even + (window.step < remainder).long()).clamp(min=1)


def committed_share(schedule: Schedule, t: Float[Tensor, "batch"], s: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Return P(a token masked at t is decided at s) = (alpha_s - alpha_t) / (1 - alpha_t) (Eq. 7, arXiv 2406.07524)."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    return (alpha_s - alpha_t) / (1 - alpha_t)


@dataclass(frozen=True, kw_only=True)
class TopK(Settings):
    """Commit the k highest scores in every step, however many steps that takes."""

    k: Count = 1

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        return best(score, candidates, torch.full_like(candidates.window.step, self.k))


@dataclass(frozen=True, kw_only=True)
class Threshold(Settings):
    """Commit tokens whose probability passes a threshold (Section 3.3 of arXiv 2505.22618).

    Where fewer pass than `at_least` asks for, the best ones are committed instead: one ("one", Fast-dLLM), or as many
    as `fixed_quota` does ("quota": SDAR, LLaDA2).
    """

    threshold: Probability
    strict: bool = False
    """Fast-dLLM commits at >= threshold, SDAR and LLaDA2 at > threshold: at 1 they commit the quota alone."""
    at_least: Literal["one", "quota"] = "one"

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        confidence = candidates.confidence
        passes = confidence > self.threshold if self.strict else confidence >= self.threshold
        passes = passes & candidates.is_open_noise
        minimum = fixed_count(candidates.window)
        if self.at_least == "one":
            minimum = torch.ones_like(minimum)
        is_enough = passes.sum(dim=1) >= minimum
        return torch.where(is_enough[:, None], passes, best(score, candidates, minimum))


@dataclass(frozen=True, kw_only=True)
class Factor(Settings):
    """Commit the r most confident, r the largest such that the r-th confidence is at least 1 - factor / (r + 1).

    Fast-dLLM's factor rule (Section 3.3 of arXiv 2505.22618); at least one.
    """

    factor: Positive

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        ordered = candidates.confidence.masked_fill(~is_open, -1.0).sort(dim=1, descending=True).values
        rank = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        passes = (ordered >= 1 - self.factor / (rank + 1)) & (ordered >= 0)
        count = (passes * rank).amax(dim=1).clamp(min=1)
        return best(score, candidates, count)


@dataclass(frozen=True, kw_only=True)
class EntropyBound(Settings):
    """Commit the longest prefix, by ascending entropy, whose sum of entropies less the largest is at most `bound` nats.

    That difference bounds the mutual information of what is committed together (EB-Sampler, arXiv 2505.24857).

    With `has_all` the largest counts too, and the sum is below `bound`, but one is always committed (JetEngine, SDAR).
    """

    bound: NonNegative
    has_all: bool = False

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        entropy = candidates.spread(candidates.proposal.entropy()).masked_fill(~is_open, torch.inf)
        ordered = entropy.sort(dim=1).values
        before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :-1].cumsum(dim=1)], dim=1)
        passes = before <= self.bound  # ascending: the sum less its largest is the sum of those before
        if self.has_all:
            passes = before + ordered < self.bound
        count = passes.sum(dim=1).clamp(min=1)
        return best(-entropy, candidates, count)


@dataclass(frozen=True, kw_only=True)
class LowEntropy(Settings):
    """Commit tokens whose entropy plus `penalty` nats per position after the first noise is below a threshold.

    If none is, the lowest sum alone (WeDLM's engine, arXiv 2512.22737).
    """

    threshold: NonNegative
    penalty: NonNegative = 0.02

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open, columns = candidates.is_open_noise, candidates.window.columns
        first = torch.where(is_open, columns, torch.iinfo(columns.dtype).max).amin(dim=1, keepdim=True)
        adjusted = candidates.spread(candidates.proposal.entropy()) + self.penalty * (columns - first)
        passes = is_open & (adjusted < self.threshold)
        lowest = best(-adjusted, candidates, torch.ones_like(candidates.window.step))
        return torch.where(passes.any(dim=1, keepdim=True), passes, lowest)


@dataclass(frozen=True, kw_only=True)
class CertainPrefix(Settings):
    """Commit the longest run from the first noise on whose scores are all above a threshold; at least one token.

    SDLM (arXiv 2509.24007): what was committed is text without a gap.
    """

    threshold: Probability

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open = candidates.is_open_noise
        is_certain = (score > self.threshold) | ~is_open
        return is_open & is_certain.long().cumprod(dim=1).bool() | _is_first(is_open)


@dataclass(frozen=True, kw_only=True)
class FirstAlone:
    """Commit the first token of a block alone, in the block's first step; the others by the rule `rest`.

    It is predicted by the last token of the text, in the forward that reads that text for the cache: with an exact
    cache it costs no forward more (Fast-dLLM v2, arXiv 2509.26328; Nemotron-Labs-Diffusion).
    """

    rest: Unmask

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        window = candidates.window
        is_alone = window.opens_block & (window.step == 0)
        return torch.where(is_alone[:, None], _is_first(candidates.is_open_noise), self.rest(score, candidates))


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Commit each position with probability (alpha_s - alpha_t) / (1 - alpha_t), independently: ancestral sampling.

    Eq. 7 of MDLM (arXiv 2406.07524); the last step commits the rest.
    """

    schedule: Schedule = field(default_factory=Linear)

    def __call__(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        window = candidates.window
        share = torch.where(window.is_last, 1.0, committed_share(self.schedule, *window.times))
        return candidates.is_open_noise & (candidates.spread(candidates.window.uniform(DRAW_UNMASK)) < share[:, None])


def at_the_end(score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
    """Commit nothing before the last step, and then everything: for processes that move noise to noise."""
    return candidates.is_open_noise & candidates.window.is_last[:, None]


def _is_first(is_open: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Mark the first of each row's positions."""
    return is_open & (is_open.long().cumsum(dim=1) == 1)


def best(
    score: Float[Tensor, "batch seq"],
    candidates: Candidates,
    count: Int[Tensor, "batch"],
    *,
    among: Bool[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch seq"]:
    """Pick each row's `count` best open positions (by default noise); of those equal to the last of them the leftmost.

    Scores that are equal in mathematics come out about 1e-7 apart, and how far depends on the batch. So equal means
    within 1e-6 of the score, or of the probability where that is larger (a margin or an entropy near 0 is a difference
    of larger numbers). Each score is compared with the last one picked. Comparing neighbours would join scores that
    differ, and rounding would separate equal scores that lie on both sides of a rounding border.
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
