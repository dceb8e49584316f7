"""The sampling loop: every sampler is this one with other policies."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.models.denoiser import Denoiser
from redraft.randomness import uniform
from redraft.sampling.canvas import Canvas
from redraft.sampling.policies import Confidence, Filled, Frontier, Quota, Score, Stop, Unmask, WholeCanvas, Window
from redraft.sampling.propose import propose

DRAW_TOKEN, DRAW_ORDER = 0, 1  # what a random number is for


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A combination of policies, and how tokens are drawn."""

    steps: int
    """Denoising steps for a whole row, shared evenly by its blocks (rounded up)."""
    frontier: Frontier = field(default_factory=WholeCanvas)
    score: Score = field(default_factory=Confidence)
    unmask: Unmask = field(default_factory=Quota)
    stop: Stop = field(default_factory=Filled)
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")
        if self.temperature < 0:
            raise ValueError(
                f"temperature must not be negative; got {self.temperature}. Use 0 for the likeliest token."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a share of the mass in (0, 1]; got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}. Leave it out for the whole vocabulary.")


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
    """What this step decided."""
    is_done: Bool[Tensor, "batch"]
    """Rows that take no further step."""


@torch.no_grad()
def denoise(denoiser: Denoiser, canvas: Canvas, sampler: Sampler, *, row_keys: Int[Tensor, "batch"]) -> Iterator[Step]:
    """Denoise a canvas step by step. Every row is as it would be alone: finished rows leave, noise is keyed by row.

    `row_keys` seed the rows: equal keys and prompts give equal tokens, whatever else is in the batch.
    """
    mask_token_id = denoiser.settings.mask_token_id
    block_of = sampler.frontier.blocks(canvas)
    num_blocks = _count_blocks(block_of, canvas.is_noise)
    rows = torch.arange(canvas.tokens.shape[0], device=canvas.tokens.device)
    steps_per_block = -(-sampler.steps // num_blocks.clamp(min=1))
    step_in_block = torch.zeros_like(rows)
    block = torch.full_like(rows, -1)
    is_done = sampler.stop(canvas)

    for index in range(canvas.tokens.numel()):  # each step commits a token of each row: never more steps than this
        if is_done.any():  # sync: the one question per step
            is_running = ~is_done
            rows, row_keys, block = rows[is_running], row_keys[is_running], block[is_running]
            if not len(rows):
                return
            step_in_block, steps_per_block = step_in_block[is_running], steps_per_block[is_running]
            canvas = canvas.rows(is_running)
            block_of = block_of[is_running][:, : canvas.tokens.shape[1]]

        is_open, now = _open_window(canvas, block_of)
        step_in_block = torch.where(now == block, step_in_block, 0)
        block = now
        window = Window(is_open=is_open, step=step_in_block, num_steps=steps_per_block)

        where = is_open.flatten().nonzero()[:, 0]  # sync: how many positions are open is data
        logits = denoiser.logits_at(where, canvas.tokens, segment_ids=_segments(canvas))
        row, position = where // canvas.tokens.shape[1], where % canvas.tokens.shape[1]
        proposal = propose(
            logits,
            never=mask_token_id,
            u=uniform(row_keys[row], index, position, DRAW_TOKEN) if sampler.temperature else None,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
        )
        score = sampler.score(proposal, uniform(row_keys[row], index, position, DRAW_ORDER))
        x_0 = canvas.tokens.flatten().scatter(0, where, proposal.x_0).view_as(canvas.tokens)
        is_committed = sampler.unmask(_spread(score, where, is_open), window)
        canvas = canvas.commit(is_committed, x_0)
        is_done = sampler.stop(canvas)
        step_in_block = step_in_block + 1
        yield Step(
            index=index,
            rows=rows,
            canvas=canvas,
            x_0=x_0,
            confidence=_spread(proposal.confidence, where, is_open),
            is_committed=is_committed,
            is_done=is_done,
        )


def _open_window(
    canvas: Canvas, block_of: Int[Tensor, "batch seq"]
) -> tuple[Bool[Tensor, "batch seq"], Int[Tensor, "batch"]]:
    """Open the noise of each row's first unfinished block; return it and the number of that block."""
    undecided = torch.where(canvas.is_noise, block_of, torch.iinfo(block_of.dtype).max)
    block = undecided.amin(dim=1)
    return canvas.is_noise & (block_of == block[:, None]), block


def _count_blocks(block_of: Int[Tensor, "batch seq"], is_noise: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the blocks of each row that hold noise."""
    ordered = torch.where(is_noise, block_of, -1).sort(dim=1).values
    is_new = torch.ones_like(is_noise)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (is_new & (ordered >= 0)).sum(dim=1)


def _segments(canvas: Canvas) -> Int[Tensor, "batch seq"] | None:
    """Tell attention about padding, if there is more than one row to have any."""
    return canvas.segment_ids if canvas.tokens.shape[0] > 1 else None


def _spread(
    values: Float[Tensor, "n"], where: Int[Tensor, "n"], like: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Lay values at flattened positions out over the canvas; 0 elsewhere."""
    return values.new_zeros(like.numel()).scatter(0, where, values).view(like.shape)
