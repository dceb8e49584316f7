"""The sampling loop: every sampler is this one with other policies."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.errors import check_count, check_types
from redraft.layouts import Layout
from redraft.models.denoiser import Denoiser
from redraft.models.finite import explain_nan
from redraft.randomness import uniform
from redraft.sampling.budget import Budget, Meter
from redraft.sampling.caching import ApproximatePlanner, ExactPlanner, Planner
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.constrain import Constrained
from redraft.sampling.forward import Forward, Session
from redraft.sampling.guidance import Guide
from redraft.sampling.policies import (
    Anneal,
    Candidates,
    Confidence,
    Draws,
    Filled,
    Frontier,
    Quota,
    Revise,
    Revision,
    Score,
    Stop,
    Unmask,
    WholeCanvas,
)
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_TOKEN
from redraft.sampling.policies.frontier import prompt_end
from redraft.sampling.policies.unmask import best
from redraft.sampling.propose import Proposal, propose
from redraft.sampling.rows import NEVER, Rows, open_window

CacheKind = Literal["none", "exact", "prefix", "dual"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A combination of policies, and how tokens are drawn."""

    steps: int | None = None
    """Denoising steps for a whole row, shared evenly by its blocks (rounded up); None: one for each of its tokens."""
    steps_per_block: int | None = None
    """Steps for each block instead."""
    frontier: Frontier = field(default_factory=WholeCanvas)
    score: Score = field(default_factory=Confidence)
    unmask: Unmask = field(default_factory=Quota)
    revise: Revise | None = None
    stop: Stop = field(default_factory=Filled)
    cache: CacheKind = "none"
    refresh: int | None = None
    """Steps after which an approximate cache is filled anew inside a block; by default only when a block opens."""
    layout: Layout | None = None
    """Attention; by default the model's own."""
    is_grid_from_prompt: bool = False
    """Whether the layout's blocks begin at each row's prompt end instead of position 0 (BD3LM)."""
    noise: Literal["mask", "uniform"] = "mask"
    """What noise looks like: the mask token, or any token of the vocabulary."""
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 for none."""
    budget: Budget = field(default_factory=Budget)
    guides: tuple[Guide, ...] = ()
    """Changes to the logits before the draw: rewards, logits processors, one's own."""
    constraint: Constrained | None = None
    """What the new text must be, whatever is decided in whatever order."""
    anneal: Anneal | None = None
    """What the logits are divided by as a block goes on; `temperature` divides the draw alone, after it."""
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_count("steps", self.steps)
        check_count("steps_per_block", self.steps_per_block)
        if self.temperature < 0:
            raise ValueError(
                f"temperature must not be negative; got {self.temperature}. Use 0 for the likeliest token."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a share of the mass in (0, 1]; got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}. Leave it out for the whole vocabulary.")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh must be at least 1 step; got {self.refresh}.")

    def planner(self, denoiser: Denoiser) -> Planner | None:
        """Choose how keys and values are kept. Raises ValueError for a cache that the attention does not allow."""
        layout, shift = self.layout or denoiser.settings.layout, denoiser.settings.shift_logits
        if self.cache == "none":
            return None
        if self.cache == "exact":
            if layout.block_size is None:
                raise ValueError(
                    "cache 'exact' needs block-causal attention, and this model attends to everything. Use 'prefix' "
                    "or 'dual' (approximate), or 'none'."
                )
            return ExactPlanner(layout=layout, shift=shift)
        if layout.block_size is not None:
            raise ValueError(
                f"cache {self.cache!r} approximates full attention, and this model is block-causal. Use 'exact'."
            )
        return ApproximatePlanner(is_dual=self.cache == "dual", shift=shift, refresh=self.refresh)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of the rows that were still running."""

    index: int
    """Counts from 0."""
    rows: Int[Tensor, "batch"]
    """Which rows of the whole batch these are."""
    canvas: Canvas
    """After the step."""
    x_0: Int[Tensor, "batch seq"]
    """Proposals at the open positions; elsewhere the canvas."""
    confidence: Float[Tensor, "batch seq"]
    """Probability of the proposals; 0 where nothing was open."""
    is_committed: Bool[Tensor, "batch seq"]
    """Noise that got a token in this step."""
    is_edited: Bool[Tensor, "batch seq"]
    """Drafts that got another token."""
    is_reopened: Bool[Tensor, "batch seq"]
    """Drafts that became noise again."""
    is_done: Bool[Tensor, "batch"]
    """Rows that take no further step."""
    num_forwards: Int[Tensor, "batch"]
    """Forwards that each row took part in so far: steps whose input was not that of its forward before."""


def denoise(
    denoiser: Denoiser,
    canvas: Canvas,
    sampler: Sampler,
    *,
    row_keys: Int[Tensor, "batch"],
    session: Session | None = None,
) -> Iterator[Step]:
    """Denoise a canvas step by step. Every row is as it would be alone: finished rows leave, noise is keyed by row.

    `row_keys` seed the rows: equal keys and prompts give equal tokens, whatever else is in the batch. A `session` keeps
    the keys and values of one row for the next call, whose prompt goes on from there. Raises ValueError for a cache
    that does not fit the model's attention, for a constraint that a row cannot satisfy, and for a policy that makes no
    progress: a step changes something once the clock of its block is at its end.
    """
    if sampler.constraint is not None:
        sampler.constraint.check(canvas)
    rows = _begin(canvas, sampler, row_keys)
    forward = Forward(
        denoiser,
        sampler.planner(denoiser),
        num_positions=canvas.tokens.shape[1],
        layout=sampler.layout,
        cfg_scale=sampler.cfg_scale,
        session=None if sampler.is_grid_from_prompt or len(canvas.tokens) > 1 else session,
    )
    never = denoiser.settings.mask_token_id if sampler.noise == "mask" else None
    noise = _Noise(sampler.noise, denoiser)
    if sampler.noise == "uniform":
        rows.canvas = rows.canvas.reopen(rows.canvas.is_noise, noise.draw(rows, step=-1))
    is_done, index = sampler.stop(rows.canvas), 0
    is_nan = is_stuck = torch.zeros_like(is_done)
    meter = Meter(sampler.budget)
    step: Step

    while True:
        flags = torch.stack([is_done.any(), is_nan.any(), is_stuck.any()])
        some_done, some_nan, some_stuck = flags.tolist()  # sync: the one question per step
        if some_nan:
            raise explain_nan(denoiser, rows.canvas.tokens)
        if some_stuck:
            raise _no_progress(rows, sampler, step, is_stuck)
        if some_done:
            kept = (~is_done).nonzero()[:, 0]
            if not len(kept):
                return
            forward.keep(kept, of=len(is_done))
            rows.keep(kept)
        left = meter.forwards_left(rows.num_forwards)
        least = _least(rows, sampler, left)
        if sampler.budget.seconds is not None and left is not None and sampler.revise and sampler.revise.is_clocked:
            blocks = _count_blocks(rows.block_of, rows.canvas.is_noise | rows.canvas.is_draft).clamp(min=1)
            rows.num_steps = torch.minimum(rows.num_steps, rows.step + (left // blocks).clamp(min=1))
        window = open_window(rows, sampler.frontier.in_flight, least)
        if sampler.revise is None or not sampler.revise.looks_at_drafts:
            is_asked = window.is_open & rows.canvas.is_noise
        else:
            is_asked = window.is_open
        where = is_asked.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        draws = _draws(rows, where, index)
        logits = forward(rows, where)
        rows.count_forwards(is_asked, is_every_step=not forward.is_repeatable)
        if sampler.guides:
            logits = logits.clone()  # they may work in place, and the next step may ask for the same logits
        for guide in sampler.guides:
            logits = guide(logits, rows.canvas, where)
        if sampler.anneal is not None:
            logits = logits / sampler.anneal(window)[draws.rows, None]
        forward.remember(logits, rows)
        proposal = _propose(logits, never, draws, sampler, rows.canvas, where)
        is_nan = proposal.log_normaliser.isnan()
        candidates = Candidates(
            canvas=rows.canvas,
            window=window,
            where=where,
            proposal=proposal,
            previous=rows.previous,
            draws=draws,
        )
        score = candidates.spread(sampler.score(candidates))
        is_committed = sampler.unmask(score, candidates) & candidates.is_open_noise
        if least is not None:
            is_committed = _at_least(least, is_committed, score, candidates)
        revision = sampler.revise(is_committed, candidates) if sampler.revise else None
        if revision is not None and left is not None:
            revision = revision.closing(left == 1)
        step = _apply(rows, candidates, is_committed, revision, noise, index)
        meter.count(forward.num_forwards)
        is_done = sampler.stop(rows.canvas)
        is_stuck = rows.find_stuck(candidates.canvas, window) & ~is_done
        yield replace(step, is_done=is_done)
        index += 1


def _begin(canvas: Canvas, sampler: Sampler, row_keys: Int[Tensor, "batch"]) -> Rows:
    block_of = sampler.frontier.blocks(canvas)
    num_blocks = _count_blocks(block_of, canvas.is_noise)
    index = torch.arange(canvas.tokens.shape[0], device=canvas.tokens.device)
    steps = canvas.is_noise.sum(dim=1) if sampler.steps is None else torch.full_like(index, sampler.steps)
    num_steps = (-(-steps // num_blocks.clamp(min=1))).clamp(min=1)
    if sampler.budget.forwards is not None and sampler.revise is not None and sampler.revise.is_clocked:
        num_steps = (sampler.budget.forwards // num_blocks.clamp(min=1)).clamp(min=1)
    return Rows(
        index=index,
        keys=row_keys,
        canvas=canvas,
        block_of=block_of,
        origin=prompt_end(canvas) if sampler.is_grid_from_prompt else torch.zeros_like(index),
        block=torch.full_like(index, NEVER),
        last_block=torch.full_like(index, NEVER),
        step=torch.zeros_like(index),
        num_steps=torch.full_like(index, sampler.steps_per_block) if sampler.steps_per_block else num_steps,
        since_filled=torch.zeros_like(index),
        previous=torch.full_like(canvas.tokens, -1),
        fed=torch.full_like(canvas.tokens, NEVER),
        num_forwards=torch.zeros_like(index),
        least_left=torch.full_like(index, NEVER),
        num_stalled=torch.zeros_like(index),
    )


def _count_blocks(block_of: Int[Tensor, "batch seq"], is_noise: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the blocks of each row that hold noise."""
    ordered = torch.where(is_noise, block_of, NEVER).sort(dim=1).values
    is_new = torch.ones_like(is_noise)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (is_new & (ordered != NEVER)).sum(dim=1)


