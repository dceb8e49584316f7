"""Scores: how confident each proposal is. The highest scores are committed first."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.sampling.policies.candidates import DRAW_ORDER, Candidates
from redraft.settings import Positive, Settings

Score = Callable[[Candidates], Float[Tensor, "n"]]
"""Rank the n proposals; larger is committed earlier."""


def confidence(candidates: Candidates) -> Float[Tensor, "n"]:
    """Return the probability of each proposed token (low-confidence remasking, Section 2.4 of arXiv 2502.09992)."""
    return candidates.proposal.confidence


def margin(candidates: Candidates) -> Float[Tensor, "n"]:
    """Subtract the second largest probability from the largest (`topk_margin` of Dream; arXiv 2502.06768)."""
    proposal = candidates.proposal
    top = (proposal.logits.topk(2, dim=-1).values.float() - proposal.log_normaliser[:, None]).exp()
    return top[:, 0] - top[:, 1]


def negative_entropy(candidates: Candidates) -> Float[Tensor, "n"]:
    """Return minus the entropy of each distribution, in nats (`entropy` of Dream)."""
    return -candidates.proposal.entropy()


def leftmost(candidates: Candidates) -> Float[Tensor, "n"]:
    """Commit from left to right (SDAR's sequential strategy)."""
    return -candidates.window.positions.to(candidates.proposal.confidence.dtype)


def random_order(candidates: Candidates) -> Float[Tensor, "n"]:
    """Commit in random order (random remasking, Algorithm 4 of arXiv 2502.09992).

    With `TopK(k=1)` this is first-hitting sampling (Section 4 of arXiv 2409.02908): as exact as ancestral sampling
    with infinitely many steps, with one forward per token.
    """
    return candidates.window.uniform(DRAW_ORDER).to(candidates.proposal.confidence.dtype)


@dataclass(frozen=True, kw_only=True)
class GumbelScore(Settings):
    """Another score over `temperature` plus Gumbel noise: the k best are then k draws without replacement.

    Dream's `alg_temp`. The noise is the Gumbel-top-k trick (arXiv 1903.06059) for its multinomial draw.
    """

    score: Score
    temperature: Positive

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        u = candidates.window.uniform(DRAW_ORDER).clamp(min=torch.finfo(torch.float64).tiny)
        return self.score(candidates) / self.temperature - torch.log(-torch.log(u)).float()


def certainty(candidates: Candidates) -> Float[Tensor, "n"]:
    """Return 1 - entropy / log(vocabulary), in [0, 1] (`entropy_conf` of SDLM)."""
    return 1 - candidates.proposal.entropy() / math.log(candidates.proposal.logits.shape[-1])
