"""The likelihood of clean rows, or a bound on it: what training minimises and evaluation reports."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.models.denoiser import Denoiser
from redraft.models.head import RowLoss, chunked_loss, chunked_rows, output_embeddings
from redraft.models.query import Query
from redraft.processes.noised import Noised, Process
from redraft.randomness import uniform
from redraft.schedules import stratified_times

SMALLEST_T = 1e-3


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """Where a batch stands in all the noise of a run: equal keys draw equal noise on any split into batches."""

    seed: int
    step: int
    rows: Int[Tensor, "batch"]
    """Index of each row in the global batch of the step."""
    total_rows: int
    """Rows of the global batch, over which t is stratified."""


@dataclass(frozen=True, kw_only=True)
class CleanRows:
    """Rows of clean tokens, to be learnt from or scored."""

    x_0: Int[Tensor, "batch seq"]
    segment_ids: Int[Tensor, "batch seq"]
    """Numbers the documents of a row from 1; 0 is padding."""
    is_target: Bool[Tensor, "batch seq"]
    """What may be noised and is scored: all but padding, or the answer to a prompt."""
    has_padding: bool = True
    isolate_segments: bool = False
    """No attention across documents; positions restart at each."""

    @property
    def attended_segments(self) -> Int[Tensor, "batch seq"] | None:
        """The segments, if attention has to know of them."""
        return self.segment_ids if self.has_padding or self.isolate_segments else None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One forward pass: what the model is asked, and how its answers are scored."""

    query: Query
    row: Int[Tensor, "n"]
    """The clean row that each answer counts for."""
    nats: RowLoss
    """(logits (n, V) of some answers, which of them) -> nats (n,)."""


@runtime_checkable
class Objective(Protocol):
    """What a training minimises. A new one is one file: docs/training.md."""

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Draw the noise that the key stands for, and pose the rows as a problem."""
        ...

    def evaluation(self) -> "Objective":
        """The objective to be reported: the negative log-likelihood, or an unbiased sample of a bound on it."""
        ...


def draw_noise(
    process: Process,
    x_0: Int[Tensor, "batch seq"],
    key: NoiseKey,
    *,
    can_change: Bool[Tensor, "batch seq"],
    t_min: float = SMALLEST_T,
    t_max: float = 1.0,
    block: Int[Tensor, "batch seq"] | None = None,
) -> Noised:
    """Corrupt a batch with times stratified over the global batch, t in (t_min, t_max].

    Which row gets which stratum is drawn too: windows in the order of their documents, and the processes that share a
    batch, all see every noise level. The default range is what a likelihood bound is taken over; it leaves out a
    thousandth of the noise levels. With `block`, the number of each position's block in its row, each block has a time
    of its own: independent within a row, stratified over the rows, and that of block 0 as without blocks.
    """
    rows = key.rows.to(x_0.device)
    offset = uniform(key.seed, key.step, 0)
    strata = uniform(key.seed, key.step, 2, torch.arange(key.total_rows)).argsort().to(x_0.device)
    level = stratified_times(strata[rows].to(torch.float64), total=key.total_rows, offset=offset.to(x_0.device))
    if block is not None:
        phase = uniform(key.seed, key.step, 3, block).masked_fill(block == 0, 0.0)
        level = 1 - (1 - level[:, None] + phase) % 1
    positions = torch.arange(x_0.shape[1], device=x_0.device)
    u = uniform(key.seed, key.step, 1, rows[:, None], positions[None, :])
    return process.corrupt(x_0, t_min + (t_max - t_min) * level, u=u, can_change=can_change)


def whole_canvas(process: Process, noised: Noised, rows: CleanRows) -> Problem:
    """Ask for the targets of x_t. `noised` may hold the rows several times over, which are then averaged."""
    copies = len(noised.x_t) // len(rows.x_0)
    where = noised.targets()
    targets = noised.flatten()[where]
    segment_ids = rows.attended_segments
    query = Query(
        input_ids=noised.x_t,
        where=where,
        segment_ids=None if segment_ids is None else segment_ids.repeat(copies, 1),
        isolate_segments=rows.isolate_segments,
    )
    return Problem(
        query=query,
        row=where // noised.x_t.shape[1] % len(rows.x_0),
        nats=lambda logits, part: process.loss(logits, targets[part]) / copies,
    )


def solve(
    denoiser: Denoiser,
    problem: Problem,
    *,
    num_rows: int,
    wrapped: Any = None,
    has_plain_head: bool = True,
    needs_rows: bool = False,
    is_sharded: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows"]]:
    """Score a model on a problem: the sum over all answers, with gradient, and that of each clean row; nats.

    Where `has_plain_head` (see `models.head`) head and loss go chunk by chunk, and the rows' sums carry no gradient
    unless it `needs_rows`; where weights are sharded, inside of the `wrapped` forward (a sum over rows only).
    """
    if not has_plain_head:
        nats = problem.nats(denoiser(problem.query, wrapped=wrapped), slice(None))
        total = nats.sum()
    elif is_sharded:
        total, nats = denoiser.loss(problem.query, problem.nats, wrapped=wrapped)
    else:
        head, hidden = output_embeddings(denoiser.model), denoiser.hidden(problem.query, wrapped=wrapped)
        if needs_rows:
            nats = chunked_rows(head, hidden, problem.nats)
            total = nats.sum()
        else:
            total, nats = chunked_loss(head, hidden, problem.nats)
    return total, nats.new_zeros(num_rows).index_add(0, problem.row, nats)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A Monte-Carlo mean with its standard error, in nats per token, and the same in bits per byte."""

    nats_per_token: float
    standard_error: float
    bits_per_byte: float | None = None

    def __str__(self) -> str:
        text = f"{self.nats_per_token:.4f} ± {self.standard_error:.4f} nats per token"
        return text if self.bits_per_byte is None else f"{text}, {self.bits_per_byte:.3f} bits per byte"
