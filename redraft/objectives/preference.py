"""Preference optimisation for models whose likelihood is a bound: DPO (arXiv 2305.18290), VRPO (arXiv 2505.19223)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from redraft.likelihood import CleanRows, NoiseKey, Objective, solve
from redraft.models.denoiser import Denoiser


def preference_loss(
    policy: Float[Tensor, "rows"], reference: Float[Tensor, "rows"], *, beta: float
) -> Float[Tensor, "pairs"]:
    """Return -log sigmoid(beta * margin) of each pair; rows are all chosen answers, then all rejected ones, in nats.

    The margin is how much more the policy has gained over the reference on the chosen answer than on the rejected one:
    (B_policy - B_reference)(chosen) - (B_policy - B_reference)(rejected), with B = -NELBO (Eq. 4, arXiv 2505.19223).
    """
    if len(policy) % 2:
        raise ValueError(f"rows must be pairs, first all chosen, then all rejected; got {len(policy)} rows.")
    chosen, rejected = (reference - policy).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))


def shared_bounds(
    policy: Denoiser, reference: Denoiser, objective: Objective, rows: CleanRows, key: NoiseKey, *, num_samples: int
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Estimate the NELBO of each row under both models on the same noise, in nats; the policy's carries gradient.

    Each of `num_samples` draws has a time and a mask of its own, and both models see the same: what VRPO found to give
    the least variance. The times of a row are strata of one partition.
    """
    totals = []
    for sample in range(num_samples):
        drawn = replace(key, rows=key.rows + sample * key.total_rows, total_rows=num_samples * key.total_rows)
        problem = objective.problem(rows, drawn)
        _, live = solve(policy, problem, num_rows=len(rows.x_0), has_plain_head=False)
        with torch.no_grad():
            _, fixed = solve(reference, problem, num_rows=len(rows.x_0), has_plain_head=False)
        totals.append(torch.stack([live, fixed]))
    bounds = torch.stack(totals).mean(dim=0)
    return bounds[0], bounds[1]


def vrpo_loss(
    policy: Denoiser,
    reference: Denoiser,
    objective: Objective,
    rows: CleanRows,
    key: NoiseKey,
    *,
    beta: float,
    num_samples: int = 8,
) -> Float[Tensor, "pairs"]:
    """Return the loss of each pair; `rows` are all chosen answers, then all rejected ones, each after its prompt."""
    bounds = shared_bounds(policy, reference, objective.evaluation(), rows, key, num_samples=num_samples)
    return preference_loss(*bounds, beta=beta)
