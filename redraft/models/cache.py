"""Keys and values of a canvas, one slot per position, written in place: transformers' cache interface, no copying."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Which positions a forward feeds and which keys it reads: contiguous in every row, and known to the host."""

    starts: list[int]
    """First position fed, per row."""
    ends: list[int]
    """One past the last position fed, per row."""
    key_ends: list[int]
    """Keys before this position are read, per row."""
    reads_all: bool
    """Whether every query reads every key in view, so that no mask is needed."""
    is_steady: bool = False
    """Whether forwards of this shape come in every block, so that compiling it pays."""

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

    def repeated(self, times: int) -> "Spans":
        """Lay copies of the batch one after the other."""
        return replace(self, starts=self.starts * times, ends=self.ends * times, key_ends=self.key_ends * times)

    def positions(self, device: torch.device) -> Int[Tensor, "batch query"]:
        """Lay the spans out as positions; what a shorter row lacks repeats its last position."""
        return torch.minimum(self._unbounded(device), torch.tensor(self.ends, device=device)[:, None] - 1)

    def slots(self, device: torch.device, *, spare: int) -> Int[Tensor, "batch query"]:
        """Say where keys and values are written: by position, and to a spare slot what only fills a row up."""
        return torch.where(self.is_fed(device), self.positions(device), spare)

    def is_fed(self, device: torch.device) -> Bool[Tensor, "batch query"]:
        """Tell the positions of a row from what fills it up."""
        return self._unbounded(device) < torch.tensor(self.ends, device=device)[:, None]

    def is_read(self, device: torch.device, num_keys: int) -> Bool[Tensor, "batch key"]:
        """Tell which of the first slots a row reads."""
        slots = torch.arange(num_keys, device=device)
        return slots < torch.tensor(self.key_ends, device=device)[:, None]

    def _unbounded(self, device: torch.device) -> Int[Tensor, "batch query"]:
        starts = torch.tensor(self.starts, device=device)[:, None]
        return starts + torch.arange(self.num_queries, device=device)


class Slots(Cache):
    """Keys and values by position. A forward writes what it feeds into the slots of its spans and reads what is there.

    Slots hold whatever was last written: what is read, and when it is final, is for the caller to plan.
    """

    layers: list[Any]

    def __init__(self, num_positions: int) -> None:
        super().__init__(layers=[])
        self.num_positions = num_positions
        self.spans: Spans | None = None
        self.is_static = False
        self._where: Tensor | None = None

    def aim(self, spans: Spans, device: torch.device, *, is_static: bool = False) -> None:
        """Set the spans of the coming forward; static: where they lie is a tensor alone, and all slots are in view."""
        self.spans, self.is_static = spans, is_static
        if is_static or not spans.is_even:
            self._where = spans.slots(device, spare=self.num_positions)  # one slot more than positions

    @property
    def num_keys(self) -> int:
        """Slots in view."""
        assert self.spans is not None
        return self.num_positions + 1 if self.is_static else self.spans.num_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and return all in view."""
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self))
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    def grown(self, num_positions: int) -> "Slots":
        """Copy what fits into as many positions."""
        other = Slots(num_positions)
        kept = min(num_positions, self.num_positions)
        for layer in self.layers:
            copy = SlotLayer(other)
            copy.lazy_initialization(layer.keys, layer.values)
            copy.keys[:, :, :kept], copy.values[:, :, :kept] = layer.keys[:, :, :kept], layer.values[:, :, :kept]
            other.layers.append(copy)
        return other

    def select(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep some rows, or repeat them."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, each (batch, heads, slots, dim)."""

    keys: Any
    values: Any

    def __init__(self, owner: Slots) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all positions at once, when the shapes are first seen."""
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], self.owner.num_positions + 1, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write in place; return views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        spans, is_static = self.owner.spans, self.owner.is_static
        assert spans is not None
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            if not is_static and spans.is_even:
                slots[:, :, spans.starts[0] : spans.ends[0]] = states
            else:
                rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
                slots[rows, :, self.owner._where] = states.transpose(1, 2)  # (B, Q, heads, dim)
        if is_static:  # no number of the spans may be looked at: it would be compiled in
            return self.keys, self.values
        return self.keys[:, :, : spans.num_keys], self.values[:, :, : spans.num_keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Say how many keys are in view, from slot 0 on."""
        return (self.owner.num_keys if self.owner.spans else query_length), 0

    def get_seq_length(self) -> int:
        """Say how many keys stand before the queries; positions are always given, so nobody counts from it."""
        return self.owner.spans.starts[0] if self.owner.spans else 0

    def get_max_length(self) -> int:
        """Say how many positions there are."""
        return self.owner.num_positions
