"""Frontiers: which positions may change. A row's blocks open in ascending order."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from redraft.sampling.canvas import Status


@runtime_checkable
class Frontier(Protocol):
    """Number the block that each position of a canvas belongs to; a row's blocks open in ascending order."""

    @property
    def in_flight(self) -> int:
        """Unfinished blocks that are open at once."""
        ...

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]: ...


@dataclass(frozen=True, kw_only=True)
class WholeCanvas:
    """Everything is open from the start."""

    in_flight: int = 1

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        return torch.zeros_like(status, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class _OfSize:
    size: int
    in_flight: int = 1
    """Several: a later block is drafted while earlier ones are not finished (D2F, arXiv 2508.09192)."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.size}. Leave it out for the whole canvas.")
        if self.in_flight < 1:
            raise ValueError(f"blocks in flight must be at least 1; got {self.in_flight}.")


@dataclass(frozen=True, kw_only=True)
class Blocks(_OfSize):
    """Blocks of `size` positions that begin at the end of each row's prompt (LLaDA, arXiv 2502.09992)."""

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        positions = torch.arange(status.shape[1], device=status.device)
        return (positions - prompt_end(status)[:, None]).div(self.size, rounding_mode="floor")


@dataclass(frozen=True, kw_only=True)
class GridBlocks(_OfSize):
    """Blocks of `size` positions on the absolute grid, 0, size, 2 size, ... (SDAR, LLaDA2): the prompt's end is
    somewhere inside the first one that holds noise."""

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        positions = torch.arange(status.shape[1], device=status.device)
        return (positions // self.size).expand_as(status)


def prompt_end(status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the given positions that a row begins with."""
    return (status == Status.GIVEN).long().cumprod(dim=1).sum(dim=1)
