"""From clean rows to a loss in nats: what training minimises and evaluation reports.

rows (CleanRows), key (NoiseKey)
  -> objective.problem(rows, key)      draws noise, and returns the query to the model and the loss of its answers
  -> problem_loss(denoiser, problem)   runs the model; nats of the batch and of each row
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood.config import SMALLEST_T
from redraft.models.denoiser import Denoiser
from redraft.models.head import RowLoss, chunked_loss, chunked_rows, output_embeddings
from redraft.models.query import Query
from redraft.processes.noised import Noised, Process
from redraft.randomness import uniform
from redraft.schedules import stratified_times


@dataclass(frozen=True, kw_only=True)
class CleanRows:
    """Rows of clean tokens, to learn from or to score."""

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
        """The segments, or None where attention does not depend on them."""
        return self.segment_ids if self.has_padding or self.isolate_segments else None


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """Determines the noise of a batch. Equal keys draw equal noise, however a step is split into batches."""

    seed: int
    step: int
    rows: Int[Tensor, "batch"]
    """Index of each row in the global batch of the step."""
    total_rows: int
    """Rows of the global batch, over which t is stratified."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One forward pass: the query to the model, and the loss of each of its answers."""

    query: Query
    row: Int[Tensor, "n"]
    """The clean row that each answer counts for."""
    nats: RowLoss
    """(logits (n, V) of some answers, the slice of the answers that they are) -> nats (n,)."""


@runtime_checkable
class Objective(Protocol):
    """What a training minimises. How to add one: docs/training.md."""

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Draw the noise of the key, and turn the rows into a problem."""
        ...

    def evaluation(self) -> "Objective":
        """Return the objective to report: the negative log-likelihood, or an unbiased sample of a bound on it."""
        ...


def draw_noise(
    process: Process,
    rows: CleanRows,
    key: NoiseKey,
    *,
    t_min: float = SMALLEST_T,
    t_max: float = 1.0,
    block: Int[Tensor, "batch seq"] | None = None,
) -> Noised:
    """Corrupt the targets of a batch, with times in (t_min, t_max] stratified over the global batch.

    Rows are given their strata at random. Otherwise windows in the order of their documents, or one of the processes
    that divide a batch, would get some noise levels only.

    `block` numbers the block of each position in its row. Each block then has its own time: independent within a row,
    stratified over the rows. Block 0 has the time that the whole row would have without blocks.
    """
    index = key.rows.to(rows.x_0.device)
    offset = uniform(key.seed, key.step, 0)
    strata = uniform(key.seed, key.step, 2, torch.arange(key.total_rows)).argsort().to(index.device)
    level = stratified_times(strata[index].to(torch.float64), total=key.total_rows, offset=offset.to(index.device))
    if block is not None:
        # Adding one phase per block number, modulo 1, keeps the times of that block stratified over the rows. `1 - ...`
        # keeps them in (0, 1].
        phase = uniform(key.seed, key.step, 3, block).masked_fill(block == 0, 0.0)
        level = 1 - (1 - level[:, None] + phase) % 1
    positions = torch.arange(rows.x_0.shape[1], device=index.device)
    u = uniform(key.seed, key.step, 1, index[:, None], positions[None, :])
    return process.corrupt(rows.x_0, t_min + (t_max - t_min) * level, u=u, can_change=rows.is_target)


def denoising_problem(process: Process, noised: Noised, rows: CleanRows) -> Problem:
    """Ask for the targets of x_t. `noised` may hold the rows several times over; their losses are then averaged."""
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


def problem_loss(
    denoiser: Denoiser,
    problem: Problem,
    *,
    num_rows: int,
    wrapped: Any = None,
    has_plain_head: bool = True,
    needs_rows: bool = False,
    is_sharded: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows"]]:
    """Run the model on a problem: return the sum over all answers, with gradient, and that of each clean row; nats.

    With `has_plain_head` (see `models.head`) head and loss are computed chunk by chunk, and the sums of the rows carry
    no gradient unless `needs_rows`. With sharded weights they are computed inside of the `wrapped` forward, and the
    rows never carry a gradient.
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
