"""Caching: what to feed in each step, and which keys and values of earlier steps to read.

The planner works on the host's integers, a `Place` for each row; it changes them after a forward, not before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redraft.models.cache import SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.sampling.rows import Place
from redraft.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Decide what each row feeds, and which keys and values it reads.

    "exact" (block-causal attention): keys and values of finished blocks are final, so each is computed once. A step
    feeds what is not final, up to the end of the open blocks. So the first step feeds the prompt with the first block,
    and the first step of every other block feeds the finished block before it once more: no forward is spent on
    writing the cache alone.

    "prefix" and "dual" (full attention; Fast-dLLM, Section 3.2 of arXiv 2505.22618): keys and values outside of the
    open blocks are taken to be as they were when these opened. The first step of a block feeds everything; the others
    feed the block and all after it ("prefix"), or the block alone ("dual").
    """

    kind: Literal["exact", "prefix", "dual"]
    shift: bool
    """Whether a position's logits come from its left neighbour, which then must be fed too."""
    block_size: int = 1
    """Of the attention, where it is block-causal."""

    @classmethod
    def of(cls, sampler: Sampler, denoiser: Denoiser) -> "Planner | None":
        """Choose how keys and values are cached. Raises ValueError for a cache that the attention does not allow."""
        size = (sampler.layout or denoiser.settings.layout).block_size
        if sampler.cache == "none":
            return None
        if sampler.cache == "exact" and size is None:
            raise ValueError(
                "cache 'exact' needs block-causal attention, and this model attends to everything. Use 'prefix' "
                "or 'dual' (approximate), or 'none'."
            )
        if sampler.cache != "exact" and size is not None:
            raise ValueError(
                f"cache {sampler.cache!r} approximates full attention, and this model is block-causal. Use 'exact'."
            )
        return cls(kind=sampler.cache, shift=denoiser.settings.shift_logits, block_size=size or 1)

    def plan(self, places: Sequence[Place]) -> SlotSpans:
        """Lay out the next forward."""
        if self.kind == "exact":
            return self._plan_exact(places)
        lengths = [place.length for place in places]
        starts = [max(0, place.start - self.shift) if _is_filled(place) else 0 for place in places]
        ends = [place.end if _is_filled(place) and self.kind == "dual" else place.length for place in places]
        return SlotSpans(starts=starts, ends=ends, key_ends=lengths, reads_all=len(set(lengths)) == 1)

    def _plan_exact(self, places: Sequence[Place]) -> SlotSpans:
        starts = [max(0, place.final - self.shift) for place in places]
        ends = [min(place.length, self.floor(place.end - 1, place.origin) + self.block_size) for place in places]
        edges = set(zip(starts, ends, strict=True))
        in_one_block = (
            self.floor(start, place.origin) == self.floor(end - 1, place.origin)
            for start, end, place in zip(starts, ends, places, strict=True)
        )
        is_steady = max(end - start for start, end in edges) <= 2 * self.block_size + self.shift
        reads_all = len(edges) == 1 and all(in_one_block)
        return SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=reads_all, is_steady=is_steady)

    def note(self, places: Sequence[Place]) -> None:
        """Note that the planned forward was made."""
        for place in places:
            place.opened = (place.start, place.end)
            place.final = self.finished(place) if self.kind == "exact" else 0

    def finished(self, place: Place) -> int:
        """Count the positions of whole blocks that are decided."""
        return max(0, self.floor(place.unfinished, place.origin))

    def has_prompt(self, place: Place) -> bool:
        """Tell whether a row has a slot with all of its finished blocks."""
        return place.slot >= 0 and place.final == self.finished(place)

    def next_end(self, place: Place, num_tokens: int | None) -> int:
        """Return how far a row is once it has been fed so many tokens: whole finished blocks, and at least one."""
        end = self.finished(place)
        if num_tokens is None:
            return end
        first = self.floor(place.final, place.origin) + self.block_size
        return min(end, max(self.floor(place.final + num_tokens, place.origin), first))

    def floor(self, position: int, origin: int) -> int:
        """Return where the block of a position begins."""
        return origin + (position - origin) // self.block_size * self.block_size


def _is_filled(place: Place) -> bool:
    """Tell whether the whole row was fed since its open blocks opened."""
    return place.opened == (place.start, place.end)
