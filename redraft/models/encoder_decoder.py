"""DiffusionGemma behind the denoiser's interface: a causal encoder for what is decided, a decoder for one canvas.

The encoder writes keys and values and nothing else; the decoder reads those before the canvas, and attends inside the
canvas in both directions. It may be given its own last prediction (self-conditioning).
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import Slots, SlotSpans, View
from redraft.models.denoiser import Denoiser
from redraft.models.head import select_head_rows
from redraft.models.masks import additive_where_eager
from redraft.models.query import Query, SelfConditioning

MODEL_TYPES = {"diffusion_gemma"}


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
        length = (query.layout or self.settings.layout).block_size
        if length is None:
            raise ValueError("this model denoises one canvas at a time; give layout=('block-causal', canvas length).")
        if query.view is not None:
            return self._from_slots(query, query.view, length)
        input_ids = query.input_ids
        batch, seq_len = input_ids.shape
        row, position = query.where // seq_len, query.where % seq_len
        origin = torch.zeros_like(input_ids[:, 0]) if query.grid_origin is None else query.grid_origin
        start = origin[row] + (position - origin[row]).div(length, rounding_mode="floor") * length
        # Each canvas that holds a wanted position is denoised once, however many of its positions are wanted.
        (rows, starts), canvas = torch.unique(torch.stack([row, start]), dim=1, return_inverse=True)
        spans = SlotSpans(starts=[0] * batch, ends=[seq_len] * batch, key_ends=[seq_len] * batch, reads_all=False)
        view = Slots(batch, seq_len).view(spans, input_ids.device)
        self._encode(input_ids, view)
        positions = starts[:, None] + torch.arange(length, device=input_ids.device)  # (canvases, length)
        inside = positions.clamp(max=seq_len - 1)  # the last canvas may reach beyond its row
        is_real = inside == positions
        if query.segment_ids is not None:
            is_real = is_real & (query.segment_ids[rows[:, None], inside] > 0)
        fed = canvas * length + position - start
        return self._decode(fed, input_ids[rows[:, None], inside], rows, positions, view, is_real, query.previous)

    def _from_slots(self, query: Query, view: View, length: int) -> Float[Tensor, "n vocab"]:
        input_ids, spans, device = query.input_ids, view.spans, query.input_ids.device
        if not len(query.where):  # a context alone
            self._encode(input_ids, view)
            return torch.empty(0, self.model.config.get_text_config().vocab_size, device=device)
        first = [end - length for end in spans.ends]
        if any(start < end for start, end in zip(spans.starts, first, strict=True)):
            context = replace(spans, ends=first, key_ends=first)
            view = view.over(context, device)
            self._encode(input_ids[:, : context.num_queries], view)
        starts = torch.tensor(first, device=device)
        skipped = starts - torch.tensor(spans.starts, device=device)  # what a row feeds before its canvas
        row, fed = query.where // input_ids.shape[1], query.where % input_ids.shape[1]
        offsets = torch.arange(length, device=device)
        ids = input_ids.gather(1, skipped[:, None] + offsets)
        rows, is_real = torch.arange(len(first), device=device), torch.ones_like(ids, dtype=torch.bool)
        fed = row * length + fed - skipped[row]
        return self._decode(fed, ids, rows, starts[:, None] + offsets, view, is_real, query.previous)

    def _no_training(self) -> ValueError:
        return ValueError(f"{self.model.config.model_type} can be sampled from, but not trained or scored.")

    def _inputs(self, query: Query, positions: Int[Tensor, "batch query"], layout: Layout) -> dict[str, Any]:
        """Refuse: only training and scoring of decoder-only models build inputs this way."""
        raise self._no_training()

    def _encode(self, input_ids: Int[Tensor, "batch query"], view: View) -> None:
        """Write keys and values of the view's spans, causally; shorter rows are filled with any tokens."""
        if not max(view.spans.ends):
            return
        positions = view.positions.clamp(min=0)  # (B, Q)
        distance = positions[:, :, None] - torch.arange(view.num_keys, device=input_ids.device)  # (B, Q, K)
        window = self.model.config.get_text_config().sliding_window
        self.model.model.encoder(
            input_ids=input_ids,
            attention_mask=self._masks(distance >= 0, (distance >= 0) & (distance < window)),
            position_ids=positions,
            past_key_values=view,
        )

    def _decode(
        self,
        fed: Int[Tensor, "n"],
        ids: Int[Tensor, "canvases length"],
        rows: Int[Tensor, "canvases"],
        positions: Int[Tensor, "canvases length"],
        view: View,
        is_real: Bool[Tensor, "canvases length"],
        previous: SelfConditioning | None,
    ) -> Float[Tensor, "n vocab"]:
        """Denoise canvases over the slots before them; `fed` are the positions wanted, in canvases * length."""
        starts, slots = positions[:, :1], view.slots
        slot = torch.arange(slots.num_positions if slots.layers else 0, device=ids.device)
        window = self.model.config.get_text_config().sliding_window
        context = slot < starts  # (canvases, K)
        near = context & (slot >= starts - (window - 1))  # as much as transformers' cache of a windowed layer keeps
        masks = (torch.cat([read, is_real], dim=1)[:, None].expand(-1, ids.shape[1], -1) for read in (context, near))
        with select_head_rows(self.model, fed):
            return self.model(
                decoder_input_ids=ids,
                past_key_values=self._prefix(view, rows),
                decoder_attention_mask=self._masks(*masks),
                decoder_position_ids=positions,
                self_conditioning_logits=None if previous is None else previous.logits.to(self.model.dtype),
                self_conditioning_mask=None if previous is None else previous.is_present,
            ).logits

    def _prefix(self, view: View, rows: Int[Tensor, "canvases"]) -> Any:
        """Show the slots of each canvas' row, to be read and never written; without a context, of no length."""
        if view.slots.layers:
            shown = [(keys[:, :, :-1][rows], values[:, :, :-1][rows]) for keys, values in view.everything()]
        else:
            config = self.model.config.get_text_config()
            layers = (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
            like = {"device": rows.device, "dtype": self.model.dtype}
            empty = (torch.empty(len(rows), of.num_key_value_heads, 0, of.head_dim, **like) for of in layers)
            shown = [(states, states) for states in empty]
        layers_of = [SimpleNamespace(keys=keys, values=values) for keys, values in shown]
        return SimpleNamespace(layers=layers_of, is_compileable=False)

    def _masks(self, full: Bool[Tensor, "batch query key"], near: Bool[Tensor, "batch query key"]) -> dict[str, Tensor]:
        """Give each kind of layer its mask."""
        kinds = {"full_attention": full, "sliding_attention": near}
        return {kind: additive_where_eager(self.model, mask[:, None]) for kind, mask in kinds.items()}
