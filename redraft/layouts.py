"""Layouts: who attends to whom. `pair_rule` decides one pair; a boolean mask holds the decisions of all pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PairRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key): indices that broadcast -> whether the query attends to the key."""
Range = tuple[int, int]
Piece = tuple[tuple[Range, ...], tuple[Range, ...]]
"""Ranges of queries, and ranges that hold every key which these queries see."""

TOKENS_PER_PIECE = 128  # measured: benchmarks/results/training.md


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Bidirectional attention (`block_size=None`), or block-causal: bidirectional inside a block, causal over blocks.

    Blocks lie on the absolute grid of positions: block i holds positions [i * block_size, (i + 1) * block_size).

    In a causal `context`, committed text is a sequence of blocks of one token, as in an autoregressive model; only what
    is not committed yet attends in blocks (Nemotron-Labs-Diffusion). With `within` causal, an open block is causal as
    well, so that all attention is (I-DLM, arXiv 2604.11035).

    Two kinds of `within` attend causally over another order than that of positions, which a `Query` gives: "reordered",
    where decided tokens come before noise (WeDLM, arXiv 2512.22737), and "with-last", where the last committed token
    belongs to the open block, which begins anywhere (SDLM, arXiv 2509.24007).
    """

    block_size: int | None = None
    context: Literal["block", "causal"] = "block"
    within: Literal["full", "causal", "reordered", "with-last"] = "full"
    is_two_copy: bool = False
    """The input is [x_t ; x_0], both at the same positions: a noisy block sees itself and the clean blocks before it,
    the clean copy is committed text (arXiv 2503.09573). All blocks are trained in one forward pass."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}. Leave it out for full attention.")
        if self.context == "causal" and self.block_size is None:
            raise ValueError("a causal context needs a block_size: the tokens of an open block; got None. Set it.")
        if self.within != "full" and self.context != "causal":
            raise ValueError(f"within {self.within!r} needs context 'causal'; got context 'block'. Change one of them.")

    @property
    def has_order(self) -> bool:
        """Whether open blocks attend over an order of their own."""
        return self.within in ("reordered", "with-last")

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

    def block_begins(
        self, positions: Int[Tensor, "batch seq"], committed: Int[Tensor, "batch #seq"] | None = None
    ) -> Int[Tensor, "batch seq"]:
        """Return where the block of each position begins.

        Of a causal context: positions before `committed` (by default all) are blocks of one token, and no block
        reaches across it.
        """
        if self.block_size is None:
            return torch.zeros_like(positions)
        begins = positions - positions % self.block_size
        if self.context == "block":
            return begins
        return positions if committed is None else torch.maximum(begins, torch.minimum(positions, committed))

    def floor(self, position: int, origin: int) -> int:
        """Return where the block of a position begins on a grid from `origin`."""
        assert self.block_size is not None
        return origin + (position - origin) // self.block_size * self.block_size

    def pieces(self, length: int, *, is_aligned: bool) -> tuple[Piece, ...]:
        """Cut the queries into pieces, each with every key that one of its queries sees; () where one piece is enough.

        In [x_t ; x_0] a piece holds the same positions of both copies: they see nearly the same keys, the noisy ones of
        the piece and the clean ones up to its end. `is_aligned`: blocks begin at multiples of their size in the
        row. Otherwise (a grid per document) a block may cross a piece's edge, by less than its size.
        """
        if self.block_size is None:
            return ()
        row = length // 2 if self.is_two_copy else length
        step = self.block_size * max(1, TOKENS_PER_PIECE // self.block_size)
        reach = 0 if is_aligned else self.block_size - 1
        pieces: list[Piece] = []
        for start in range(0, row, step):
            stop, end = min(start + step, row), min(start + step + reach, row)
            if self.is_two_copy:
                queries: tuple[Range, ...] = ((start, stop), (row + start, row + stop))
                pieces.append((queries, ((max(0, start - reach), end), (row, row + end))))
            else:
                pieces.append((((start, stop),), ((0, end),)))
        return tuple(pieces) if len(pieces) > 1 else ()


def pair_rule(
    layout: Layout,
    positions: Int[Tensor, "batch seq"],
    *,
    committed: Int[Tensor, "batch 1"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    isolate_segments: bool = False,
) -> PairRule | None:
    """Return the rule that decides who attends to whom, in flex attention's form; None for full attention.

    In a causal context, positions before `committed` are committed; by default all, and in [x_t ; x_0] all of x_0.
    `segment_ids` numbers the documents of a row from 1; 0 is padding, which nothing attends to. Segments see each other
    unless `isolate_segments`. Every position attends to itself, so that padding rows stay finite. `positions` of a
    single row are those of all rows.
    """
    length = positions.shape[1]
    half = length // 2
    if layout.is_two_copy:
        committed = (torch.arange(length, device=positions.device) >= half)[None].expand_as(positions) * length
    begin = layout.block_begins(positions, committed)
    has_blocks = layout.block_size is not None or layout.is_two_copy
    if segment_ids is None and not has_blocks:
        return None

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_seen = key >= 0
        if segment_ids is not None:
            of_key = segment_ids[row, key]
            is_seen = of_key == segment_ids[row, query] if isolate_segments else of_key > 0
        if has_blocks:
            of = row if len(begin) > 1 else torch.zeros_like(row)
            later = begin[of, query] - begin[of, key]
            if layout.is_two_copy:
                is_seen = is_seen & _sees_copy(later, (query < half).long(), (key < half).long())
            else:
                is_seen = is_seen & (later >= 0)
            if layout.within == "causal":
                is_seen = is_seen & (positions[of, query] >= positions[of, key])
        return is_seen | (query == key)

    return sees


def attention_mask(
    layout: Layout,
    positions: Int[Tensor, "batch seq"],
    *,
    committed: Int[Tensor, "batch 1"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    isolate_segments: bool = False,
) -> Bool[Tensor, "batch 1 seq seq"] | None:
    """Build the boolean mask of `pair_rule`, which has the same arguments; None for full attention."""
    sees = pair_rule(layout, positions, committed=committed, segment_ids=segment_ids, isolate_segments=isolate_segments)
    if sees is None:
        return None
    row, index = (torch.arange(size, device=positions.device) for size in positions.shape)
    return sees(row[:, None, None], row[:1], index[:, None], index)[:, None]


def block_mask(
    layout: Layout,
    query_positions: Int[Tensor, "batch query"],
    key_positions: Int[Tensor, "batch key"],
    *,
    committed: Int[Tensor, "batch 1"] | None = None,
) -> Bool[Tensor, "batch query key"] | None:
    """Let a query attend to its own block and the blocks before it, as in `pair_rule`; None for full attention."""
    if layout.block_size is None:
        return None
    query, key = query_positions, key_positions
    if layout.within == "full":
        query, key = (layout.block_begins(positions, committed) for positions in (query, key))
    return query[:, :, None] >= key[:, None, :]


def two_copy_mask(
    block: Int[Tensor, "batch seq"], copy: Int[Tensor, "batch seq"], *, is_valid: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, "batch 1 seq seq"]:
    """Build the mask of clean and noisy copies of blocks in one sequence.

    A position attends to its own block in its own copy (0 is the clean one), and to the clean copy of earlier blocks:
    each noisy block is denoised after the true blocks before it, all of them in one pass. This generalises Section 3.1
    of arXiv 2503.09573 to any order in the sequence and several noisy copies. A position that is not valid is seen by
    itself alone.
    """
    is_seen = _sees_copy(block[:, :, None] - block[:, None, :], copy[:, :, None], copy[:, None, :])
    is_self = torch.eye(block.shape[1], dtype=torch.bool, device=block.device)
    return (is_seen & is_valid[:, None, :] | is_self)[:, None]


def segment_positions(segment_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Count positions from 0 in each run of equal segment ids."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_start = torch.ones_like(segment_ids, dtype=torch.bool)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def _sees_copy(later: Tensor, query_copy: Tensor, key_copy: Tensor) -> Tensor:
    """Let a query see its own copy of its own block, and the clean copy (0) of blocks before its own (`later` > 0)."""
    return (later == 0) & (query_copy == key_copy) | (later > 0) & (key_copy == 0)
