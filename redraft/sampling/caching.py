"""Caching: what to feed in each step, and which keys and values of earlier steps to read.

Planners work on the host's integers, a `Place` for each row; they change it when a forward was made, not before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from redraft.layouts import Layout
from redraft.models.cache import SlotSpans


@dataclass(eq=False)
class Place:
    """Where a row stands, in positions, and what is cached of it."""

    length: int
    """Positions of the row."""
    origin: int = 0
    """Where block 0 of the layout's grid begins."""
    unfinished: int = 0
    """First position that is not decided."""
    start: int = 0
    """First position of the open blocks."""
    end: int = 0
    """One past the last position of the open blocks."""
    is_finished: bool = True
    """Whether these are, so that others are to be opened."""
    reach: int = 0
    """One past all that is open or a draft, and past the first undecided position behind the open blocks."""
    slot: int = -1
    """Row of the slots; -1 while it has none."""
    final: int = 0
    """Positions whose keys and values are final."""
    opened: tuple[int, int] = (-1, -1)
    """Open blocks as of the last forward."""
    age: int = 0
    """Forwards since everything was fed."""


@dataclass(frozen=True, kw_only=True)
class ExactPlanner:
    """Block-causal attention: keys and values of finished blocks are final, so each is computed once.

    A step feeds what is not final, up to the end of the open blocks. So the first step feeds the prompt with the first
    block, and the first step of every other block feeds the block before it once more, now that it is finished: no
    forward is spent on writing the cache alone.
    """

    layout: Layout
    shift: bool
    """Whether logits come from the left neighbour, which then must be fed too."""

    def plan(self, places: Sequence[Place]) -> SlotSpans:
        starts = [max(0, place.final - self.shift) for place in places]
        ends = [min(place.length, self.floor(place.end - 1, place.origin) + self._size) for place in places]
        edges = list(zip(starts, ends, strict=True))
        in_one_block = (
            self.floor(start, place.origin) == self.floor(end - 1, place.origin)
            for (start, end), place in zip(edges, places, strict=True)
        )
        is_steady = max(end - start for start, end in edges) <= 2 * self._size + self.shift
        reads_all = len(set(edges)) == 1 and all(in_one_block)
        return SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=reads_all, is_steady=is_steady)

    def note(self, places: Sequence[Place]) -> None:
        for place in places:
            place.final = self.finished(place)

    def finished(self, place: Place) -> int:
        """Count the positions of whole blocks that are decided."""
        return max(0, self.floor(place.unfinished, place.origin))

    def after(self, place: Place) -> int:
        """Find the end of the first block that is not final."""
        return self.floor(place.final, place.origin) + self._size

    def floor(self, position: int, origin: int) -> int:
        """Find where the block of a position begins."""
        return origin + (position - origin) // self._size * self._size

    @property
    def _size(self) -> int:
        assert self.layout.block_size is not None
        return self.layout.block_size


@dataclass(frozen=True, kw_only=True)
class ApproximatePlanner:
    """Full attention: keys and values outside of the open blocks are taken to be as they were when these opened.

    Fast-dLLM (Section 3.2 of arXiv 2505.22618). The first step of a block feeds everything, as does every
    `refresh`-th step after it; the others feed the block alone ("dual"), or the block and all after it ("prefix").
    """

    is_dual: bool
    shift: bool
    refresh: int | None = None

    def plan(self, places: Sequence[Place]) -> SlotSpans:
        pairs = [(place, self._is_fresh(place)) for place in places]
        starts = [max(0, place.start - self.shift) if fresh else 0 for place, fresh in pairs]
        ends = [place.end if fresh and self.is_dual else place.length for place, fresh in pairs]
        lengths = [place.length for place in places]
        return SlotSpans(starts=starts, ends=ends, key_ends=lengths, reads_all=len(set(lengths)) == 1)

    def note(self, places: Sequence[Place]) -> None:
        for place in places:
            place.age = place.age + 1 if self._is_fresh(place) else 0
            place.opened = (place.start, place.end)

    def _is_fresh(self, place: Place) -> bool:
        """Tell whether keys and values are as they were when the open blocks opened."""
        is_same = place.opened == (place.start, place.end)
        return is_same and (self.refresh is None or place.age + 1 < self.refresh)


Planner = ExactPlanner | ApproximatePlanner
