"""Caching: what to feed in each step, and which keys and values of earlier steps to read.

The planner works on the host's integers, a `Place` for each row; it changes them after a forward, not before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redraft.layouts import Layout
from redraft.models.cache import SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.sampling.policies.frontier import Blocks
from redraft.sampling.rows import Place
from redraft.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Decide what each row feeds, and which keys and values it reads.

    "exact" (block-causal attention): keys and values of finished blocks are final, so each is computed once. A step
    feeds what is not final, up to the end of the open blocks. So the first step feeds the prompt with the first block,
    and the first step of every other block feeds the finished block before it once more: no forward is spent on
    writing the cache alone. In a causal context nothing waits for the end of a block: keys and values are final once
    they were computed when all tokens up to theirs were committed. An open block that is causal as well (`within`)
    commits them one by one.

    "prefix" and "dual" (full attention; Fast-dLLM, Section 3.2 of arXiv 2505.22618): keys and values outside of the
    open blocks are taken to be as they were when these opened. The first step of a block feeds everything; the others
    feed the block and all after it ("prefix"), or the block alone ("dual").

    "dual" where blocks of the layout are decoded in parts (Fast-dLLM v2, arXiv 2509.26328): all before the block is
    exact; while the first token of a part is noise the whole block is fed, then the part alone. The whole block is fed
    at least once after its first token was decided.
    """

    kind: Literal["exact", "prefix", "dual"]
    shift: bool
    """Whether a position's logits come from its left neighbour, which then must be fed too."""
    layout: Layout
    is_steady: bool = False
    """Whether forwards of equal shapes are wanted, so that no token of an open block counts as final."""

    @classmethod
    def of(cls, sampler: Sampler, denoiser: Denoiser) -> "Planner | None":
        """Choose how keys and values are cached. Raises ValueError for a cache that the attention does not allow."""
        layout = sampler.layout_on(denoiser.settings)
        size = layout.block_size
        if sampler.cache == "none":
            return None
        if sampler.cache == "exact" and size is None:
            raise ValueError(
                "cache 'exact' needs block-causal attention, and this model attends to everything. Use 'prefix' "
                "or 'dual' (approximate), or 'none'."
            )
        parts = sampler.frontier.size if isinstance(sampler.frontier, Blocks) else None
        has_parts = layout.context == "block" and size is not None and parts is not None and parts < size
        if sampler.cache != "exact" and size is not None and not (sampler.cache == "dual" and has_parts):
            raise ValueError(
                f"cache {sampler.cache!r} approximates full attention, and this model is block-causal. Use 'exact'."
            )
        shift = (denoiser.settings.shift_logits or layout.context == "causal") and not layout.has_order
        return cls(kind=sampler.cache, shift=shift, layout=layout, is_steady=denoiser.is_compiled)

    def plan(self, places: Sequence[Place]) -> SlotSpans:
        """Lay out the next forward."""
        if self.layout.block_size is not None:
            return self._plan_exact(places)
        lengths = [place.length for place in places]
        starts = [max(0, place.start - self.shift) if _is_filled(place) else 0 for place in places]
        ends = [place.end if _is_filled(place) and self.kind == "dual" else place.length for place in places]
        return SlotSpans(starts=starts, ends=ends, key_ends=lengths, reads_all=len(set(lengths)) == 1)

    def _plan_exact(self, places: Sequence[Place]) -> SlotSpans:
        floor, size = self.layout.floor, self.layout.block_size
        assert size is not None
        starts = [max(0, place.final - self.shift) for place in places]
        block_ends = [floor(place.end - 1, place.origin) + size for place in places]
        key_ends = [
            min(place.length, place.end if self.layout.has_order else end)
            for place, end in zip(places, block_ends, strict=True)
        ]
        ends = list(key_ends)
        for row, place in enumerate(places):
            if self._feeds_part(place):
                starts[row], ends[row] = place.start, place.end
        edges = set(zip(starts, ends, key_ends, strict=True))
        in_one_block = (
            floor(start, place.origin) == floor(end - 1, place.origin)
            for start, end, place in zip(starts, ends, places, strict=True)
        )
        is_steady = max(end - start for start, end, _ in edges) <= 2 * size + self.shift
        reads_all = self.layout.context == "block" and len(edges) == 1 and all(in_one_block)
        return SlotSpans(starts=starts, ends=ends, key_ends=key_ends, reads_all=reads_all, is_steady=is_steady)

    def _feeds_part(self, place: Place) -> bool:
        """Tell whether the open part of a block is fed alone."""
        block = self.layout.floor(place.start, place.origin)
        return self.kind == "dual" and place.opened[0] >= block and place.unfinished > place.start

    def note(self, places: Sequence[Place]) -> None:
        """Note that the planned forward was made."""
        for place in places:
            place.opened, place.final = (place.start, place.end), 0
            if self.layout.block_size is not None:
                place.final = self.finished(place)
                if place.unfinished == place.committed(self.layout):  # the block's first token is noise
                    place.opened = (-1, -1)

    def finished(self, place: Place) -> int:
        """Count the positions whose keys and values are final once they are computed now."""
        if self.layout.within == "causal" and not self.is_steady:
            return place.unfinished
        return place.committed(self.layout)

    def has_prompt(self, place: Place) -> bool:
        """Tell whether a row has a slot with all of its finished blocks."""
        return place.slot >= 0 and place.final == self.finished(place)

    def next_end(self, place: Place, num_tokens: int | None) -> int:
        """Return how far a row is once it has been fed so many tokens: whole finished blocks, and at least one."""
        end = self.finished(place)
        if num_tokens is None:
            return end
        first = self.layout.floor(place.final, place.origin) + (self.layout.block_size or 0)
        return min(end, max(self.whole(place.final + num_tokens, place.origin), first))

    def whole(self, position: int, origin: int) -> int:
        """Return the end of the last unit before a position that is computed as one: of a token, or of a block."""
        return position if self.layout.context == "causal" else max(0, self.layout.floor(position, origin))


def _is_filled(place: Place) -> bool:
    """Tell whether the whole row was fed since its open blocks opened."""
    return place.opened == (place.start, place.end)
