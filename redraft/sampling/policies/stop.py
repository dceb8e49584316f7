"""Stopping: which rows are done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status


@runtime_checkable
class Stop(Protocol):
    """Say which rows are done. Only decided tokens count: drafts may still change."""

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]: ...


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A row is done when everything is decided."""

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]:
        return ~_is_undecided(canvas).any(dim=1)


@dataclass(frozen=True, kw_only=True)
class EndOfSequence:
    """A row is done when it is filled, or when a committed EOS has everything before it decided."""

    eos_token_id: int

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]:
        is_eos = (canvas.tokens == self.eos_token_id) & (canvas.status == Status.COMMITTED)
        return (is_eos & _has_all_before(canvas)).any(dim=1) | Filled()(canvas)


@dataclass(frozen=True, kw_only=True)
class StopStrings:
    """A row is done when the decided text from its first new token on holds one of the strings, or by another rule."""

    strings: tuple[str, ...]
    decode: Callable[[Int[Tensor, "new"]], str]
    otherwise: Stop

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "batch"]:
        is_new = (canvas.status == Status.COMMITTED) & _has_all_before(canvas)
        texts = [self.decode(tokens[new]) for tokens, new in zip(canvas.tokens, is_new, strict=True)]  # sync: text
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, device=canvas.tokens.device) | self.otherwise(canvas)


def _is_undecided(canvas: Canvas) -> Bool[Tensor, "batch seq"]:
    return canvas.is_noise | canvas.is_draft


def _has_all_before(canvas: Canvas) -> Bool[Tensor, "batch seq"]:
    """Find the positions up to which everything is decided."""
    return ~_is_undecided(canvas).long().cummax(dim=1).values.bool()
