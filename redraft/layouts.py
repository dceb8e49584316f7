"""Layouts: who attends to whom. A layout is a boolean mask (True = may attend) over query and key positions."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Bidirectional attention (`block_size=None`), or block-causal: bidirectional inside a block, causal over blocks.

    Blocks lie on the absolute grid of positions: block i holds positions [i * block_size, (i + 1) * block_size).
    """

    block_size: int | None = None
    is_two_copy: bool = False
    """The input is [x_t ; x_0], both at the same positions: a noisy block sees itself and the clean blocks before it,
    the clean copy sees itself block-causally (arXiv 2503.09573). All blocks are trained in one forward pass."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}. Leave it out for full attention.")

    @classmethod
    def parse(cls, layout: "Layout | str | tuple[str, int]") -> "Layout":
        """Read the public spelling: "full" or ("block-causal", block_size)."""
        if isinstance(layout, Layout):
            return layout
        if layout == "full":
            return cls()
        if isinstance(layout, tuple) and len(layout) == 2 and layout[0] == "block-causal":
            return cls(block_size=layout[1])
        raise ValueError(f'layout must be "full" or ("block-causal", block_size); got {layout!r}.')


def attention_mask(
    layout: Layout,
    positions: Int[Tensor, "batch seq"],
    *,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    isolate_segments: bool = False,
) -> Bool[Tensor, "batch 1 seq seq"] | None:
    """Build the mask of a layout, or None where everything attends to everything.

    `segment_ids` numbers the documents of a row from 1; 0 is padding, which nothing attends to. Segments see each other
    unless `isolate_segments`. Every position attends to itself, so that padding rows stay finite.
    """
    mask: Tensor | None = None
    if segment_ids is not None and isolate_segments:
        mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    elif segment_ids is not None:
        mask = (segment_ids > 0)[:, None, :].expand(-1, positions.shape[1], -1)
    causal = _both_copies(layout, positions) if layout.is_two_copy else block_mask(layout, positions, positions)
    if causal is not None:
        mask = causal if mask is None else mask & causal
    if mask is None:
        return None
    is_self = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    return (mask | is_self)[:, None]


def block_mask(
    layout: Layout, query_positions: Int[Tensor, "batch query"], key_positions: Int[Tensor, "batch key"]
) -> Bool[Tensor, "batch query key"] | None:
    """Let a query attend to its own block and the blocks before it; None for full attention."""
    if layout.block_size is None:
        return None
    query_block, key_block = (
        positions.div(layout.block_size, rounding_mode="floor") for positions in (query_positions, key_positions)
    )
    return query_block[:, :, None] >= key_block[:, None, :]


def two_copy_mask(
    block: Int[Tensor, "batch seq"], copy: Int[Tensor, "batch seq"], *, is_valid: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, "batch 1 seq seq"]:
    """Build the mask of clean and noisy copies of blocks in one sequence.

    A position attends to its own block in its own copy (0 is the clean one), and to the clean copy of earlier blocks:
    each noisy block is denoised after the true blocks before it, all of them in one pass (arXiv 2503.09573, Section
    3.1, of which this is the general form: any order in the sequence, several noisy copies). Nothing attends to
    positions that are not valid but themselves.
    """
    is_own = (block[:, :, None] == block[:, None, :]) & (copy[:, :, None] == copy[:, None, :])
    is_earlier = (block[:, :, None] > block[:, None, :]) & (copy == 0)[:, None, :]
    is_self = torch.eye(block.shape[1], dtype=torch.bool, device=block.device)
    return ((is_own | is_earlier) & is_valid[:, None, :] | is_self)[:, None]


def segment_positions(segment_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Count positions from 0 in each run of equal segment ids."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_start = torch.ones_like(segment_ids, dtype=torch.bool)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def _both_copies(layout: Layout, positions: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Build the mask of [x_t ; x_0] from the positions of both copies, one behind the other."""
    is_noisy = torch.arange(positions.shape[1], device=positions.device) < positions.shape[1] // 2
    block = positions // (layout.block_size or positions.shape[1])
    copy = is_noisy.long().expand_as(positions)
    return two_copy_mask(block, copy, is_valid=torch.ones_like(positions, dtype=torch.bool))[:, 0]
