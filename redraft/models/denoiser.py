"""The denoiser: a canvas in, logits out. The only place that knows how a model wants to be called."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout, attention_mask, block_mask, segment_positions
from redraft.models.attention import Attention, flex_mask
from redraft.models.cache import Slots, Spans
from redraft.models.device import can_compile
from redraft.models.head import RowLoss, head_at, head_skipped, loss_as_logits
from redraft.models.masks import first_position, layer_masks, model_masks
from redraft.models.settings import DiffusionSettings


@dataclass(frozen=True)
class Denoiser:
    """One transformers model, called without a causal mask."""

    model: Any
    settings: DiffusionSettings
    is_self_conditioned: ClassVar[bool] = False
    """Whether it is told its last prediction (`previous=`)."""
    is_compiled: bool = False
    """Whether the model's body was compiled: then forwards with a cache keep one shape in every block."""

    attention: Attention = "mask"
    """How whole rows are attended to; another than "mask" is set up by `choose_attention`."""

    def compiled(self) -> "Denoiser":
        """Compile the model's body for fixed shapes. Raises ValueError where no compiler is found.

        The first forward of each shape takes from seconds to a minute; a generation with the exact cache has two that
        come again (one block, and two when one is finished), and one with the whole canvas has one.
        """
        if not can_compile():
            raise ValueError(
                "compile=True needs a GPU with Triton or a C++ compiler; found neither g++ nor clang++ nor cl. Leave "
                "it out."
            )
        self.model.base_model.compile(dynamic=False)
        return replace(self, is_compiled=True)

    @property
    def can_append(self) -> bool:
        """Whether `appended_logits_at` works: the model keeps keys and values, and is told its positions."""
        return {"past_key_values", "position_ids"} <= set(signature(self.model.forward).parameters)

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
        shift: bool | None = None,
        grid_origin: Int[Tensor, "batch"] | None = None,
        wrapped: Any = None,
    ) -> Float[Tensor, "n vocab"]:
        """Predict the positions of `where` alone (indices into batch * seq): the head runs nowhere else.

        `shift` overrules the model's own logit shift, `grid_origin` moves each row's grid of blocks. `wrapped` is the
        model as a trainer wraps it (DDP), to be called in its place.
        """
        inputs = self.inputs(
            input_ids,
            segment_ids=segment_ids,
            isolate_segments=isolate_segments,
            layout=layout,
            grid_origin=grid_origin,
        )
        positions = self._positions(input_ids, segment_ids, isolate_segments, layout)
        with head_at(self.model, self._rows(where, positions, layout, shift)):
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
        is_static = self.is_compiled and spans.is_steady and bool(slots.layers)
        slots.aim(spans, device, is_static=is_static)
        keys = torch.arange(slots.num_keys, device=device).expand(len(input_ids), -1)
        mask = None
        if is_static or not spans.reads_all:
            origin = torch.zeros_like(input_ids[:, 0]) if grid_origin is None else grid_origin
            causal = block_mask(layout or self.settings.layout, positions - origin[:, None], keys - origin[:, None])
            read = spans.is_read(device, slots.num_keys)[:, None].expand(-1, positions.shape[1], -1)
            mask = (read if causal is None else read & causal)[:, None]
        row, position = where // input_ids.shape[1], where % input_ids.shape[1]
        starts = torch.tensor(spans.starts, device=device)
        fed = row * positions.shape[1] + self._predictors(position) - starts[row]
        once = self.is_compiled and not is_static  # a shape that does not come again is not worth compiling
        with head_at(self.model, fed), torch.compiler.set_stance("force_eager") if once else nullcontext():
            return self.model(
                input_ids=input_ids.gather(1, positions),
                attention_mask=model_masks(self.model, mask, positions, keys),
                position_ids=positions + first_position(self.model.config),
                past_key_values=slots,
                use_cache=True,
            ).logits

    def appended_logits_at(
        self,
        where: Int[Tensor, "n"],
        input_ids: Int[Tensor, "1 query"],
        *,
        positions: Int[Tensor, "1 query"],
        key_positions: Int[Tensor, "1 key"],
        mask: Bool[Tensor, "1 1 query key"],
        slots: Slots,
        start: int,
    ) -> Float[Tensor, "n vocab"]:
        """Feed tokens at any positions, under any mask, into the slots from `start` on; read the logits at `where`.

        `where` counts the tokens fed; a logit shift is the caller's.
        """
        end = start + input_ids.shape[1]
        slots.aim(Spans(starts=[start], ends=[end], key_ends=[end], reads_all=False), input_ids.device)
        with head_at(self.model, where):
            return self.model(
                input_ids=input_ids,
                attention_mask=model_masks(self.model, mask, positions, key_positions),
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
        layout: Layout | None = None,
        shift: bool | None = None,
        wrapped: Any = None,
    ) -> Float[Tensor, "n dim"]:
        """Return what enters the head at `where`, for `head.chunked_loss`."""
        positions = self._positions(input_ids, segment_ids, isolate_segments, layout)
        inputs = self.inputs(input_ids, segment_ids=segment_ids, isolate_segments=isolate_segments, layout=layout)
        with head_skipped(self.model, self._rows(where, positions, layout, shift)) as captured:
            (self.model if wrapped is None else wrapped)(**inputs)
        assert captured.hidden is not None
        return captured.hidden

    def loss_at(
        self,
        where: Int[Tensor, "n"],
        row_loss: RowLoss,
        input_ids: Int[Tensor, "batch seq"],
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        isolate_segments: bool = False,
        layout: Layout | None = None,
        shift: bool | None = None,
        wrapped: Any,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
        """Take `head.chunked_loss` at `where` inside of the `wrapped` forward, where sharded weights are whole."""
        positions = self._positions(input_ids, segment_ids, isolate_segments, layout)
        inputs = self.inputs(input_ids, segment_ids=segment_ids, isolate_segments=isolate_segments, layout=layout)
        with loss_as_logits(self.model, self._rows(where, positions, layout, shift), row_loss) as losses:
            total = wrapped(**inputs).logits.sum()
        return total, losses[0]

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
        positions = self._positions(input_ids, segment_ids, isolate_segments, layout)
        counted = positions + first_position(self.model.config)
        inputs = {"input_ids": input_ids, "position_ids": counted, "use_cache": False}
        layout = layout or self.settings.layout
        segments: dict[str, Any] = {"segment_ids": segment_ids, "isolate_segments": isolate_segments}
        if grid_origin is not None:
            mask = attention_mask(layout, positions - grid_origin[:, None], **segments)
            return inputs | {"attention_mask": model_masks(self.model, mask, positions, positions)}
        if self.attention != "mask" and segment_ids is None:
            positions = positions[:1]  # alike in all rows
        if self.attention == "flex" and self._has_no_window(positions):
            return inputs | {"attention_mask": flex_mask(layout, positions, **segments)}
        masks = model_masks(self.model, attention_mask(layout, positions, **segments), positions, positions)
        pieces = layout.pieces(positions.shape[1], is_aligned=not isolate_segments)
        more = {"pieces": pieces} if pieces and self.attention == "pieces" else {}
        return inputs | {"attention_mask": masks} | more

    def _has_no_window(self, positions: Int[Tensor, "batch seq"]) -> bool:
        return layer_masks(self.model.config.get_text_config(), None, positions, positions) is None

    def _positions(
        self,
        input_ids: Int[Tensor, "batch seq"],
        segment_ids: Int[Tensor, "batch seq"] | None,
        isolate_segments: bool,
        layout: Layout | None,
    ) -> Int[Tensor, "batch seq"]:
        """Count positions over the row, or in each isolated segment; both copies of [x_t ; x_0] are counted alike."""
        is_two_copy = (layout or self.settings.layout).is_two_copy
        length = input_ids.shape[1] // 2 if is_two_copy else input_ids.shape[1]
        if isolate_segments and segment_ids is not None:
            positions = segment_positions(segment_ids[:, :length])
        else:
            positions = torch.arange(length, device=input_ids.device).expand(len(input_ids), -1)
        return positions.repeat(1, 2) if is_two_copy else positions

    def _rows(
        self, where: Int[Tensor, "n"], positions: Int[Tensor, "batch seq"], layout: Layout | None, shift: bool | None
    ) -> Int[Tensor, "n"]:
        """Find the positions whose logits predict `where`: themselves, or their left neighbours.

        What is first in its segment has no neighbour. The left neighbour of a noisy block is the clean block before it.
        """
        if not (self.settings.shift_logits if shift is None else shift):
            return where
        position, layout = positions.flatten()[where], layout or self.settings.layout
        rows = where - (position > 0).to(where.dtype)
        if not layout.is_two_copy or layout.block_size is None:
            return rows
        is_first = (position > 0) & (position % layout.block_size == 0)
        return rows + is_first.to(where.dtype) * (positions.shape[1] // 2)

    def _predictors(self, positions: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Find the positions whose logits predict these: themselves, or their left neighbours."""
        if not self.settings.shift_logits:
            return positions
        return (positions - 1).clamp(min=0)
