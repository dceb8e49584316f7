"""Preference optimisation for models whose likelihood is a bound: DPO (arXiv 2305.18290), VRPO (arXiv 2505.19223)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from redraft.likelihood.problem import CleanRows, NoiseKey, Objective, problem_loss
from redraft.models.denoiser import Denoiser


def preference_margins(policy: Float[Tensor, "rows"], reference: Float[Tensor, "rows"]) -> Float[Tensor, "pairs"]:
    """Return the policy's gain over the reference on the chosen answer, less that on the rejected one.

    Rows are bounds (NELBO, nats) of all chosen answers, then of all rejected ones. With B = -NELBO the margin is
    (B_policy - B_reference)(chosen) - (B_policy - B_reference)(rejected), nats (Eq. 4, arXiv 2505.19223).
    Raises ValueError for an odd number of rows.
    """
    if len(policy) % 2:
        raise ValueError(f"rows must be pairs, first all chosen, then all rejected; got {len(policy)} rows.")
    chosen, rejected = (reference - policy).chunk(2)
    return chosen - rejected


def preference_loss(margins: Float[Tensor, "pairs"], *, beta: float) -> Float[Tensor, "pairs"]:
    """Return -log sigmoid(beta * margin) of each pair (Eq. 7, arXiv 2305.18290)."""
    return -F.logsigmoid(beta * margins)


def bounds(
    denoiser: Denoiser,
    objective: Objective,
    rows: CleanRows,
    key: NoiseKey,
    *,
    num_samples: int,
    wrapped: Any = None,
    has_plain_head: bool = False,
) -> Float[Tensor, "rows"]:
    """Estimate the NELBO of each row by `num_samples` draws in one forward pass, in nats, with gradient.

    Each draw has its own time and mask, which VRPO found to be the best use of a budget; times are stratified over rows
    and draws together. Equal keys draw equal noise: give policy and reference the same key (VRPO's antithetic
    sampling). `has_plain_head`: compute head and loss in chunks (`models.head`).
    """
    count = len(rows.x_0)
    copies = replace(
        rows,
        x_0=rows.x_0.repeat(num_samples, 1),
        segment_ids=rows.segment_ids.repeat(num_samples, 1),
        is_target=rows.is_target.repeat(num_samples, 1),
    )
    shifted = torch.cat([key.rows + sample * key.total_rows for sample in range(num_samples)])
    drawn = replace(key, rows=shifted, total_rows=num_samples * key.total_rows)
    problem = objective.problem(copies, drawn)
    _, nats = problem_loss(
        denoiser, problem, num_rows=num_samples * count, wrapped=wrapped, has_plain_head=has_plain_head, needs_rows=True
    )
    return nats.view(num_samples, count).mean(dim=0)
