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


@dataclass(frozen=True, kw_only=True)
class OptionScores:
    """The scores of all options, in their order, and how often the model ran for them."""

    scores: list[OptionScore]
    forwards: int


@torch.no_grad()
def score_options(
    denoiser: Denoiser,
    context: Int[Tensor, "c"],
    options: Sequence[Int[Tensor, "_"]],
    *,
    num_samples: int = 16,
    seed: int = 0,
) -> OptionScores:
    """Score the options after a context: log p(option | context) minus the logarithm of the sum over all options.

    Options of one token are compared exactly, in one forward with one mask. Longer ones are compared by their
    likelihood bounds, with `num_samples` masks each (`LikelihoodConfig`). An option's end token counts if it has one.
    The forwards of other threads that use the model meanwhile are counted too. Raises ValueError for options that are
    equal or empty, or fewer than two.
    """
    named = {tuple(option.tolist()) for option in options}
    if len(named) < max(2, len(options)) or () in named:
        raise ValueError(f"a decision needs at least two options, none empty or equal; got {len(options)}.")
    forwards: list[None] = []
    counting = denoiser.model.register_forward_hook(lambda *_: forwards.append(None))
    try:
        nats, errors = _likelihoods(denoiser, context, options, LikelihoodConfig(num_samples=num_samples, seed=seed))
    finally:
        counting.remove()
    log_p = torch.tensor(nats, dtype=torch.float64).log_softmax(dim=0)
    variances = torch.tensor(errors, dtype=torch.float64).square()
    # d log_p_i / d nats_j = [i = j] - p_j
    slopes = torch.eye(len(nats), dtype=torch.float64) - log_p.exp()
    spread = (slopes.square() @ variances).tolist()
    scores = [
        OptionScore(log_p=value, standard_error=math.sqrt(v)) for value, v in zip(log_p.tolist(), spread, strict=True)
    ]
    return OptionScores(scores=scores, forwards=len(forwards))


def _likelihoods(
    denoiser: Denoiser, context: Int[Tensor, "c"], options: Sequence[Int[Tensor, "_"]], config: LikelihoodConfig
) -> tuple[list[float], list[float]]:
    """Return log p(option | context) up to a constant, in nats, and the standard error of each."""
    if all(len(option) == 1 for option in options) and denoiser.settings.process == "masked":
        row = torch.cat([context, torch.tensor([denoiser.settings.mask_token_id])]).to(denoiser.device)
        logits = denoiser(Query(input_ids=row[None], where=torch.tensor([len(context)], device=row.device)))
        nats = logits[0].double().log_softmax(dim=-1)[torch.cat(list(options)).to(row.device)]
        return nats.tolist(), [0.0] * len(options)
    question = [Request(context=context, continuation=option) for option in options]
    [scores] = score_questions(denoiser, [question], config)
    return [score.nats for score in scores], [score.standard_error for score in scores]
