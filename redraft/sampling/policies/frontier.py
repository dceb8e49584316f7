"""Frontiers: which positions may change. A row's blocks open in ascending order."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from redraft.sampling.canvas import Status
from redraft.settings import Count, Settings


@runtime_checkable
class Frontier(Protocol):
    """Number the block that each position of a canvas belongs to; a row's blocks open in ascending order."""

    in_flight: int
    """Unfinished blocks that are open at once."""

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]: ...


@dataclass(frozen=True, kw_only=True)
class Blocks(Settings, Frontier):
    """Blocks of `size` positions; without a size, the whole canvas is one block.

    They begin at the end of each row's prompt (LLaDA, arXiv 2502.09992), or lie on the absolute grid 0, size, 2 size
    (SDAR, LLaDA2): the prompt then ends somewhere inside the first block that holds noise.
    """

    size: Count | None = None
    on_grid: bool = False
    in_flight: Count = 1
    """With more than 1, a later block is drafted while earlier ones are not finished (D2F, arXiv 2508.09192)."""

    def blocks(self, status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        positions = torch.arange(status.shape[1], device=status.device).expand_as(status)
        start = 0 if self.on_grid else prompt_end(status)[:, None]
        return torch.zeros_like(positions) if self.size is None else (positions - start) // self.size


def prompt_end(status: UInt8[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Count the given positions that a row begins with."""
    return (status == Status.GIVEN).long().cumprod(dim=1).sum(dim=1)
