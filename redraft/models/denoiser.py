"""The denoiser: a query in, logits out. The only place that knows how a model is called."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from threading import RLock
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.layouts import Layout, attention_mask, block_mask, segment_positions
from redraft.models.attention import Attention, flex_mask
from redraft.models.cache import View
from redraft.models.device import can_compile
from redraft.models.gate import OPEN, is_gated
from redraft.models.head import AtHead, RowLoss, head_is_plain, select_head_rows
from redraft.models.masks import first_position, layer_masks, model_masks
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

_STANCE = RLock()
"""`torch.compiler.set_stance` acts on the whole process: two threads that set it at once would leave it set."""


@dataclass(frozen=True)
class Denoiser:
    """One transformers model, called with masks of ours; several threads may call it."""

    model: Any
    settings: DiffusionSettings
    is_self_conditioned: ClassVar[bool] = False
    """Whether it is given its last prediction (`Query.previous`)."""
    is_compiled: bool = False
    """Whether the model's body was compiled: then forwards with a cache have one shape in every block."""
    attention: Attention = "mask"
    """How whole rows attend; `choose_attention` sets up "pieces" and "flex"."""

    def compiled(self) -> "Denoiser":
        """Compile the model's body for fixed shapes. Raises ValueError where no compiler is found.

        The first forward of each shape takes from seconds to a minute. A generation with the exact cache has two shapes
        (one block, and two blocks when one is finished), a generation with the whole canvas has one.
        """
        if not can_compile():
            raise ValueError(
                "compile=True needs a GPU with Triton or a C++ compiler; found neither g++ nor clang++ nor cl. Leave "
                "it out."
            )
        self.model.base_model.compile(dynamic=False)
        return replace(self, is_compiled=True)

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether logits are the head's own output, so that it may be called on some of `hidden` alone."""
        return head_is_plain(self.model)

    @property
    def can_append(self) -> bool:
        """Whether a query may have a view of slots: the model takes a cache and positions."""
        return {"past_key_values", "position_ids"} <= set(signature(self.model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return next(self.model.parameters()).device

    def __call__(self, query: Query, *, wrapped: Any = None) -> Float[Tensor, "n vocab"]:
        """Predict the positions of `query.where`, in the model's dtype.

        `wrapped` is the model as a trainer wraps it (DDP), to be called in its place.
        """
        return self._run(query, wrapped)[0]

    def hidden(self, query: Query, *, wrapped: Any = None) -> Float[Tensor, "n dim"]:
        """Return what enters the head, for `head.chunked_loss`."""
        _, at_head = self._run(query, wrapped, is_skipped=True)
        assert at_head.hidden is not None
        return at_head.hidden

    def loss(self, query: Query, row_loss: RowLoss, *, wrapped: Any) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
        """Take `head.chunked_loss` inside of the `wrapped` forward, where sharded weights are whole."""
        total, at_head = self._run(query, wrapped, row_loss=row_loss)
        assert at_head.losses is not None
        return total.sum(), at_head.losses

    def logits(self, input_ids: Int[Tensor, "batch seq"], **others: Any) -> Float[Tensor, "batch seq vocab"]:
        """Predict every position of whole rows; `others` are further fields of the query."""
        return self(Query.everywhere(input_ids, **others)).view(*input_ids.shape, -1)

    def inputs(self, query: Query) -> dict[str, Any]:
        """Build the arguments of the model's forward."""
        return self._inputs(query, *self._placed(query))

    def _inputs(self, query: Query, positions: Int[Tensor, "batch query"], layout: Layout) -> dict[str, Any]:
        counted = positions + first_position(self.model.config)
        inputs: dict[str, Any] = {"input_ids": query.input_ids, "position_ids": counted}
        if query.view is not None:
            mask = self._cached_mask(query, query.view, positions, layout)
            return inputs | {"attention_mask": mask, "past_key_values": query.view, "use_cache": True}
        inputs["use_cache"] = False
        segments: dict[str, Any] = {"segment_ids": query.segment_ids, "isolate_segments": query.isolate_segments}
        if query.grid_origin is not None:
            on_grid, committed = _on_grid(query, positions)
            mask = attention_mask(layout, on_grid, committed=committed, **segments)
            return inputs | {"attention_mask": model_masks(self.model, mask, positions, positions)}
        if self.attention != "mask" and query.segment_ids is None:
            positions = positions[:1]  # the same in all rows, so one row's mask serves all
        text_config = self.model.config.get_text_config()
        if self.attention == "flex" and layer_masks(text_config, None, positions, positions) is None:  # no window
            return inputs | {"attention_mask": flex_mask(layout, positions, **segments)}
        masks = model_masks(self.model, attention_mask(layout, positions, **segments), positions, positions)
        pieces = layout.pieces(positions.shape[1], is_aligned=not query.isolate_segments)
        more = {"pieces": pieces} if pieces and self.attention == "pieces" else {}
        return inputs | {"attention_mask": masks} | more

    def _cached_mask(self, query: Query, view: View, positions: Int[Tensor, "batch query"], layout: Layout) -> Any:
        """Build the mask over slots: the query's own, or the layout's rule for the slots that each row reads."""
        device = query.input_ids.device
        keys = query.slot_positions
        if keys is None:
            keys = torch.arange(view.num_keys, device=device).expand(len(positions), -1)
        mask = query.sees
        # No mask is needed where every query reads every slot. A static view shows all slots of the pool, also those
        # that no row has written yet, so it always needs one.
        if mask is None and (view.is_static or not view.spans.reads_all):
            on_grid, committed = _on_grid(query, positions)
            causal = block_mask(layout, on_grid, _on_grid(query, keys)[0], committed=committed)
            read = view.spans.is_read(device, view.num_keys)[:, None].expand(-1, positions.shape[1], -1)
            mask = read if causal is None else read & causal
        return model_masks(self.model, None if mask is None else mask[:, None], positions, keys)

    def _run(self, query: Query, wrapped: Any, **how: Any) -> tuple[Tensor, AtHead]:
        """Return the logits, or what takes their place, and what was computed at the head."""
        positions, layout = self._placed(query)
        inputs = self._inputs(query, positions, layout)
        if is_gated(self.model):
            inputs[OPEN] = _open_tokens(query, positions, layout)
        rows = self._predictors(query, positions, layout)
        with self._stance(query.view), select_head_rows(self.model, rows, **how) as at_head:
            return (self.model if wrapped is None else wrapped)(**inputs).logits, at_head

    def _placed(self, query: Query) -> tuple[Int[Tensor, "batch query"], Layout]:
        """Return the positions of the fed tokens, and the layout; by default the view's and the model's."""
        layout = query.layout or self.settings.layout
        if query.order is not None:  # of blocks that have one token, places take the place of positions
            layout = Layout(block_size=1)
        if query.positions is not None:
            return query.positions, layout
        if query.view is not None:
            return query.view.positions, layout
        batch, length = query.input_ids.shape
        length = length // 2 if layout.is_two_copy else length
        if query.isolate_segments and query.segment_ids is not None:
            positions = segment_positions(query.segment_ids[:, :length])
        else:
            positions = torch.arange(length, device=query.input_ids.device).expand(batch, -1)
        return (positions.repeat(1, 2) if layout.is_two_copy else positions), layout

    def _predictors(self, query: Query, positions: Int[Tensor, "batch query"], layout: Layout) -> Int[Tensor, "n"]:
        """Find the fed tokens whose logits predict `where`: themselves, or their left neighbours.

        Left neighbours predict under a shift, and in a causal context where they are committed.
        """
        shift = self.settings.shift_logits if query.shift is None else query.shift
        is_causal = layout.context == "causal" and query.shift is None
        if not shift and not is_causal:
            return query.where
        position, length = positions.flatten()[query.where], query.input_ids.shape[1]
        # The first position of a segment has no neighbour: it is predicted by its own logits.
        reads_left = has_neighbour = position > 0
        is_first = torch.zeros_like(has_neighbour)  # of a noisy block
        if layout.is_two_copy and layout.block_size is not None:
            is_noisy = query.where % length < length // 2
            is_first = has_neighbour & is_noisy & (position % layout.block_size == 0)
            follows_committed = is_first | ~is_noisy
        elif query.committed is not None:
            follows_committed = position <= query.committed[query.where // length]
        else:
            follows_committed = has_neighbour
        if not shift:
            reads_left = has_neighbour & follows_committed
        # In [x_t ; x_0] the left neighbour of a noisy block is the last token of the clean block before it, which
        # stands half a row later.
        return query.where - reads_left.to(query.where.dtype) + is_first.to(query.where.dtype) * (length // 2)

    @contextmanager
    def _stance(self, view: View | None) -> Iterator[None]:
        """Run a shape that occurs once without compiling it; compiled models run one at a time."""
        once = view is not None and not view.is_static
        if not self.is_compiled:
            yield
            return
        with _STANCE, torch.compiler.set_stance("force_eager") if once else nullcontext():
            yield


def _open_tokens(query: Query, positions: Int[Tensor, "batch query"], layout: Layout) -> Int[Tensor, "n"]:
    """Find what a gated adapter acts on, in the flattened input: what is not committed, or the noisy copy."""
    is_open = query.is_open
    if is_open is None and query.committed is not None:
        is_open = (positions >= query.committed[:, None]) & (layout.block_size != 1)  # token by token nothing is open
    elif is_open is None:
        is_noisy = torch.arange(positions.shape[1], device=positions.device) < positions.shape[1] // 2
        is_open = (is_noisy & layout.is_two_copy).expand(query.input_ids.shape)
    return is_open.flatten().nonzero()[:, 0]  # sync: how many tokens are open is data


def _on_grid(query: Query, positions: Int[Tensor, "batch seq"]) -> tuple[Int[Tensor, "batch seq"], Tensor | None]:
    """Count positions, and the committed ones (B, 1), from where each row's grid of blocks begins."""
    if query.order is not None:
        return query.order.gather(1, positions.clamp(max=query.order.shape[1] - 1)), None
    committed = None if query.committed is None else query.committed[:, None]
    if query.grid_origin is None:
        return positions, committed
    origin = query.grid_origin[:, None]
    return positions - origin, None if committed is None else committed - origin
