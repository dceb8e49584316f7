"""Revision: what happens to drafts (tokens that are placed but not decided), and to noise that is not committed."""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redraft.processes.uniform import UniformDiffusion
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_REVISE, DRAW_UNMASK, Candidates, Window
from redraft.sampling.policies.unmask import EntropyBound, best
from redraft.schedules import Linear, Schedule
from redraft.settings import NonNegative, Positive, Probability, Settings, Within

MAX_POST_STEPS = 1000
"""Steps that a block may take after its last one without coming nearer to its end."""


class Kind(IntEnum):
    """What happens to a position."""

    KEEP = 0
    """It stays as it is."""
    SET = 1
    """Noise takes a token."""
    EDIT = 2
    """A draft takes another token."""
    REOPEN = 3
    """A draft becomes noise again."""
    RENOISE = 4
    """Noise takes another noise token."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a step does, over the columns that the policies see. What does not fit a position's status is ignored."""

    kind: UInt8[Tensor, "batch seq"]
    tokens: Int[Tensor, "batch seq"]
    """What is set, and what a draft is edited to; the next step sees it as `Candidates.previous`."""
    closes_block: Bool[Tensor, "batch"]
    """Rows whose block ends here if it holds no noise: while a `Revise` has a block open, its tokens are drafts."""
    noise: Int[Tensor, "batch seq"] | None = None
    """What becomes noise becomes this; None draws it from the prior."""

    def with_kind(self, kind: Kind, where: Bool[Tensor, "batch seq"]) -> "Action":
        """Do this at these positions instead."""
        return replace(self, kind=self.kind.masked_fill(where, int(kind)))


@runtime_checkable
class Revise(Protocol):
    """Revise the drafts of the open blocks; while a block is open, what the sampler placed in it is a draft."""

    looks_at_drafts: bool = False
    """Whether it needs proposals at drafts, too."""
    needs_all_steps: bool = True
    """Whether a block takes all of its steps: nothing in it is final before the last one."""

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        """Change what the unmasking did."""


@dataclass(frozen=True, kw_only=True)
class TokenEdit(Settings, Revise):
    """Replace a draft by the proposal where it differs and its probability is above the threshold (LLaDA2.1).

    A block ends with the first pass over a filled block that edits nothing, or after `max_post_steps` such passes.
    """

    threshold: Probability
    max_post_steps: Annotated[int, Within(f"[0, {MAX_POST_STEPS}]")] = 16
    looks_at_drafts, needs_all_steps = True, False

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        differs = candidates.x_0 != candidates.canvas.tokens
        edit = candidates.is_open_draft & differs & (candidates.confidence > self.threshold)
        was_filled = ~candidates.is_open_noise.any(dim=1)
        num_passes = candidates.window.steps_since_filled + was_filled.long()
        is_over = num_passes >= self.max_post_steps
        return replace(action.with_kind(Kind.EDIT, edit), closes_block=is_over | (was_filled & ~edit.any(dim=1)))


