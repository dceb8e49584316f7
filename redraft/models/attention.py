"""Attention that skips keys which no query sees: in pieces on the CPU, torch's flex attention on a GPU.

Both are exact, and both take from `layouts` who attends to whom. They are registered with transformers as one
implementation, which does what "sdpa" does if it gets neither pieces nor a BlockMask.
"""

from functools import lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from redraft.layouts import Layout, PairRule, Piece, Range, pair_rule
from redraft.models.device import can_compile

NAME = "redraft"
Attention = Literal["mask", "pieces", "flex"]
"""mask: all pairs are computed, under a boolean mask."""
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_FLEX_HEAD = 16


def choose_attention(model: Any, name: str, *, device: torch.device, dtype: torch.dtype) -> Attention:
    """Resolve "auto" and set up the model: flex on CUDA where it can be used, pieces on a CPU, else mask.

    Raises ValueError where a named attention cannot be used.
    """
    obstacles = {"pieces": _obstacle(model), "flex": _obstacle_to_flex(model, device, dtype), "mask": None}
    if name == "auto":
        best: Attention = "pieces" if device.type == "cpu" else "flex"
        name = "mask" if obstacles[best] else best
    if obstacles[name]:
        raise ValueError(f"attention {name} {obstacles[name]}. Use auto or mask.")
    if name != "mask":
        _register()
        model.set_attn_implementation(NAME)
    return name  # type: ignore[return-value]


def _obstacle(model: Any) -> str | None:
    """Say why the model's attention cannot be replaced by ours; None if it can."""
    config = model.config.get_text_config()
    takes_more = any(each.kind is each.VAR_KEYWORD for each in signature(model.forward).parameters.values())
    is_known = config._attn_implementation in ("sdpa", NAME)
    if not (is_known and takes_more and model._can_set_attn_implementation()):
        return f"needs a model whose attention can be replaced; got {config.model_type}"
    return None


def _obstacle_to_flex(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    config = model.config.get_text_config()
    if device.type != "cuda":
        return f"needs CUDA; got device {device.type}"
    if not can_compile():
        return "needs torch.compile, which finds no compiler here"
    heads = [module.head_dim for module in model.modules() if isinstance(getattr(module, "head_dim", None), int)]
    head_dim = min(heads, default=config.hidden_size // config.num_attention_heads)  # layers may differ
    if head_dim < SMALLEST_FLEX_HEAD:
        return f"needs heads of at least {SMALLEST_FLEX_HEAD} dimensions; got {head_dim}"
    if dtype not in FLEX_DTYPES:
        return f"needs float32, bfloat16 or float16; got {dtype}"
    if getattr(config, "attention_dropout", 0.0):
        return f"has no dropout; got attention_dropout {config.attention_dropout}"
    return _obstacle(model)


def flex_mask(
    layout: Layout, positions: Tensor, *, segment_ids: Tensor | None, isolate_segments: bool
) -> Any:  # BlockMask | None
    """Build flex attention's mask, or None where all attend to all; without segments it is cached."""
    if segment_ids is None:
        return _fixed_mask(layout, positions.shape[1], positions.device)
    rule = pair_rule(layout, positions, segment_ids=segment_ids, isolate_segments=isolate_segments)
    return None if rule is None else _block_mask(rule, rows=len(positions), length=positions.shape[1], like=positions)


@lru_cache(maxsize=16)
def _fixed_mask(layout: Layout, length: int, device: torch.device) -> Any:
    """Build the mask of rows without segments: the same in every row and in every step."""
    half = length // 2 if layout.is_two_copy else length
    positions = torch.arange(length, device=device)[None] % half
    rule = pair_rule(layout, positions)
    return None if rule is None else _block_mask(rule, rows=None, length=length, like=positions)


def _block_mask(rule: PairRule, *, rows: int | None, length: int, like: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    build = _compiled(create_block_mask) if like.device.type == "cuda" else create_block_mask
    mask_mod = lambda row, head, query, key: rule(row, head, query, key)  # noqa: E731 torch counts its parameters
    return build(mask_mod, rows, None, length, length, device=like.device)


@lru_cache(maxsize=1)
def _compiled(create_block_mask: Any) -> Any:
    """Compile it, so that the mask of all pairs is never in memory."""
    return torch.compile(create_block_mask)


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    pieces: tuple[Piece, ...] = (),
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attend as transformers' attention functions do: query (B, H, Q, D) to (B, Q, H, D).

    With `pieces`, each piece of queries attends to its own keys under its part of the boolean mask. This is exact as
    long as the pieces hold every pair that the mask allows.
    """
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    if not pieces or attention_mask is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    queries = _Cut(query, [ranges for ranges, _ in pieces])
    keys, values = (_Cut(tensor, [ranges for _, ranges in pieces]) for tensor in (key, value))
    parts: dict[int, Tensor] = {}
    for of_query, of_key in pieces:
        mask = _slices(_slices(attention_mask, of_query, dim=2), of_key, dim=3)
        out, _ = sdpa_attention_forward(
            module, queries.at(of_query), keys.at(of_key), values.at(of_key), mask, **options
        )
        parts |= zip((start for start, _ in of_query), out.split([b - a for a, b in of_query], dim=1), strict=True)
    return torch.cat([parts[start] for start in sorted(parts)], dim=1), None


class _Cut:
    """A tensor cut once along its positions, whose parts are joined for many ranges.

    Plain slices would be slower: the backward pass of each fills a gradient of the whole tensor's size.
    """

    def __init__(self, tensor: Tensor, of_pieces: list[tuple[Range, ...]]) -> None:
        edges = sorted({edge for ranges in of_pieces for one in ranges for edge in one})
        assert edges[0] == 0
        assert edges[-1] == tensor.shape[2]
        self._starts = edges[:-1]
        self._parts = tensor.split([b - a for a, b in pairwise(edges)], dim=2)

    def at(self, ranges: tuple[Range, ...]) -> Tensor:
        """Join the positions of the ranges."""
        chosen = [
            part for a, b in ranges for start, part in zip(self._starts, self._parts, strict=True) if a <= start < b
        ]
        return torch.cat(chosen, dim=2)


def _slices(mask: Tensor, ranges: tuple[Range, ...], *, dim: int) -> Tensor:
    return torch.cat([mask.narrow(dim, a, b - a) for a, b in ranges], dim=dim)