def _least(rows: Rows, sampler: Sampler, forwards_left: Int[Tensor, "batch"] | None) -> Int[Tensor, "batch"] | None:
    """Count what a step must commit at least for the budget to suffice; None where there is no budget."""
    if forwards_left is None:
        return None
    num_left = rows.canvas.is_noise.sum(dim=1)
    if sampler.revise is not None and sampler.revise.is_clocked:
        return torch.where(forwards_left == 1, num_left, 0)
    return -(-num_left // forwards_left)


def _at_least(
    least: Int[Tensor, "batch"],
    is_committed: Bool[Tensor, "batch seq"],
    score: Float[Tensor, "batch seq"],
    candidates: Candidates,
) -> Bool[Tensor, "batch seq"]:
    """Commit more, the surest first, where the policy committed too few."""
    count = torch.maximum(least, is_committed.sum(dim=1))
    return best(score.masked_fill(is_committed, torch.inf), candidates, count)


def _no_progress(rows: Rows, sampler: Sampler, step: Step, is_stuck: Bool[Tensor, "batch"]) -> ValueError:
    """Say which policy keeps a row from its end."""
    place = int(is_stuck.nonzero()[0])
    is_noise, is_draft = rows.canvas.is_noise[place], rows.canvas.is_draft[place]
    is_open = (is_noise | is_draft) & (rows.block_of[place] <= rows.last_block[place])
    is_revised = sampler.revise is not None and bool(
        not is_noise.any() or step.is_committed[place].any() or rows.num_stalled[place]
    )
    policy: object
    if not (is_noise | is_draft).any():
        policy, what = sampler.stop, "everything is decided, and it is not done. A Stop must end such a row"
    elif not is_open.any():
        policy, what = sampler.frontier, "no block is open. A Frontier must have at least one block in flight"
    elif is_revised:
        policy, what = sampler.revise, "a block stays open after its last step. A Revise must let it close then"
    else:
        policy, what = (
            sampler.unmask,
            "noise is left after a block's last step. An Unmask must commit some in each step",
        )
    name = getattr(policy, "__qualname__", type(policy).__name__)
    return ValueError(f"{name} makes no progress in row {int(step.rows[place])}: {what}.")


def _draws(rows: Rows, where: Int[Tensor, "n"], index: int) -> Draws:
    seq_len = rows.canvas.tokens.shape[1]
    return Draws(row_keys=rows.keys, step=index, rows=where // seq_len, positions=where % seq_len)


def _propose(
    logits: Float[Tensor, "n vocab"],
    never: int | None,
    draws: Draws,
    sampler: Sampler,
    canvas: Canvas,
    where: Int[Tensor, "n"],
) -> Proposal:
    u = draws.uniform(DRAW_TOKEN) if sampler.temperature else None
    temperature, top_k, top_p = sampler.temperature, sampler.top_k, sampler.top_p
    if sampler.constraint is None:
        return propose(logits, never=never, u=u, temperature=temperature, top_k=top_k, top_p=top_p)
    return sampler.constraint(
        propose(logits, never=never),
        canvas,
        where,
        u=u,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        with_best=sampler.noise == "uniform",
    )


def _apply(
    rows: Rows,
    candidates: Candidates,
    is_committed: Bool[Tensor, "batch seq"],
    revision: Revision | None,
    noise: "_Noise",
    index: int,
) -> Step:
    """Change the canvas as the policies say, close what is finished, and move each row's clock."""
    canvas, x_0, confidence = rows.canvas, candidates.x_0, candidates.confidence
    was_filled = ~candidates.is_open_noise.any(dim=1)
    nothing = torch.zeros_like(is_committed)
    edit = reopen = nothing
    placed = x_0 if revision is None or revision.tokens is None else revision.tokens
    if revision is None:
        canvas = canvas.place(is_committed, x_0, confidence)
    else:
        edit = nothing if revision.edit is None else revision.edit & canvas.is_draft
        reopen = nothing if revision.reopen is None else revision.reopen & (canvas.is_draft | is_committed)
        redraw = nothing if revision.redraw is None else revision.redraw & canvas.is_noise & ~is_committed
        canvas = canvas.place(is_committed | edit, placed, confidence, status=Status.DRAFT)
        if revision.reopen is not None or revision.redraw is not None:
            drawn = noise.draw(rows, step=index) if revision.noise is None else revision.noise
            canvas = canvas.reopen(reopen | redraw, drawn)
        has_noise = (candidates.window.is_open & canvas.is_noise).any(dim=1)
        canvas = canvas.settle((revision.may_close & ~has_noise)[:, None].expand_as(is_committed))
    rows.canvas, rows.previous = canvas, placed
    rows.step = rows.step + 1
    rows.since_filled = rows.since_filled + was_filled.long()
    return Step(
        index=index,
        rows=rows.index,
        canvas=canvas,
        x_0=x_0,
        confidence=confidence,
        is_committed=is_committed,
        is_edited=edit,
        is_reopened=reopen,
        is_done=nothing[:, 0],
        num_forwards=rows.num_forwards,
    )


@dataclass(frozen=True)
class _Noise:
    """Where noise tokens come from."""

    kind: str
    denoiser: Denoiser

    def draw(self, rows: Rows, *, step: int) -> Int[Tensor, "batch seq"]:
        """Draw a noise token for every position."""
        tokens = rows.canvas.tokens
        if self.kind == "mask":
            return torch.full_like(tokens, self.denoiser.settings.mask_token_id)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        u = uniform(rows.keys[:, None], step, positions, DRAW_NOISE)
        vocab_size: int = self.denoiser.model.config.get_text_config().vocab_size
        return (u * vocab_size).long()
