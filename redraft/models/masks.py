"""Attention masks and positions in the form that each transformers model needs.

A 4-D mask goes to every layer untouched, so a model with windowed layers needs one mask per kind of layer. Eager
attention adds the mask to its scores: a boolean mask would be added as 0 and 1, without an error.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

WINDOW, CHUNK = "sliding_attention", "chunked_attention"
NEEDS_MASK = {"mpt", "nemotron", "stablelm"}
"""Architectures whose attention is causal, or fails, if it gets no mask, whatever the config says."""

COUNTS_FROM_PADDING = {
    "camembert", "data2vec-text", "ibert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
"""Architectures whose positions start at the padding token's id + 1, as in fairseq."""


def first_position(config: Any) -> int:
    """Return the position id of a sequence's first token."""
    text_config = config.get_text_config()
    return text_config.pad_token_id + 1 if text_config.model_type in COUNTS_FROM_PADDING else 0


def model_masks(
    model: Any,
    mask: Bool[Tensor, "batch 1 query key"] | None,
    query_positions: Int[Tensor, "batch query"],
    key_positions: Int[Tensor, "batch key"],
) -> Any:
    """Turn a mask (None: everything attends to everything) into the `attention_mask` of a model's forward."""
    config = model.config.get_text_config()
    # Without a mask, a model whose config says so is causal.
    if mask is None and (config.model_type in NEEDS_MASK or getattr(config, "is_causal", False)):
        batch, queries = query_positions.shape
        mask = torch.ones((batch, 1, queries, key_positions.shape[1]), dtype=torch.bool, device=query_positions.device)
    masks = layer_masks(config, mask, query_positions, key_positions)
    if isinstance(masks, dict):
        return {kind: additive_where_eager(model, one) for kind, one in masks.items()}
    return None if masks is None else additive_where_eager(model, masks)


def additive_where_eager(model: Any, mask: Bool[Tensor, "batch 1 query key"]) -> Tensor:
    """Turn a boolean mask into what eager attention adds to its scores; leave it to every other attention."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)


def layer_masks(
    config: Any,
    mask: Bool[Tensor, "batch 1 query key"] | None,
    query_positions: Int[Tensor, "batch query"],
    key_positions: Int[Tensor, "batch key"],
) -> Any:
    """Combine a mask (None: everything attends to everything) with the window of each kind of layer.

    Returns the mask itself if no window is shorter than the row, one mask if all layers are of one kind, else
    {kind: mask}. A window of n reaches n positions to either side, as in transformers' bidirectional masks; n - 1 in a
    model whose config is causal, as in transformers' causal masks.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not kinds or WINDOW in kinds else None
    chunk = getattr(config, "attention_chunk_size", None) if not kinds or CHUNK in kinds else None
    if not kinds <= {"full_attention", WINDOW, CHUNK}:
        return mask
    if window and getattr(config, "is_causal", False):
        window -= 1
    if window and window >= key_positions.shape[1] - 1:
        window = None  # it reaches everywhere
    if not window and not chunk:
        return mask
    distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
    whole = torch.ones_like(distance, dtype=torch.bool) if mask is None else mask
    masks = {"full_attention": whole, WINDOW: whole & (distance <= window) if window else whole}
    if chunk:  # transformers' own mask of a chunk is causal whatever the config says, so it always gets one
        masks[CHUNK] = whole & (query_positions[:, None, :, None] // chunk == key_positions[:, None, None, :] // chunk)
    return {kind: masks[kind] for kind in kinds} if kinds else masks[WINDOW if window else CHUNK]
