"""Policies: small frozen dataclasses that say where, how sure, how many, and when to stop. None calls a model."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.propose import Proposal
from redraft.schedules import Linear, Schedule


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is open in each row, and how far the row is through its current block."""

    is_open: Bool[Tensor, "batch seq"]
    """Noise that may be committed now."""
    step: Int[Tensor, "batch"]
    """Steps the row has taken in this block."""
    num_steps: Int[Tensor, "batch"]
    """Steps the row is to take in this block."""


@runtime_checkable
class Frontier(Protocol):
    """Number the block that each position belongs to; a row's blocks open in ascending order."""

    def blocks(self, canvas: Canvas) -> Int[Tensor, "batch seq"]: ...


@dataclass(frozen=True, kw_only=True)
class WholeCanvas:
    """Everything is open from the start."""

    def blocks(self, canvas: Canvas) -> Int[Tensor, "batch seq"]:
        return torch.zeros_like(canvas.tokens)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of `size` positions that begin at the end of each row's prompt (LLaDA, arXiv 2502.09992)."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.size}. Leave it out for the whole canvas.")

    def blocks(self, canvas: Canvas) -> Int[Tensor, "batch seq"]:
        positions = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        was_given = canvas.status == Status.GIVEN
        prompt_end = was_given.long().cumprod(dim=1).sum(dim=1, keepdim=True)
        return (positions - prompt_end).clamp(min=0) // self.size


@runtime_checkable
class Score(Protocol):
    """Say how sure each proposal is; the surest are committed first."""

    def __call__(self, proposal: Proposal, u: Float[Tensor, "n"]) -> Float[Tensor, "n"]: ...


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """The probability of the proposed token (low-confidence remasking, Section 2.4 of arXiv 2502.09992)."""

    def __call__(self, proposal: Proposal, u: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return proposal.confidence


@dataclass(frozen=True, kw_only=True)
class Random:
    """Any order is as good as another (random remasking, Algorithm 4 of arXiv 2502.09992)."""

    def __call__(self, proposal: Proposal, u: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return u.to(proposal.confidence.dtype)


@runtime_checkable
class Unmask(Protocol):
    """Choose what to commit among the open positions; at least one where any is open."""

    def __call__(self, score: Float[Tensor, "batch seq"], window: Window) -> Bool[Tensor, "batch seq"]: ...


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Commit as many as the schedule asks: (alpha_s - alpha_t) / (1 - alpha_t) of what is left, at times t -> s.

    Rounded half to even, at least one; the last step of a block commits all that is left. With the linear schedule this
    is LLaDA's even quota.
    """

    schedule: Schedule = field(default_factory=Linear)

    def __call__(self, score: Float[Tensor, "batch seq"], window: Window) -> Bool[Tensor, "batch seq"]:
        num_left = window.is_open.sum(dim=1)
        left = (window.num_steps - window.step).clamp(min=1).to(torch.float64)
        t = left / window.num_steps
        s = (left - 1) / window.num_steps
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        share = num_left * (alpha_s - alpha_t) / (1 - alpha_t)
        count = share.round(decimals=9).round()  # the first rounding puts 10.500000000000002 back on the half
        count = torch.where(left == 1, num_left, count.clamp(min=1).long())
        return best(score, window.is_open, count)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Commit the k surest in every step, however many steps that takes."""

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k}.")

    def __call__(self, score: Float[Tensor, "batch seq"], window: Window) -> Bool[Tensor, "batch seq"]:
        return best(score, window.is_open, torch.full_like(window.step, self.k))


def best(
    score: Float[Tensor, "batch seq"], is_open: Bool[Tensor, "batch seq"], count: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch seq"]:
    """Pick each row's `count` best open positions; of equals the leftmost."""
    order = score.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
    is_chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(is_open).scatter(1, order, is_chosen) & is_open


@runtime_checkable
class Stop(Protocol):
    """Say which rows are done."""

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]: ...


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A row is done when no noise is left."""

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]:
        return ~canvas.is_noise.any(dim=1)


@dataclass(frozen=True, kw_only=True)
class EndOfSequence:
    """A row is done when it is filled, or when a committed EOS has everything before it decided."""

    eos_token_id: int

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]:
        is_eos = (canvas.tokens == self.eos_token_id) & (canvas.status == Status.COMMITTED)
        is_decided = ~canvas.is_noise.long().cummax(dim=1).values.bool()
        return (is_eos & is_decided).any(dim=1) | Filled()(canvas)
