"""DiffusionGemma behind the denoiser's interface: a causal encoder for what is decided, a decoder for one canvas.

The encoder writes keys and values and nothing else; the decoder reads those before the canvas, and attends inside the
canvas in both directions. It may be told its own last prediction (self-conditioning).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import Slots, Spans, View
from redraft.models.denoiser import Denoiser
from redraft.models.head import head_at
from redraft.models.masks import additive_where_eager
from redraft.models.query import Query, SelfConditioning

MODEL_TYPES = {"diffusion_gemma"}


@dataclass(frozen=True)
class _Canvases:
    """Where canvases lie in a batch: canvas i holds `length` positions of row `rows[i]` from `starts[i]` on."""

    rows: Int[Tensor, "canvases"]
    starts: Int[Tensor, "canvases"]
    length: int

    @property
    def positions(self) -> Int[Tensor, "canvases length"]:
        """Positions of each canvas in its row."""
        return self.starts[:, None] + torch.arange(self.length, device=self.starts.device)


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the context as the decoder looks them up: it reads and never writes."""

    layers: list[Any]
    is_compileable: bool = False


@dataclass(frozen=True)
class _PrefixLayer:
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class EncoderDecoder(Denoiser):
    """A block of the layout is a canvas, and everything before it in its row is its context."""

    is_self_conditioned: ClassVar[bool] = True

    def __call__(self, query: Query, *, wrapped: Any = None) -> Float[Tensor, "n vocab"]:
        """Predict positions, each from the canvas it lies in and the row before that. Rows are padded on the right.

        With a view of slots, spans end with a canvas, and what they feed before it is encoded into the slots.
        """
        if query.isolate_segments or query.shift or wrapped is not None:
            raise self._no_training()
        query = self._counted(query)
        if query.view is not None:
            return self._from_slots(query, query.view)
        input_ids, length = query.input_ids, self._canvas_length(query.layout)
        batch, seq_len = input_ids.shape
        row, position = query.where // seq_len, query.where % seq_len
        origin = torch.zeros_like(input_ids[:, 0]) if query.grid_origin is None else query.grid_origin
        start = origin[row] + (position - origin[row]).div(length, rounding_mode="floor") * length
        found, of = torch.unique(torch.stack([row, start]), dim=1, return_inverse=True)
        spans = Spans(starts=[0] * batch, ends=[seq_len] * batch, key_ends=[seq_len] * batch, reads_all=False)
        view = Slots(batch, seq_len).view(spans, input_ids.device)
        self._encode(input_ids, view)
        is_seen = torch.ones_like(input_ids, dtype=torch.bool) if query.segment_ids is None else query.segment_ids > 0
        canvases = _Canvases(found[0], found[1], length)
        there = canvases.positions.clamp(max=seq_len - 1)
        is_real = is_seen[canvases.rows[:, None], there] & (canvases.positions == there)
        ids = input_ids[canvases.rows[:, None], there]
        return self._decode(of * length + position - start, ids, canvases, view, is_real, query.previous)

    def _from_slots(self, query: Query, view: View) -> Float[Tensor, "n vocab"]:
        input_ids, spans, device = query.input_ids, view.spans, query.input_ids.device
        if not len(query.where):  # a context alone
            self._encode(input_ids, view)
            return torch.empty(0, self.model.config.get_text_config().vocab_size, device=device)
        length = self._canvas_length(query.layout)
        first = [end - length for end in spans.ends]
        if any(start < end for start, end in zip(spans.starts, first, strict=True)):
            context = replace(spans, ends=first, key_ends=first)
            view = view.over(context, device)
            self._encode(input_ids[:, : context.num_queries], view)
        starts = torch.tensor(first, device=device)
        canvases = _Canvases(torch.arange(len(first), device=device), starts, length)
        skipped = starts - torch.tensor(spans.starts, device=device)
        row, fed = query.where // input_ids.shape[1], query.where % input_ids.shape[1]
        ids = input_ids.gather(1, skipped[:, None] + torch.arange(length, device=device))
        is_real = torch.ones_like(ids, dtype=torch.bool)
        return self._decode(row * length + fed - skipped[row], ids, canvases, view, is_real, query.previous)

    def _no_training(self) -> ValueError:
        return ValueError(f"{self.model.config.model_type} can be sampled from, and not be trained here.")

    def inputs(self, query: Query) -> dict[str, Any]:
        """Refuse what trains a decoder-only model."""
        raise self._no_training()

    def _canvas_length(self, layout: Layout | None) -> int:
        length = (layout or self.settings.layout).block_size
        if length is None:
            raise ValueError("this model denoises one canvas at a time; give layout=('block-causal', canvas length).")
        return length

    def _encode(self, input_ids: Int[Tensor, "batch query"], view: View) -> None:
        """Write keys and values of the view's spans, causally; a row that is shorter is filled up by anything."""
        if not max(view.spans.ends):
            return
        device = input_ids.device
        positions = view.positions.clamp(min=0)  # (B, Q)
        distance = positions[:, :, None] - torch.arange(view.num_keys, device=device)  # (B, Q, K)
        window = self.model.config.get_text_config().sliding_window
        masks = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < window)}
        self.model.model.encoder(
            input_ids=input_ids,
            attention_mask=self._masks(masks),
            position_ids=positions,
            past_key_values=view,
        )

    def _decode(
        self,
        fed: Int[Tensor, "n"],
        canvas_ids: Int[Tensor, "canvases length"],
        canvases: _Canvases,
        view: View,
        is_real: Bool[Tensor, "canvases length"],
        previous: SelfConditioning | None,
    ) -> Float[Tensor, "n vocab"]:
        """Denoise canvases over the slots before them; `fed` are the positions wanted, in canvases * length."""
        starts, slots = canvases.starts[:, None], view.slots
        slot = torch.arange(slots.num_positions if slots.layers else 0, device=canvas_ids.device)
        context = slot < starts  # (M, K)
        window = self.model.config.get_text_config().sliding_window
        near = context & (slot >= starts - (window - 1))  # as much as transformers' cache of a windowed layer keeps
        kinds = {"full_attention": context, "sliding_attention": near}
        masks = {
            kind: torch.cat([read, is_real], dim=1)[:, None].expand(-1, canvases.length, -1)
            for kind, read in kinds.items()
        }
        with head_at(self.model, fed):
            return self.model(
                decoder_input_ids=canvas_ids,
                past_key_values=self._prefix(view, canvases.rows),
                decoder_attention_mask=self._masks(masks),
                decoder_position_ids=canvases.positions,
                self_conditioning_logits=None if previous is None else previous.logits.to(self.model.dtype),
                self_conditioning_mask=None if previous is None else previous.is_told,
            ).logits

    def _prefix(self, view: View, rows: Int[Tensor, "canvases"]) -> _Prefix:
        """Show the slots of each canvas' row; without any context, keys and values of no length."""
        if view.slots.layers:
            shown = [(keys[:, :, :-1][rows], values[:, :, :-1][rows]) for keys, values in view.everything()]
            return _Prefix([_PrefixLayer(*pair) for pair in shown])
        config = self.model.config.get_text_config()
        empty = [
            torch.empty(len(rows), of.num_key_value_heads, 0, of.head_dim, device=rows.device, dtype=self.model.dtype)
            for of in (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
        ]
        return _Prefix([_PrefixLayer(states, states) for states in empty])

    def _masks(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        return {kind: additive_where_eager(self.model, mask[:, None]) for kind, mask in masks.items()}