@dataclass(frozen=True, kw_only=True)
class Remasking(Settings, Revise):
    """ReMDM: ancestral sampling that returns each token to noise with probability sigma_t (arXiv 2503.00307).

    sigma_t is at most (1 - alpha_s) / alpha_t, which keeps the marginals of the process; noise is then committed with
    probability (alpha_s - (1 - sigma_t) alpha_t) / (1 - alpha_t) (Eq. 6 there). Kinds (Section 4.1 there): "cap":
    min(eta, that bound); "rescale": eta times it; "conf": the bound shared out by softmax(-confidence when placed);
    "loop": "cap" while alpha rests at alpha(on), no remasking before and after. It is both policies: use it as
    `unmask` and as `revise`.
    """

    kind: Literal["cap", "rescale", "conf", "loop"] = "cap"
    eta: Probability = 0.02
    schedule: Schedule = field(default_factory=Linear)
    loop_on: float = 0.55
    loop_off: float = 0.05
    loop_alpha: float = 0.9

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit noise at a rate that compensates for the remasking."""
        alpha_t, alpha_s, sigma = self._rates(candidates)
        if self.kind == "conf":
            sigma = torch.zeros_like(sigma)
        share = ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))[:, None]
        share = torch.where(candidates.window.is_last[:, None], 1.0, share)
        return candidates.is_open_noise & (candidates.spread(candidates.window.uniform(DRAW_UNMASK)) < share)

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_draft, is_last = candidates.canvas.is_draft, candidates.window.is_last
        sigma = self._rates(candidates)[2][:, None]
        if self.kind == "conf":
            sure = candidates.canvas.confidence.double().masked_fill(~is_draft, torch.inf)
            sigma = sigma * (-sure).softmax(dim=1).nan_to_num()
        u = candidates.window.uniform_everywhere(DRAW_REVISE)
        reopened = action.with_kind(Kind.REOPEN, is_draft & (u < sigma) & ~is_last[:, None])
        return replace(reopened, closes_block=is_last)

    def _rates(self, candidates: Candidates) -> tuple[Float[Tensor, "batch"], ...]:
        """Return alpha_t, alpha_s and sigma_t (of "conf": the bound that drafts share)."""
        t, s = candidates.window.times
        alpha_t, alpha_s = self._alpha(t), self._alpha(s)
        bound = ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=1)
        if self.kind in ("rescale", "conf"):
            return alpha_t, alpha_s, self.eta * bound if self.kind == "rescale" else bound
        is_on = (t > self.loop_off) & (t <= self.loop_on) if self.kind == "loop" else torch.ones_like(t) > 0
        return alpha_t, alpha_s, torch.where(is_on, bound.clamp(max=self.eta), 0.0)

    def _alpha(self, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        if self.kind != "loop":
            return self.schedule.alpha(t)
        rise = (1 - t) / (1 - self.loop_on) * self.loop_alpha
        finish = 1 - t / self.loop_off * (1 - self.loop_alpha)
        return torch.where(t > self.loop_on, rise, torch.where(t > self.loop_off, self.loop_alpha, finish))


@dataclass(frozen=True, kw_only=True)
class Rerank(Settings, Revise):
    """Keep the share alpha_s of a block's tokens, the most probable ones, and remask the rest (P2, arXiv 2502.03540).

    Drafts and proposals compete; a draft counts with the probability that the model gives to it now. It is both
    policies: use it as `unmask` and as `revise`.
    """

    schedule: Schedule = field(default_factory=Linear)
    looks_at_drafts = True

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit the noise that is among the most probable."""
        return self._is_among_best(candidates) & candidates.is_open_noise

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_dropped = candidates.is_open_draft & ~self._is_among_best(candidates)
        return replace(action.with_kind(Kind.REOPEN, is_dropped), closes_block=candidates.window.is_last)

    def _is_among_best(self, candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open, is_draft = candidates.window.is_open, candidates.is_open_draft
        _, s = candidates.window.times
        count = (self.schedule.alpha(s) * is_open.sum(dim=1)).round(decimals=9).round().long().clamp(min=1)
        count = torch.where(candidates.window.is_last, is_open.sum(dim=1), count)
        now = candidates.spread(candidates.proposal.probability_of(candidates.placed))
        return best(torch.where(is_draft, now, candidates.confidence), candidates, count, among=is_open)


@dataclass(frozen=True, kw_only=True)
class Renoise(Settings, Revise):
    """DiffusionGemma: a step keeps the draws that an entropy bound accepts, and redraws every other token at random.

    No state is kept between steps except the canvas. A block ends with its last step, or when the likeliest tokens are
    those of the step before and the mean entropy is below `confident`, in nats; it then holds the likeliest tokens, not
    the draws. (transformers 5, `DiffusionGemmaForBlockDiffusion.generate`; the bound is that
    of arXiv 2505.24857.) It is both policies: use it as `unmask` and as `revise`.
    """

    accept: EntropyBound
    confident: NonNegative = 0.005

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit a whole block where it ends."""
        return candidates.is_open_noise & self._ends(candidates)[:, None]

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_set = action.kind == Kind.SET
        vocab_size = candidates.proposal.logits.shape[-1]
        random = (candidates.window.uniform_everywhere(DRAW_NOISE) * vocab_size).long()
        is_accepted = self.accept(candidates.confidence, candidates)
        return replace(
            action.with_kind(Kind.RENOISE, candidates.is_open_noise & ~is_set),
            closes_block=is_set.any(dim=1),
            noise=torch.where(is_accepted, candidates.x_0, random),
            tokens=candidates.likeliest,
        )

    def _ends(self, candidates: Candidates) -> Bool[Tensor, "batch"]:
        is_open, window = candidates.is_open_noise, candidates.window
        is_stable = ((candidates.previous == candidates.likeliest) | ~is_open).all(dim=1) & (window.step > 0)
        entropy = candidates.spread(candidates.proposal.entropy()).sum(dim=1) / is_open.sum(dim=1).clamp(min=1)
        return window.is_last | (is_stable & (entropy < self.confident))


@dataclass(frozen=True, kw_only=True)
class Posterior(Settings, Revise):
    """Ancestral sampling under uniform noise: every open token moves from x_t to x_s ~ q(x_s | x_t, x_0) in each step.

    The mean prediction takes the place of x_0, as in Duo (arXiv 2506.10892; "plug_in" in `processes.uniform`). The last
    step takes the likeliest tokens (Duo's greedy tail) unless `has_greedy_tail` is off. Use it with `at_the_end`.
    """

    schedule: Schedule = field(default_factory=Linear)
    has_greedy_tail: bool = True

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        proposal, window, x_t = candidates.proposal, candidates.window, candidates.placed
        process = UniformDiffusion(vocab_size=proposal.logits.shape[-1], schedule=self.schedule)
        t, s = (time[window.rows] for time in window.times)
        x_s = process.posterior_draw(
            proposal.x_0, x_t, t, s, u=window.uniform(DRAW_REVISE), x_t_prob=proposal.probability_of(x_t)
        )
        moved = candidates.over_canvas(x_s)
        return replace(
            action.with_kind(Kind.RENOISE, candidates.is_open_noise & (action.kind == Kind.KEEP)),
            closes_block=window.is_last,
            noise=moved,
            tokens=candidates.likeliest if self.has_greedy_tail else moved,
        )


@dataclass(frozen=True, kw_only=True)
class LinearAnneal(Settings):
    """Let DiffusionGemma's temperature fall from `start` towards `end`: end + (start - end) t.

    The logits are divided by it before anything looks at them. t = (N - n) / N at step n = 0..N-1 of a block's N steps,
    so the last step is one short of `end` (transformers 5).
    """

    start: Positive = 0.8
    end: Positive = 0.4

    def __call__(self, window: Window) -> Float[Tensor, "batch"]:
        t, _ = window.times
        return (self.end + (self.start - self.end) * t).to(torch.float32)
