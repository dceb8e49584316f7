"""Scores: how sure each proposal is. The surest are committed first."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import check_types
from redraft.sampling.policies.candidates import DRAW_ORDER, Candidates


@runtime_checkable
class Score(Protocol):
    """Rank the n proposals; larger is surer."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]: ...


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """The probability of the proposed token (low-confidence remasking, Section 2.4 of arXiv 2502.09992)."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return candidates.proposal.confidence


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The probability of the likeliest token less that of the second (`topk_margin` of Dream; arXiv 2502.06768)."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return candidates.proposal.margin()


@dataclass(frozen=True, kw_only=True)
class NegativeEntropy:
    """Minus the entropy of the distribution, in nats (`entropy` of Dream)."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return -candidates.proposal.entropy()


@dataclass(frozen=True, kw_only=True)
class Random:
    """Any order is as good as another (random remasking, Algorithm 4 of arXiv 2502.09992)."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return candidates.draws.uniform(DRAW_ORDER).to(candidates.proposal.confidence.dtype)


@dataclass(frozen=True, kw_only=True)
class LeftToRight:
    """Reading order, whatever the model thinks of it."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return -candidates.draws.positions.to(candidates.proposal.confidence.dtype)


@dataclass(frozen=True, kw_only=True)
class WithPositionPrior:
    """Another score less `weight` for each position to the left: a pull towards reading order."""

    score: Score
    weight: float = 0.01

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return self.score(candidates) + self.weight * LeftToRight()(candidates)


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """Another score over `temperature` plus Gumbel noise: the k best are then k draws without replacement.

    Dream's `alg_temp`. The noise is the Gumbel-top-k trick (arXiv 1903.06059) for its multinomial draw.
    """

    score: Score
    temperature: float

    def __post_init__(self) -> None:
        check_types(self)
        if not self.temperature > 0:
            raise ValueError(f"alg_temperature must be positive; got {self.temperature}. Leave it out for none.")

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        u = candidates.draws.uniform(DRAW_ORDER).clamp(min=torch.finfo(torch.float64).tiny)
        return self.score(candidates) / self.temperature - torch.log(-torch.log(u)).float()
