"""DiffusionGemma behind the denoiser's interface: a causal encoder for what is decided, a decoder for one canvas.

The encoder writes keys and values and nothing else; the decoder reads those before the canvas, and attends inside the
canvas in both directions. It may be told its own last prediction (self-conditioning).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import Slots, Spans
from redraft.models.denoiser import Denoiser
from redraft.models.head import head_at
from redraft.models.masks import additive_where_eager

MODEL_TYPES = {"diffusion_gemma"}


@dataclass(frozen=True)
class SelfConditioning:
    """What the model predicted for the same canvases one step before."""

    logits: Float[Tensor, "canvases length vocab"]
    is_told: Bool[Tensor, "canvases"]
    """False where a canvas is new."""


@dataclass(frozen=True)
class _Canvases:
    """Where canvases lie in a batch: canvas i holds `length` positions of row `rows[i]` from `starts[i]` on."""

    rows: Int[Tensor, "canvases"]
    starts: Int[Tensor, "canvases"]
    length: int


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

    def logits_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        isolate_segments: bool = False,
        layout: Layout | None = None,
        shift: bool | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
        wrapped: Any = None,
        previous: SelfConditioning | None = None,
    ) -> Float[Tensor, "n vocab"]:
        """Predict positions, each from the canvas it lies in and the row before that. Rows are padded on the right."""
        if isolate_segments or shift or wrapped is not None:
            raise ValueError(f"{self.model.config.model_type} can be sampled from, and not be trained here.")
        batch, seq_len = input_ids.shape
        row, position = where // seq_len, where % seq_len
        origin = torch.zeros_like(input_ids[:, 0]) if grid_origin is None else grid_origin
        length = self._canvas_length(layout)
        start = origin[row] + (position - origin[row]).div(length, rounding_mode="floor") * length
        found, of = torch.unique(torch.stack([row, start]), dim=1, return_inverse=True)
        slots = Slots(seq_len)
        self._encode(input_ids, slots, starts=[0] * batch, ends=[seq_len] * batch)
        is_seen = torch.ones_like(input_ids, dtype=torch.bool) if segment_ids is None else segment_ids > 0
        canvases = _Canvases(found[0], found[1], length)
        return self._decode(of * length + position - start, input_ids, canvases, slots, is_seen, previous)

    def cached_logits_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        *,
        spans: Spans,
        slots: Slots,
        layout: Layout | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
        previous: SelfConditioning | None = None,
    ) -> Float[Tensor, "n vocab"]:
        """Predict the canvases that the spans end with; what they feed before them is encoded into the slots."""
        length, seq_len = self._canvas_length(layout), input_ids.shape[1]
        first = [end - length for end in spans.ends]
        if any(start < end for start, end in zip(spans.starts, first, strict=True)):
            self._encode(input_ids, slots, starts=spans.starts, ends=first)
        starts = torch.tensor(first, device=input_ids.device)
        canvases = _Canvases(torch.arange(len(first), device=input_ids.device), starts, length)
        row, position = where // seq_len, where % seq_len
        is_seen = spans.is_read(input_ids.device, spans.num_keys)
        return self._decode(row * length + position - starts[row], input_ids, canvases, slots, is_seen, previous)

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse what trains a decoder-only model."""
        raise ValueError(f"{self.model.config.model_type} can be sampled from, and not be trained here.")

    def _canvas_length(self, layout: Layout | None) -> int:
        length = (layout or self.settings.layout).block_size
        if length is None:
            raise ValueError("this model denoises one canvas at a time; give layout=('block-causal', canvas length).")
        return length

    def _encode(self, input_ids: Tensor, slots: Slots, *, starts: list[int], ends: list[int]) -> None:
        """Write keys and values of these spans, causally."""
        if not max(ends):
            return
        device = input_ids.device
        spans = Spans(starts=starts, ends=ends, key_ends=ends, reads_all=False)
        positions = spans.positions(device).clamp(min=0)  # (B, Q)
        slots.aim(spans, device)
        distance = positions[:, :, None] - torch.arange(spans.num_keys, device=device)  # (B, Q, K)
        window = self.model.config.get_text_config().sliding_window
        masks = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < window)}
        self.model.model.encoder(
            input_ids=input_ids.gather(1, positions),
            attention_mask=self._masks(masks),
            position_ids=positions,
            past_key_values=slots,
        )

    def _decode(
        self,
        fed: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        canvases: _Canvases,
        slots: Slots,
        is_seen: Bool[Tensor, "batch end"],
        previous: SelfConditioning | None,
    ) -> Float[Tensor, "n vocab"]:
        """Denoise canvases over the slots before them; `fed` are the positions wanted, in canvases * length."""
        device, (rows, starts) = input_ids.device, (canvases.rows, canvases.starts[:, None])
        positions = starts + torch.arange(canvases.length, device=device)  # (M, Q)
        there = positions.clamp(max=is_seen.shape[1] - 1)
        is_real = is_seen[rows[:, None], there] & (positions == there)
        slot = torch.arange(slots.num_positions if slots.layers else 0, device=device)
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
                decoder_input_ids=input_ids[rows[:, None], there],
                past_key_values=self._prefix(slots, rows),
                decoder_attention_mask=self._masks(masks),
                decoder_position_ids=positions,
                self_conditioning_logits=None if previous is None else previous.logits.to(self.model.dtype),
                self_conditioning_mask=None if previous is None else previous.is_told,
            ).logits

    def _prefix(self, slots: Slots, rows: Int[Tensor, "canvases"]) -> _Prefix:
        """Show the slots of each canvas' row; without any context, keys and values of no length."""
        if slots.layers:
            shown = [(layer.keys[rows, :, :-1], layer.values[rows, :, :-1]) for layer in slots.layers]
            return _Prefix([_PrefixLayer(*pair) for pair in shown])
        config = self.model.config.get_text_config()
        empty = [
            torch.empty(len(rows), of.num_key_value_heads, 0, of.head_dim, device=rows.device, dtype=self.model.dtype)
            for of in (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
        ]
        return _Prefix([_PrefixLayer(states, states) for states in empty])

    def _masks(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        return {kind: additive_where_eager(self.model, mask[:, None]) for kind, mask in masks.items()}
