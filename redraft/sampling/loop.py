"""The sampling loop: every sampler is this one with other policies."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import Slots
from redraft.models.denoiser import Denoiser
from redraft.randomness import uniform
from redraft.sampling.caching import ApproximatePlanner, Bounds, ExactPlanner, Planner
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.guidance import Guide, guided, unconditional
from redraft.sampling.policies import (
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
    Window,
)
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_TOKEN
from redraft.sampling.policies.frontier import prompt_end
from redraft.sampling.propose import Proposal, propose

CacheKind = Literal["none", "exact", "prefix", "dual"]
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A combination of policies, and how tokens are drawn."""

    steps: int
    """Denoising steps for a whole row, shared evenly by its blocks (rounded up)."""
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
    guides: tuple[Guide, ...] = ()
    """Changes to the logits before the draw: rewards, logits processors, one's own."""
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")
        if self.steps_per_block is not None and self.steps_per_block < 1:
            raise ValueError(f"steps_per_block must be at least 1; got {self.steps_per_block}.")
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


@dataclass
class _Rows:
    """What the loop knows about each running row."""

    index: Int[Tensor, "batch"]
    keys: Int[Tensor, "batch"]
    canvas: Canvas
    block_of: Int[Tensor, "batch seq"]
    origin: Int[Tensor, "batch"]
    block: Int[Tensor, "batch"]
    step: Int[Tensor, "batch"]
    num_steps: Int[Tensor, "batch"]
    since_filled: Int[Tensor, "batch"]
    previous: Int[Tensor, "batch seq"]

    def keep(self, kept: Int[Tensor, "kept"]) -> None:
        """Drop the other rows, and the columns that only they needed."""
        self.canvas = self.canvas.rows(kept)
        length = self.canvas.tokens.shape[1]
        self.block_of, self.previous = self.block_of[kept, :length], self.previous[kept, :length]
        for name in ("index", "keys", "origin", "block", "step", "num_steps", "since_filled"):
            setattr(self, name, getattr(self, name)[kept])


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    canvas: Canvas,
    sampler: Sampler,
    *,
    row_keys: Int[Tensor, "batch"],
) -> Iterator[Step]:
    """Denoise a canvas step by step. Every row is as it would be alone: finished rows leave, noise is keyed by row.

    `row_keys` seed the rows: equal keys and prompts give equal tokens, whatever else is in the batch. Raises ValueError
    for a cache that does not fit the model's attention.
    """
    rows = _begin(canvas, sampler, row_keys)
    forward = _Forward(denoiser, sampler, canvas)
    never = denoiser.settings.mask_token_id if sampler.noise == "mask" else None
    noise = _Noise(sampler.noise, denoiser)
    if sampler.noise == "uniform":
        rows.canvas = rows.canvas.reopen(rows.canvas.is_noise, noise.draw(rows, step=-1))
    is_done, index = sampler.stop(rows.canvas), 0

    while True:
        if is_done.any():  # sync: the one question per step
            kept = (~is_done).nonzero()[:, 0]
            if not len(kept):
                return
            forward.keep(kept, of=len(is_done))
            rows.keep(kept)
        window = _open_window(rows, sampler.frontier.in_flight)
        if sampler.revise is None or not sampler.revise.looks_at_drafts:
            asked = window.is_open & rows.canvas.is_noise
        else:
            asked = window.is_open
        where = asked.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        draws = _draws(rows, where, index)
        logits = forward(rows, window, where)
        for guide in sampler.guides:
            logits = guide(logits, rows.canvas, where)
        proposal = _propose(logits, never, draws, sampler)
        candidates = Candidates(
            canvas=rows.canvas,
            window=window,
            where=where,
            proposal=proposal,
            previous=rows.previous,
            draws=draws,
        )
        is_committed = sampler.unmask(candidates.spread(sampler.score(candidates)), candidates)
        revision = sampler.revise(is_committed, candidates) if sampler.revise else None
        step = _apply(rows, candidates, is_committed, revision, noise, index)
        is_done = sampler.stop(rows.canvas)
        yield replace(step, canvas=rows.canvas, is_done=is_done)
        index += 1


