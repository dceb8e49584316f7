"""The likelihood bound of a noised batch: what training minimises and evaluation reports."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.models.denoiser import Denoiser
from redraft.models.head import chunked_loss, output_embeddings
from redraft.processes.masked import MaskedDiffusion
from redraft.processes.noised import Noised
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


def draw_noise(
    process: MaskedDiffusion,
    x_0: Int[Tensor, "batch seq"],
    key: NoiseKey,
    *,
    can_change: Bool[Tensor, "batch seq"],
    t_min: float = SMALLEST_T,
    t_max: float = 1.0,
) -> Noised:
    """Corrupt a batch with times stratified over the global batch, t in (t_min, t_max].

    Which row gets which stratum is drawn too: windows in the order of their documents, and the processes that share a
    batch, all see every noise level. The default range is what a likelihood bound is taken over; it leaves out a
    thousandth of the noise levels.
    """
    rows = key.rows.to(x_0.device)
    offset = uniform(key.seed, key.step, 0)
    strata = uniform(key.seed, key.step, 2, torch.arange(key.total_rows)).argsort().to(x_0.device)
    t = stratified_times(
        strata[rows].to(torch.float64), total=key.total_rows, offset=offset.to(x_0.device), t_min=t_min, t_max=t_max
    )
    positions = torch.arange(x_0.shape[1], device=x_0.device)
    u = uniform(key.seed, key.step, 1, rows[:, None], positions[None, :])
    return process.corrupt(x_0, t, u=u, can_change=can_change)


def nelbo(
    denoiser: Denoiser,
    process: MaskedDiffusion,
    noised: Noised,
    *,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    isolate_segments: bool = False,
    wrapped: Any = None,
    has_plain_head: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch"]]:
    """Sample the negative evidence lower bound: its sum over the batch, with gradient, and each row's, detached; nats.

    The head runs at noised positions only, in chunks where `has_plain_head` (see `models.head`).
    """
    where = noised.targets()
    targets = noised.flatten()[where]
    if has_plain_head:
        hidden = denoiser.hidden_at(
            where,
            noised.x_t,
            segment_ids=segment_ids,
            isolate_segments=isolate_segments,
            wrapped=wrapped,
        )
        head = output_embeddings(denoiser.model)
        total, losses = chunked_loss(head, hidden, lambda logits, rows: process.loss(logits, targets[rows]))
    else:
        logits = denoiser.logits_at(
            where,
            noised.x_t,
            segment_ids=segment_ids,
            isolate_segments=isolate_segments,
            wrapped=wrapped,
        )
        live = process.loss(logits, targets)
        total, losses = live.sum(), live.detach()
    batch, seq = noised.x_t.shape
    return total, losses.new_zeros(batch).index_add(0, where // seq, losses)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A Monte-Carlo mean with its standard error, in nats per token, and the same in bits per byte."""

    nats_per_token: float
    standard_error: float
    bits_per_byte: float | None = None

    def __str__(self) -> str:
        text = f"{self.nats_per_token:.4f} ± {self.standard_error:.4f} nats per token"
        return text if self.bits_per_byte is None else f"{text}, {self.bits_per_byte:.3f} bits per byte"
