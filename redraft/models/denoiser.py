"""The denoiser: a canvas in, logits out. The only place that knows how a model wants to be called."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.layouts import Layout, attention_mask, block_mask, segment_positions
from redraft.models.cache import Slots, Spans
from redraft.models.head import head_at, head_skipped
from redraft.models.masks import first_position, model_masks
from redraft.models.settings import DiffusionSettings


@dataclass(frozen=True)
class Denoiser:
    """One transformers model, called without a causal mask."""

    model: Any
    settings: DiffusionSettings

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return next(self.model.parameters()).device

    def logits(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        layout: Layout | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Predict every position, in the model's dtype, shifted where the model asks for it."""
        everywhere = torch.arange(input_ids.numel(), device=input_ids.device)
        logits = self.logits_at(everywhere, input_ids, segment_ids=segment_ids, layout=layout)
        return logits.view(*input_ids.shape, -1)

    def logits_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        isolate_segments: bool = False,
        layout: Layout | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
        wrapped: Any = None,
    ) -> Float[Tensor, "n vocab"]:
        """Predict the positions of `where` alone (indices into batch * seq): the head runs nowhere else.

        `grid_origin` moves each row's grid of blocks. `wrapped` is the model as a trainer wraps it (DDP), to be called
        in its place.
        """
        inputs = self.inputs(
            input_ids,
            segment_ids=segment_ids,
            isolate_segments=isolate_segments,
            layout=layout,
            grid_origin=grid_origin,
        )
        with head_at(self.model, self._rows(where, input_ids.shape[1])):
            return (self.model if wrapped is None else wrapped)(**inputs).logits

    def cached_logits_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        *,
        spans: Spans,
        slots: Slots,
        layout: Layout | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "n vocab"]:
        """Predict positions of `where` by feeding the spans alone, over the keys and values in the slots."""
        device = input_ids.device
        positions = spans.positions(device)  # (B, Q)
        keys = torch.arange(spans.num_keys, device=device).expand(len(input_ids), -1)
        mask = None
        if not spans.reads_all:
            origin = torch.zeros_like(input_ids[:, 0]) if grid_origin is None else grid_origin
            causal = block_mask(layout or self.settings.layout, positions - origin[:, None], keys - origin[:, None])
            read = spans.is_read(device)[:, None].expand(-1, positions.shape[1], -1)
            mask = (read if causal is None else read & causal)[:, None]
        slots.aim(spans, device)
        row, position = where // input_ids.shape[1], where % input_ids.shape[1]
        starts = torch.tensor(spans.starts, device=device)
        fed = row * positions.shape[1] + self._predictors(position) - starts[row]
        with head_at(self.model, fed):
            return self.model(
                input_ids=input_ids.gather(1, positions),
                attention_mask=model_masks(self.model, mask, positions, keys),
                position_ids=positions + first_position(self.model.config),
                past_key_values=slots,
                use_cache=True,
            ).logits

    def hidden_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        isolate_segments: bool = False,
        wrapped: Any = None,
    ) -> Float[Tensor, "n dim"]:
        """Return what enters the head at `where`, for `head.chunked_loss`."""
        inputs = self.inputs(input_ids, segment_ids=segment_ids, isolate_segments=isolate_segments)
        with head_skipped(self.model, self._rows(where, input_ids.shape[1])) as captured:
            (self.model if wrapped is None else wrapped)(**inputs)
        assert captured.hidden is not None
        return captured.hidden

    def inputs(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        isolate_segments: bool = False,
        layout: Layout | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
    ) -> dict[str, Any]:
        """Build the arguments of the model's forward. `segment_ids` as in `layouts.attention_mask`."""
        if isolate_segments and segment_ids is not None:
            positions = segment_positions(segment_ids)
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        mask = attention_mask(
            layout or self.settings.layout,
            positions if grid_origin is None else positions - grid_origin[:, None],
            segment_ids=segment_ids,
            isolate_segments=isolate_segments,
        )
        masks = model_masks(self.model, mask, positions, positions)
        counted = positions + first_position(self.model.config)
        return {"input_ids": input_ids, "attention_mask": masks, "position_ids": counted, "use_cache": False}

    def _rows(self, where: Int[Tensor, "n"], seq_len: int) -> Int[Tensor, "n"]:
        """Find the positions whose logits predict `where`, in the flattened batch."""
        position = where % seq_len
        return where - position + self._predictors(position)

    def _predictors(self, positions: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Find the positions whose logits predict these: themselves, or their left neighbours."""
        if not self.settings.shift_logits:
            return positions
        return (positions - 1).clamp(min=0)
