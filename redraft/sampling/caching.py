"""Caching: what to feed in each step, and which keys and values of earlier steps to read.

A planner lives for one generation. It works on the host's integers, one small list per step.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from redraft.layouts import Layout
from redraft.models.cache import Spans


@dataclass(frozen=True)
class Bounds:
    """Where a row stands, in positions."""

    unfinished: int
    """First position that is not decided."""
    start: int
    """First position of the open blocks."""
    end: int
    """One past the last position of the open blocks."""
    length: int
    """Positions of the row."""
    origin: int = 0
    """Where block 0 of the layout's grid begins."""


@runtime_checkable
class Planner(Protocol):
    """Plan each step's spans."""

    def plan(self, rows: list[Bounds]) -> Spans: ...

    def keep(self, places: list[int]) -> None:
        """Forget all rows but those at these places of the batch."""


@dataclass(kw_only=True)
class ExactPlanner:
    """Block-causal attention: keys and values of finished blocks are final, so each is computed once.

    A step feeds what is not final, up to the end of the open blocks. So the first step feeds the prompt with the first
    block, and the first step of every other block feeds the block before it once more, now that it is finished: no
    forward is spent on writing the cache alone.
    """

    layout: Layout
    shift: bool
    """Whether logits come from the left neighbour, which then must be fed too."""
    final: list[int] = field(default_factory=list)
    """Positions of each row whose keys and values are final."""

    def plan(self, rows: list[Bounds]) -> Spans:
        self.final = self.final or [0] * len(rows)
        starts = [max(0, final - self.shift) for final in self.final]
        ends = [min(row.length, self._grid_end(row)) for row in rows]
        self.final = [max(0, self._floor(row.unfinished, row.origin)) for row in rows]
        is_even = len(set(zip(starts, ends, strict=True))) == 1
        in_one_block = all(
            self._floor(start, row.origin) == self._floor(end - 1, row.origin)
            for start, end, row in zip(starts, ends, rows, strict=True)
        )
        longest = max(end - start for start, end in zip(starts, ends, strict=True))
        assert self.layout.block_size is not None
        return Spans(
            starts=starts,
            ends=ends,
            key_ends=ends,
            reads_all=is_even and in_one_block,
            is_steady=longest <= 2 * self.layout.block_size + self.shift,
        )

    def keep(self, places: list[int]) -> None:
        self.final = [self.final[place] for place in places] if self.final else []

    def begin_after(self, position: int, rows: list[Bounds]) -> None:
        """Take what stands in the slots before `position` as final, as far as whole finished blocks go."""
        self.final = [max(0, self._floor(min(position, row.unfinished), row.origin)) for row in rows]

    def prompt_spans(self, rows: list[Bounds]) -> Spans | None:
        """Feed nothing but each row's finished blocks; None where a row has none."""
        ends = [self._floor(row.unfinished, row.origin) for row in rows]
        if min(ends) <= 0:
            return None
        return Spans(starts=[0] * len(rows), ends=ends, key_ends=ends, reads_all=False)

    def _floor(self, position: int, origin: int) -> int:
        assert self.layout.block_size is not None
        return origin + (position - origin) // self.layout.block_size * self.layout.block_size

    def _grid_end(self, row: Bounds) -> int:
        assert self.layout.block_size is not None
        return self._floor(row.end - 1, row.origin) + self.layout.block_size


@dataclass(kw_only=True)
class ApproximatePlanner:
    """Full attention: keys and values outside of the open blocks are taken to be as they were when these opened.

    Fast-dLLM (Section 3.2 of arXiv 2505.22618). The first step of a block feeds everything, as does every
    `refresh`-th step after it; the others feed the block alone ("dual"), or the block and all after it ("prefix").
    """

    is_dual: bool
    shift: bool
    refresh: int | None = None
    opened: list[tuple[int, int]] = field(default_factory=list)
    """Open blocks of each row, as of its last step."""
    age: list[int] = field(default_factory=list)
    """Steps since everything was fed."""

    def plan(self, rows: list[Bounds]) -> Spans:
        now = [(row.start, row.end) for row in rows]
        before = self.opened or [(-1, -1)] * len(rows)
        ages = self.age or [0] * len(rows)
        is_fresh = [
            new == old and (self.refresh is None or age + 1 < self.refresh)
            for new, old, age in zip(now, before, ages, strict=True)
        ]
        self.opened = now
        self.age = [age + 1 if fresh else 0 for age, fresh in zip(ages, is_fresh, strict=True)]
        starts = [max(0, row.start - self.shift) if fresh else 0 for row, fresh in zip(rows, is_fresh, strict=True)]
        ends = [row.end if fresh and self.is_dual else row.length for row, fresh in zip(rows, is_fresh, strict=True)]
        lengths = [row.length for row in rows]
        return Spans(starts=starts, ends=ends, key_ends=lengths, reads_all=len(set(lengths)) == 1)

    def keep(self, places: list[int]) -> None:
        self.opened = [self.opened[place] for place in places] if self.opened else []
        self.age = [self.age[place] for place in places] if self.age else []
