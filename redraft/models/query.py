"""A query: the input of one forward, and the positions whose logits are wanted."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import View


@dataclass(frozen=True)
class SelfConditioning:
    """What a model predicted for the same canvases one step before."""

    logits: Float[Tensor, "canvases length vocab"]
    is_present: Bool[Tensor, "canvases"]
    """False where a canvas is new."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """The tokens to feed, their positions, what they attend to, and the positions whose logits are wanted."""

    input_ids: Int[Tensor, "batch query"]
    """Whole rows; where keys and values are kept, what each row feeds now (a position may be fed more than once)."""
    where: Int[Tensor, "n"]
    """Positions to be predicted, as indices into the flattened `input_ids`; the head runs nowhere else."""
    positions: Int[Tensor, "batch query"] | None = None
    """By default those of the view's spans; without a view they count the row, or each isolated segment. Both copies of
    [x_t ; x_0] have the same positions."""
    segment_ids: Int[Tensor, "batch query"] | None = None
    """As in `layouts.attention_mask`."""
    isolate_segments: bool = False
    """No attention across segments; positions restart at each."""
    layout: Layout | None = None
    """Who sees whom; by default the model's own."""
    grid_origin: Int[Tensor, "batch"] | None = None
    """Where each row's grid of blocks begins, if not at position 0."""
    committed: Int[Tensor, "batch"] | None = None
    """In a causal context, where each row's open blocks begin; by default all of a row is committed."""
    is_open: Bool[Tensor, "batch query"] | None = None
    """Which fed tokens a gated adapter acts on; by default those that are not committed, and the noisy copy."""
    order: Int[Tensor, "batch slots"] | None = None
    """Each position's place in the order in which attention is causal; equal places see each other. In place of the
    layout's rule."""
    shift: bool | None = None
    """Whether a position is predicted by its left neighbour's logits; by default as the model's settings say, and in a
    causal context wherever the left neighbour is committed."""
    view: View | None = None
    """The slots where keys and values of the fed tokens are written, and those that are read."""
    sees: Bool[Tensor, "batch query slots"] | None = None
    """Which slots each fed token sees, in place of the layout's rule; `slot_positions` says where these stand."""
    slot_positions: Int[Tensor, "batch slots"] | None = None
    """By default slot i holds position i."""
    previous: SelfConditioning | None = None
    """For models that are given their last prediction."""

    @classmethod
    def everywhere(cls, input_ids: Int[Tensor, "batch query"], **others: object) -> "Query":
        """Ask for the logits of all positions."""
        where = torch.arange(input_ids.numel(), device=input_ids.device)
        return cls(input_ids=input_ids, where=where, **others)  # type: ignore[arg-type]
