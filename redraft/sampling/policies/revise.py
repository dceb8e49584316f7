"""Revision: what happens to tokens that are placed but not yet decided, and to noise that stays noise."""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from redraft.errors import check_types
from redraft.processes.noised import PosteriorKind
from redraft.processes.uniform import UniformDiffusion
from redraft.sampling.policies.action import Action, Kind
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_REVISE, DRAW_UNMASK, Candidates
from redraft.sampling.policies.unmask import EntropyBound, best
from redraft.schedules import Linear, Schedule

MOST_POST_STEPS = 1000
"""Steps that a block may take after its last one without coming nearer to its end."""


@runtime_checkable
class Revise(Protocol):
    """Revise the drafts of the open blocks; while a block is open, what the sampler placed in it is a draft."""

    @property
    def looks_at_drafts(self) -> bool:
        """Whether it wants proposals at drafts, too."""
        ...

    @property
    def is_clocked(self) -> bool:
        """Whether it runs by the clock: nothing is final before the last step of a block."""
        ...

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        """Change what the unmasking did."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenEdit:
    """Replace a draft by the proposal where it differs and its probability is above the threshold (LLaDA2.1).

    A block ends with the first pass over a filled block that edits nothing, or after `max_post_steps` such passes.
    """

    threshold: float
    max_post_steps: int = 16
    looks_at_drafts: bool = True
    is_clocked: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"editing_threshold is a probability in [0, 1]; got {self.threshold}.")
        if not 0 <= self.max_post_steps <= MOST_POST_STEPS:
            raise ValueError(f"max_post_steps must be in [0, {MOST_POST_STEPS}]; got {self.max_post_steps}.")

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        differs = candidates.x_0 != candidates.canvas.tokens
        edit = candidates.is_open_draft & differs & (candidates.confidence > self.threshold)
        was_filled = ~candidates.is_open_noise.any(dim=1)
        num_passes = candidates.window.steps_since_filled + was_filled.long()
        is_over = num_passes >= self.max_post_steps
        return replace(action.having(Kind.EDIT, edit), may_close=is_over | (was_filled & ~edit.any(dim=1)))


@dataclass(frozen=True, kw_only=True)
class Remasking:
    """ReMDM: ancestral sampling that returns each token to noise with probability sigma_t (arXiv 2503.00307).

    sigma_t is at most (1 - alpha_s) / alpha_t, which keeps the marginals of the process; noise is then committed with
    probability (alpha_s - (1 - sigma_t) alpha_t) / (1 - alpha_t) (Eq. 6 there). Kinds (Section 4.1 there): "cap":
    min(eta, that bound); "rescale": eta times it; "conf": the bound shared out by softmax(-confidence when placed);
    "loop": "cap" while alpha rests at alpha(on), no remasking before and after. It is both policies: use it as
    `unmask` and as `revise`.
    """

    kind: str = "cap"
    eta: float = 0.02
    schedule: Schedule = field(default_factory=Linear)
    loop_on: float = 0.55
    loop_off: float = 0.05
    loop_alpha: float = 0.9
    looks_at_drafts: bool = False
    is_clocked: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind not in ("cap", "rescale", "conf", "loop"):
            raise ValueError(f"remasking must be cap, rescale, conf or loop; got {self.kind!r}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a probability in [0, 1]; got {self.eta}.")

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit noise at the rate that makes up for what is remasked."""
        alpha_t, alpha_s = self._alphas(candidates)
        sigma = 0.0 if self.kind == "conf" else self._sigma(alpha_t, alpha_s, candidates)
        share = ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))[:, None]
        share = torch.where(candidates.window.is_last[:, None], 1.0, share)
        return candidates.is_open_noise & (candidates.spread(candidates.draws.uniform(DRAW_UNMASK)) < share)

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_draft, is_last = candidates.canvas.is_draft, candidates.window.is_last
        sigma = self._sigma(*self._alphas(candidates), candidates)[:, None]
        if self.kind == "conf":
            sure = candidates.canvas.confidence.double().masked_fill(~is_draft, torch.inf)
            sigma = sigma * (-sure).softmax(dim=1).nan_to_num()
        u = candidates.draws.everywhere(DRAW_REVISE)
        reopened = action.having(Kind.REOPEN, is_draft & (u < sigma) & ~is_last[:, None])
        return replace(reopened, may_close=is_last)

    def _alphas(self, candidates: Candidates) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        t, s = candidates.window.times
        return self._alpha(t), self._alpha(s)

    def _alpha(self, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        if self.kind != "loop":
            return self.schedule.alpha(t)
        rise = (1 - t) / (1 - self.loop_on) * self.loop_alpha
        finish = 1 - t / self.loop_off * (1 - self.loop_alpha)
        return torch.where(t > self.loop_on, rise, torch.where(t > self.loop_off, self.loop_alpha, finish))

    def _sigma(
        self, alpha_t: Float[Tensor, "batch"], alpha_s: Float[Tensor, "batch"], candidates: Candidates
    ) -> Float[Tensor, "batch"]:
        most = ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=1)
        if self.kind == "rescale":
            return self.eta * most
        if self.kind == "conf":
            return most
        sigma = most.clamp(max=self.eta)
        if self.kind == "loop":
            t, _ = candidates.window.times
            sigma = torch.where((t > self.loop_off) & (t <= self.loop_on), sigma, 0.0)
        return sigma


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """Keep the surest alpha_s of a block's tokens, placed or proposed, and remask the rest (P2, arXiv 2502.03540).

    A draft is worth the probability that the model gives to it now. It is both policies: use it as `unmask` and as
    `revise`.
    """

    schedule: Schedule = field(default_factory=Linear)
    looks_at_drafts: bool = True
    is_clocked: bool = True

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit the noise that is among the surest."""
        return self._kept(candidates) & candidates.is_open_noise

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_dropped = candidates.is_open_draft & ~self._kept(candidates)
        return replace(action.having(Kind.REOPEN, is_dropped), may_close=candidates.window.is_last)

    def _kept(self, candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        is_open, is_draft = candidates.window.is_open, candidates.is_open_draft
        _, s = candidates.window.times
        count = (self.schedule.alpha(s) * is_open.sum(dim=1)).round(decimals=9).round().long().clamp(min=1)
        count = torch.where(candidates.window.is_last, is_open.sum(dim=1), count)
        placed = candidates.canvas.tokens.flatten()[candidates.where]
        now = candidates.spread(candidates.proposal.probability_of(placed))
        return best(torch.where(is_draft, now, candidates.confidence), candidates, count, among=is_open)


@dataclass(frozen=True, kw_only=True)
class Renoise:
    """DiffusionGemma: a step keeps the draws that an entropy bound accepts, and redraws every other token at random.

    Nothing lasts but through the canvas: each step looks at all of it anew. A block ends with its last step, or when
    the likeliest tokens are those of the step before and the mean entropy is below `confident`, in nats; it then holds
    the likeliest tokens, not the draws. (transformers 5, `DiffusionGemmaForBlockDiffusion.generate`; the bound is that
    of arXiv 2505.24857.) It is both policies: use it as `unmask` and as `revise`.
    """

    accept: EntropyBound
    confident: float = 0.005
    looks_at_drafts: bool = False
    is_clocked: bool = True

    def __post_init__(self) -> None:
        check_types(self)

    def unmask(self, score: Float[Tensor, "batch seq"], candidates: Candidates) -> Bool[Tensor, "batch seq"]:
        """Commit a whole block where it ends."""
        return candidates.is_open_noise & self._ends(candidates)[:, None]

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        is_set = action.kind == Kind.SET
        vocab_size = candidates.proposal.logits.shape[-1]
        random = (candidates.draws.everywhere(DRAW_NOISE) * vocab_size).long()
        is_accepted = self.accept(candidates.confidence, candidates)
        return replace(
            action.having(Kind.RENOISE, candidates.is_open_noise & ~is_set),
            may_close=is_set.any(dim=1),
            noise=torch.where(is_accepted, candidates.x_0, random),
            tokens=candidates.likeliest,
        )

    def _ends(self, candidates: Candidates) -> Bool[Tensor, "batch"]:
        is_open, window = candidates.is_open_noise, candidates.window
        is_stable = ((candidates.previous == candidates.likeliest) | ~is_open).all(dim=1) & (window.step > 0)
        entropy = candidates.spread(candidates.proposal.entropy()).sum(dim=1) / is_open.sum(dim=1).clamp(min=1)
        return window.is_last | (is_stable & (entropy < self.confident))


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Ancestral sampling under uniform noise: every open token moves from x_t to x_s ~ q(x_s | x_t, x_0) in each step.

    `kind` as in `processes.uniform`: "plug_in" is Duo's (arXiv 2506.10892), "mixture" D3PM's (2107.03006). The last
    step takes the likeliest tokens (Duo's greedy tail) unless `has_greedy_tail` is off. Use it with `AtTheEnd`.
    """

    kind: PosteriorKind = "plug_in"
    schedule: Schedule = field(default_factory=Linear)
    has_greedy_tail: bool = True
    looks_at_drafts: bool = False
    is_clocked: bool = True

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, action: Action, candidates: Candidates) -> Action:
        tokens, proposal, rows = candidates.canvas.tokens, candidates.proposal, candidates.draws.rows
        process = UniformDiffusion(vocab_size=proposal.logits.shape[-1], schedule=self.schedule)
        t, s = candidates.window.times
        x_t = tokens.flatten()[candidates.where]
        x_s = process.posterior_draw(
            proposal.x_0,
            x_t,
            t[rows],
            s[rows],
            u=candidates.draws.uniform(DRAW_REVISE),
            x_t_prob=proposal.probability_of(x_t) if self.kind == "plug_in" else None,
        )
        moved = tokens.flatten().scatter(0, candidates.where, x_s).view_as(tokens)
        return replace(
            action.having(Kind.RENOISE, candidates.is_open_noise & (action.kind == Kind.KEEP)),
            may_close=candidates.window.is_last,
            noise=moved,
            tokens=candidates.likeliest if self.has_greedy_tail else moved,
        )
