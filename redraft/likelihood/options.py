"""Choosing among a few answers by their likelihood, in one or two forwards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, score_questions
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query


@dataclass(frozen=True, kw_only=True)
class OptionScore:
    """How likely one of several answers is, given that it is one of them."""

    log_p: float
    """In nats; the probabilities of all options sum to 1."""
    standard_error: float
    """Of log_p, as if the options' estimates were independent; 0 where they are exact: options of one token, or so
    short that all their masks are summed."""


@torch.no_grad()
def score_options(
    denoiser: Denoiser,
    context: Int[Tensor, "c"],
    options: Sequence[Int[Tensor, "_"]],
    *,
    num_samples: int = 16,
    seed: int = 0,
) -> list[OptionScore]:
    """Score the options after a context: log p(option | context) minus the logarithm of the sum over all options.

    Options of one token are compared exactly, in one forward with one mask. Longer ones are compared by their
    likelihood bounds, with `num_samples` masks each (`LikelihoodConfig`). An option's end token counts if it has one.
    Raises ValueError for options that are equal or empty, or fewer than two.
    """
    named = {tuple(option.tolist()) for option in options}
    if len(named) < max(2, len(options)) or () in named:
        raise ValueError(f"a decision needs at least two options, none empty or equal; got {len(options)}.")
    if all(len(option) == 1 for option in options) and denoiser.settings.process == "masked":
        row = torch.cat([context, torch.tensor([denoiser.settings.mask_token_id])]).to(denoiser.device)
        logits = denoiser(Query(input_ids=row[None], where=torch.tensor([len(context)], device=row.device)))
        nats = logits[0].double().log_softmax(dim=-1)[torch.cat(list(options)).to(row.device)].tolist()
        errors = [0.0] * len(options)
    else:
        question = [Request(context=context, continuation=option) for option in options]
        [scores] = score_questions(denoiser, [question], LikelihoodConfig(num_samples=num_samples, seed=seed))
        nats, errors = [score.nats for score in scores], [score.standard_error for score in scores]
    log_p = torch.tensor(nats, dtype=torch.float64).log_softmax(dim=0)
    variances = torch.tensor(errors, dtype=torch.float64).square()
    # d log_p_i / d nats_j = [i = j] - p_j
    slopes = torch.eye(len(nats), dtype=torch.float64) - log_p.exp()
    spread = (slopes.square() @ variances).tolist()
    return [
        OptionScore(log_p=value, standard_error=math.sqrt(v)) for value, v in zip(log_p.tolist(), spread, strict=True)
    ]
