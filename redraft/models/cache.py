"""Keys and values by row and position, written in place: a pool of slots, and a view of it for each forward.

A slot is the place of one position's keys and values. A view is the cache that transformers sees in one forward.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache


@dataclass(frozen=True, kw_only=True)
class SlotSpans:
    """The slots that a forward writes and reads: one contiguous span per row. The numbers are on the host."""

    starts: list[int]
    """First slot written, per row."""
    ends: list[int]
    """One past the last slot written, per row."""
    key_ends: list[int]
    """Slots before this one are read, per row."""
    reads_all: bool
    """Whether every query reads every slot in view, so that no mask is needed."""
    is_steady: bool = False
    """Whether every block has forwards of this shape, so that compiling it pays."""

    @property
    def num_queries(self) -> int:
        """Longest span fed."""
        return max(end - start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def num_keys(self) -> int:
        """Slots in view."""
        return max(self.key_ends)

    @property
    def is_even(self) -> bool:
        """Whether all rows feed the same span."""
        return len(set(self.starts)) == 1 and len(set(self.ends)) == 1

    def repeated(self, times: int) -> "SlotSpans":
        """Repeat each row."""
        starts, ends, key_ends = (
            [number for number in numbers for _ in range(times)] for numbers in (self.starts, self.ends, self.key_ends)
        )
        return replace(self, starts=starts, ends=ends, key_ends=key_ends)

    def positions(self, device: torch.device) -> Int[Tensor, "batch query"]:
        """List the slots of each span; a shorter span repeats its last slot."""
        return torch.minimum(self._unbounded(device), torch.tensor(self.ends, device=device)[:, None] - 1)

    def is_fed(self, device: torch.device) -> Bool[Tensor, "batch query"]:
        """Tell the slots of a span from those that only fill up a shorter one."""
        return self._unbounded(device) < torch.tensor(self.ends, device=device)[:, None]

    def is_read(self, device: torch.device, num_keys: int) -> Bool[Tensor, "batch key"]:
        """Tell which of the first slots a row reads."""
        slots = torch.arange(num_keys, device=device)
        return slots < torch.tensor(self.key_ends, device=device)[:, None]

    def _unbounded(self, device: torch.device) -> Int[Tensor, "batch query"]:
        starts = torch.tensor(self.starts, device=device)[:, None]
        return starts + torch.arange(self.num_queries, device=device)


class Slots:
    """Keys and values of many rows, `num_positions` slots each and a spare one.

    Slots hold what was last written. The caller plans which slots are read, and when their content is final.
    """

    def __init__(self, num_rows: int, num_positions: int) -> None:
        self.num_rows, self.num_positions = num_rows, num_positions
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Of each layer keys and values, (rows, heads, slots, dim); made when their shapes are first seen."""

    @property
    def bytes_per_position(self) -> int:
        """Memory of a position of one row, in all layers; 0 before the first forward."""
        return sum(states[0, :, 0].nbytes for pair in self.layers for states in pair)

    def view(
        self,
        spans: SlotSpans,
        device: torch.device,
        *,
        first: int = 0,
        rows: list[int] | None = None,
        is_static: bool = False,
    ) -> "View":
        """View the rows from `first` on, or some `rows` in any order (their keys and values are copied when read).

        Static: all slots are in view, and a tensor holds the spans, so one compiled forward works for all spans.
        """
        return View(self, spans, device, first=first, rows=rows, is_static=is_static and bool(self.layers))

    def of_layer(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values."""
        while len(self.layers) <= layer:
            keys, values = (x.new_zeros(self.num_rows, x.shape[1], self.num_positions + 1, x.shape[3]) for x in like)
            self.layers.append((keys, values))
        return self.layers[layer]

    def reserve(self, num_rows: int, num_positions: int) -> None:
        """Make room for so many rows and positions. If slots must be copied, the number of rows at least doubles."""
        old_rows, old_positions = self.num_rows, self.num_positions
        if num_rows <= old_rows and num_positions <= old_positions:
            return
        if self.layers and num_rows > old_rows:
            num_rows = max(num_rows, 2 * old_rows)
        num_rows, num_positions = max(num_rows, old_rows), max(num_positions, old_positions)

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros(num_rows, old.shape[1], num_positions + 1, old.shape[3])
            new[:old_rows, :, :old_positions] = old[:, :, :old_positions]
            return new

        self.layers = [(grown(keys), grown(values)) for keys, values in self.layers]
        self.num_rows, self.num_positions = num_rows, num_positions  # only once the copies exist

    def copy(self, source: int, to: int, num_positions: int) -> None:
        """Copy the first positions of a row to another one."""
        for pair in self.layers:
            for states in pair:
                states[to, :, :num_positions] = states[source, :, :num_positions]

    def clear(self, row: int) -> None:
        """Forget what a row holds."""
        for pair in self.layers:
            for states in pair:
                states[row] = 0


class View(Cache):
    """Some rows of the slots in one forward, as a cache of transformers that writes in place."""

    def __init__(
        self,
        slots: Slots,
        spans: SlotSpans,
        device: torch.device,
        *,
        first: int,
        rows: list[int] | None,
        is_static: bool,
    ) -> None:
        super().__init__(layers=[])
        self.slots, self.spans, self.is_static = slots, spans, is_static
        self.num_keys = slots.num_positions + 1 if is_static else spans.num_keys
        self.positions = spans.positions(device)
        """Slots that are fed, (B, Q)."""
        self._first, self._row_list, end = first, rows, first + len(spans.starts)
        self._rows = slice(first, end) if rows is None else torch.tensor(rows, device=device)
        self._where: tuple[Tensor | slice, ...] = (self._rows, slice(None), slice(spans.starts[0], spans.ends[0]))
        self._is_contiguous = rows is None and spans.is_even and not is_static
        if not self._is_contiguous:
            index = self._rows if isinstance(self._rows, Tensor) else torch.arange(first, end, device=device)
            # A shorter span feeds repeated tokens: they go to the spare slot, so that they overwrite no real one.
            slot = torch.where(spans.is_fed(device), self.positions, slots.num_positions)
            self._where = (index[:, None], slice(None), slot)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, heads, Q, dim), and return all in view (B, heads, K, dim)."""
        in_view = []
        fed = (key_states, value_states)
        for pool, states in zip(self.slots.of_layer(layer_idx, fed), fed, strict=True):
            # Where rows or slots are given by index tensors, `_where` is (rows, slice, slots): torch puts the indexed
            # axes before the sliced one, so the place written to has the shape (B, Q, heads, dim).
            pool[self._where] = states if self._is_contiguous else states.transpose(1, 2)
            # A static view reads the whole pool: a compiled forward would be compiled anew for each `num_keys`.
            shown = pool if self.is_static else pool[:, :, : self.num_keys]
            # On CPUs `index_select` copies rows three times as fast as an index.
            in_view.append(shown.index_select(0, self._rows) if isinstance(self._rows, Tensor) else shown[self._rows])
        return in_view[0], in_view[1]

    def over(self, spans: SlotSpans, device: torch.device) -> "View":
        """View other spans of the same rows."""
        return self.slots.view(spans, device, first=self._first, rows=self._row_list)

    def everything(self) -> list[tuple[Tensor, Tensor]]:
        """Return all that the slots of these rows hold, layer by layer."""
        return [(keys[self._rows], values[self._rows]) for keys, values in self.slots.layers]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Say how many keys are in view, from slot 0 on."""
        return self.num_keys, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Say how many keys come before the queries. Positions are always given, so transformers does not use it."""
        return self.spans.starts[0]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Say how many positions there are."""
        return self.slots.num_positions