def _begin(canvas: Canvas, sampler: Sampler, row_keys: Int[Tensor, "batch"]) -> _Rows:
    block_of = sampler.frontier.blocks(canvas)
    num_blocks = _count_blocks(block_of, canvas.is_noise)
    index = torch.arange(canvas.tokens.shape[0], device=canvas.tokens.device)
    num_steps = -(-sampler.steps // num_blocks.clamp(min=1))
    return _Rows(
        index=index,
        keys=row_keys,
        canvas=canvas,
        block_of=block_of,
        origin=prompt_end(canvas) if sampler.is_grid_from_prompt else torch.zeros_like(index),
        block=torch.full_like(index, NEVER),
        step=torch.zeros_like(index),
        num_steps=torch.full_like(index, sampler.steps_per_block) if sampler.steps_per_block else num_steps,
        since_filled=torch.zeros_like(index),
        previous=torch.full_like(canvas.tokens, -1),
    )


def _count_blocks(block_of: Int[Tensor, "batch seq"], is_noise: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the blocks of each row that hold noise."""
    ordered = torch.where(is_noise, block_of, NEVER).sort(dim=1).values
    is_new = torch.ones_like(is_noise)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (is_new & (ordered != NEVER)).sum(dim=1)


def _open_window(rows: _Rows, in_flight: int) -> Window:
    """Open each row's first unfinished blocks, and set its clock back where a block is new."""
    canvas = rows.canvas
    is_unfinished = canvas.is_noise | canvas.is_draft
    block = torch.where(is_unfinished, rows.block_of, NEVER).amin(dim=1)
    is_new = block != rows.block
    is_open = is_unfinished & (rows.block_of < (block + in_flight)[:, None])
    rows.block = block
    rows.step = torch.where(is_new, 0, rows.step)
    rows.since_filled = torch.where(is_new, 0, rows.since_filled)
    is_mine = (rows.block_of == block[:, None]) & (canvas.status != Status.PAD)
    return Window(
        is_open=is_open,
        step=rows.step,
        num_steps=rows.num_steps,
        block_size=is_mine.sum(dim=1),
        steps_since_filled=rows.since_filled,
    )


def _draws(rows: _Rows, where: Int[Tensor, "n"], index: int) -> Draws:
    seq_len = rows.canvas.tokens.shape[1]
    return Draws(row_keys=rows.keys, step=index, rows=where // seq_len, positions=where % seq_len)


def _propose(logits: Float[Tensor, "n vocab"], never: int | None, draws: Draws, sampler: Sampler) -> Proposal:
    return propose(
        logits,
        never=never,
        u=draws.uniform(DRAW_TOKEN) if sampler.temperature else None,
        temperature=sampler.temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
    )


def _apply(
    rows: _Rows,
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
    if revision is None:
        canvas = canvas.place(is_committed, x_0, confidence)
    else:
        edit = nothing if revision.edit is None else revision.edit
        reopen = nothing if revision.reopen is None else revision.reopen
        redraw = nothing if revision.redraw is None else revision.redraw & ~is_committed
        canvas = canvas.place(is_committed | edit, x_0, confidence, status=Status.DRAFT)
        if revision.reopen is not None or revision.redraw is not None:
            drawn = noise.draw(rows, step=index) if revision.noise is None else revision.noise
            canvas = canvas.reopen(reopen | redraw, drawn)
        has_noise = (candidates.window.is_open & canvas.is_noise).any(dim=1)
        canvas = canvas.settle((revision.may_close & ~has_noise)[:, None].expand_as(is_committed))
    rows.canvas, rows.previous = canvas, x_0
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
    )


@dataclass(frozen=True)
class _Noise:
    """Where noise tokens come from."""

    kind: str
    denoiser: Denoiser

    def draw(self, rows: _Rows, *, step: int) -> Int[Tensor, "batch seq"]:
        """Draw a noise token for every position."""
        tokens = rows.canvas.tokens
        if self.kind == "mask":
            return torch.full_like(tokens, self.denoiser.settings.mask_token_id)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        u = uniform(rows.keys[:, None], step, positions, DRAW_NOISE)
        vocab_size: int = self.denoiser.model.config.vocab_size
        return (u * vocab_size).long()


class _Forward:
    """Calls the model: with or without a cache, with or without guidance, and not twice for the same input."""

    def __init__(self, denoiser: Denoiser, sampler: Sampler, canvas: Canvas) -> None:
        self.denoiser, self.sampler = denoiser, sampler
        self.planner = sampler.planner(denoiser)
        self.slots = Slots(canvas.tokens.shape[1]) if self.planner else None
        self.memo: tuple[Tensor, Tensor, Tensor] | None = None

    def keep(self, kept: Int[Tensor, "kept"], *, of: int) -> None:
        """Drop the other rows of a batch of `of`."""
        self.memo = None
        if self.planner and self.slots:
            self.planner.keep(kept.tolist())  # sync: only when rows leave
            self.slots.select(torch.cat([kept, kept + of]) if self.sampler.cfg_scale else kept)

    def __call__(self, rows: _Rows, window: Window, where: Int[Tensor, "n"]) -> Float[Tensor, "n vocab"]:
        tokens = rows.canvas.tokens
        if self.memo and torch.equal(self.memo[0], tokens) and torch.equal(self.memo[1], where):  # sync
            return self.memo[2]
        if self.sampler.cfg_scale:
            hidden = unconditional(rows.canvas, self.denoiser.settings.mask_token_id)
            both = self._logits(torch.cat([tokens, hidden]), torch.cat([where, where + tokens.numel()]), rows)
            logits = guided(*both.chunk(2), scale=self.sampler.cfg_scale)
        else:
            logits = self._logits(tokens, where, rows)
        self.memo = (tokens, where, logits)
        return logits

    def _logits(
        self, tokens: Int[Tensor, "rows seq"], where: Int[Tensor, "n"], rows: _Rows
    ) -> Float[Tensor, "n vocab"]:
        copies = len(tokens) // len(rows.index)
        layout, origin = self.sampler.layout, rows.origin.repeat(copies)
        if self.planner is None or self.slots is None:
            segments = rows.canvas.segment_ids.repeat(copies, 1) if len(rows.index) > 1 else None
            return self.denoiser.logits_at(where, tokens, segment_ids=segments, layout=layout, grid_origin=origin)
        spans = self.planner.plan(_bounds(rows, self.sampler.frontier.in_flight))
        return self.denoiser.cached_logits_at(
            where,
            tokens,
            spans=spans.repeated(copies),
            slots=self.slots,
            layout=layout,
            grid_origin=origin,
        )


def _bounds(rows: _Rows, in_flight: int) -> list[Bounds]:
    """Bring to the host where each row stands."""
    canvas = rows.canvas
    is_real = canvas.status != Status.PAD
    is_open = is_real & (rows.block_of >= rows.block[:, None]) & (rows.block_of < (rows.block + in_flight)[:, None])
    positions = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
    unfinished = torch.where(canvas.is_noise | canvas.is_draft, positions, NEVER).amin(dim=1)
    start = torch.where(is_open, positions, NEVER).amin(dim=1)
    end = torch.where(is_open, positions + 1, 0).amax(dim=1)
    numbers = torch.stack([unfinished, start, end, is_real.sum(dim=1), rows.origin], dim=1)
    return [Bounds(*row) for row in numbers.tolist()]  # sync
