"""Is a model what its settings say? Measured on a few forwards of a short random sequence, never read off its name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redraft.layouts import Layout
from redraft.models import encoder_decoder
from redraft.models.denoiser import Denoiser
from redraft.models.masks import first_position, model_masks
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

BIDIRECTIONAL = "every layer is bidirectional"
POSITIONS = "positions are the model's own"
ISOLATED = "nothing leaks past the mask"
PADDING = "padding is inert"
BLOCKS = "blocks are causal"
CACHED = "cached blocks equal uncached"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about a model, and what was measured."""

    claim: str
    passed: bool
    measured: str


@torch.no_grad()
def check_model(model: Any, settings: DiffusionSettings, *, block_size: int = 4) -> list[Check]:
    """Measure every claim. Without a block size in the settings, blocks are tried at `block_size`, for information.

    A library's error inside one check makes that check fail with the error's first line.
    """
    if model.config.model_type in encoder_decoder.MODEL_TYPES:
        raise ValueError(f"{model.config.model_type} is an encoder-decoder; it is neither checked nor converted.")
    denoiser = Denoiser(model.eval(), DiffusionSettings(mask_token_id=settings.mask_token_id))
    size = settings.block_size or block_size
    ids = sequence(model, length=3 * size)
    checks = {
        BIDIRECTIONAL: lambda: _check_bidirectional(denoiser, ids),
        POSITIONS: lambda: _check_positions(denoiser, ids),
        ISOLATED: lambda: _check_isolated(denoiser, ids),
        PADDING: lambda: _check_padding(denoiser, ids),
        BLOCKS: lambda: _check_blocks(denoiser, ids, size),
        CACHED: lambda: _check_cached(denoiser, ids, size),
    }
    return [_measured(claim, check) for claim, check in checks.items()]


@torch.no_grad()
def check_isolated(model: Any, mask_token_id: int) -> Check:
    """Measure whether a model obeys its mask, in three short forwards."""
    denoiser = Denoiser(model, DiffusionSettings(mask_token_id=mask_token_id))
    return _measured(ISOLATED, lambda: _check_isolated(denoiser, sequence(model, length=6)))


def _measured(claim: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        passed, measured = check()
    except Exception as error:  # any architecture of transformers may fail in any way: the failure is the result
        passed, measured = False, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return Check(claim=claim, passed=passed, measured=measured)


def sequence(model: Any, *, length: int) -> Int[Tensor, "1 seq"]:
    """Draw token ids, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (1, length), generator=generator)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    if padding is not None:  # some models do not count padding as a position
        ids = torch.where(ids == padding, (ids + 1) % vocab_size, ids)
    return ids.to(next(model.parameters()).device)


def _changed(ids: Tensor, position: int) -> Tensor:
    """Put another token at one position."""
    other = ids.clone()
    other[0, position] = ids[0, position - 1] if ids[0, position] != ids[0, position - 1] else ids[0, position] ^ 1
    return other


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the logits' own size."""
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("nan")
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)).item()


def is_equal(difference: float, model: Any) -> bool:
    return difference <= (1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1)


def _check_bidirectional(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Change the last token: the logits before it must move, and each layer must carry the change backwards.

    The first position's must move too, unless windows shorter than the sequence keep the news from it.
    """
    changed, plain = denoiser.logits(_changed(ids, -1)), denoiser.logits(ids)
    first, nearest = difference(changed[:, 0], plain[:, 0]), difference(changed[:, -2], plain[:, -2])
    causal = _causal_layers(denoiser, ids)
    if causal:
        return False, f"{len(causal)} layers do not look ahead: {', '.join(causal[:3])}"
    has_windows = denoiser.inputs(Query.everywhere(ids))["attention_mask"] is not None
    passed = nearest > 1e-6 and (first > 1e-6 or has_windows)
    return passed, f"the last token moves the first position's logits by {first:.1e}, its neighbour's by {nearest:.1e}"


def _causal_layers(denoiser: Denoiser, ids: Tensor) -> list[str]:
    """Name the layers whose output before the last position does not depend on the last position.

    Each layer gets the input it had before, with only the last position disturbed, so that layers cannot answer for
    one another.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = denoiser.model.named_modules()
    layers: Layers = {name: module for name, module in modules if isinstance(module, GradientCheckpointingLayer)}
    with _recorded(layers) as before:
        denoiser.logits(ids)
    with _disturbed(layers, before) as after:
        denoiser.logits(ids)
    return [name for name in before if torch.equal(before[name][1][:, -2], after[name][1][:, -2]) and name in after]


Layers = dict[str, nn.Module]
Record = dict[str, tuple[Tensor, Tensor]]
"""name of a layer -> its input and its output, (1, seq, dim)."""


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def _recorded(layers: Layers) -> Iterator[Record]:
    """Keep each layer's input and output."""
    record: Record = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            record[name] = (entered.clone(), _first(output).clone())

        return keep

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _disturbed(layers: Layers, before: Record) -> Iterator[Record]:
    """Feed each layer what it had before, but for the last position."""

    def hook(name: str) -> Any:
        def disturb(_: nn.Module, args: Any, kwargs: Any) -> Any:
            entered = before[name][0].clone()
            entered[:, -1] = entered[:, -1].flip(-1) * 1.5 + 0.5
            return ((entered, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entered})

        return disturb

    reached = {name: layer for name, layer in layers.items() if name in before}
    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in reached.items()]
    try:
        with _recorded(layers) as after:
            yield after
    finally:
        for handle in handles:
            handle.remove()


def _check_positions(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Leave the positions out of the call: the model must count as we do."""
    inputs = denoiser.inputs(Query.everywhere(ids))
    del inputs["position_ids"]
    moved = difference(denoiser.logits(ids), denoiser.model(**inputs).logits)
    return is_equal(moved, denoiser.model), f"our positions move logits by {moved:.1e}"


def _check_isolated(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Let every position see itself alone: a change at one must stay there. Recurrence and convolution leak."""
    alone = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None]
    where = ids.shape[1] // 2

    def logits(row: Tensor) -> Tensor:
        return denoiser.logits(row, segment_ids=alone, isolate_segments=True)[0]

    others = torch.arange(ids.shape[1], device=ids.device) != where
    leaked = difference(logits(_changed(ids, where))[others], logits(ids)[others])
    return is_equal(leaked, denoiser.model), f"a masked token moves other positions by {leaked:.1e}"


def _check_padding(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Hide a tail: logits before it must be those of the row without it, whatever stands there."""
    kept = ids.shape[1] * 2 // 3
    segments = (torch.arange(ids.shape[1], device=ids.device) < kept).long()[None]
    padded = denoiser.logits(ids, segment_ids=segments)[:, :kept]
    moved = difference(padded, denoiser.logits(ids[:, :kept]))
    return is_equal(moved, denoiser.model), f"padding moves logits by {moved:.1e}"


def _check_blocks(denoiser: Denoiser, ids: Tensor, size: int) -> tuple[bool, str]:
    """Change the last block: earlier blocks must not move; change a block's last token: its first must."""
    layout = Layout(block_size=size)
    plain = denoiser.logits(ids, layout=layout)
    later = difference(denoiser.logits(_changed(ids, -1), layout=layout)[:, :-size], plain[:, :-size])
    within = difference(denoiser.logits(_changed(ids, size - 1), layout=layout)[:, 0], plain[:, 0])
    passed = is_equal(later, denoiser.model) and (within > 1e-6 or size == 1)
    return passed, f"a later block moves logits by {later:.1e}, the same block by {within:.1e}"


def _check_cached(denoiser: Denoiser, ids: Tensor, size: int) -> tuple[bool, str]:
    """Go block by block over a cache of keys and values: logits must be those of one block-causal forward."""
    whole = denoiser.logits(ids, layout=Layout(block_size=size))
    moved = difference(cached_logits(denoiser, ids, block_size=size), whole)
    return is_equal(moved, denoiser.model), f"cached and uncached logits differ by {moved:.1e}"


def cached_logits(
    denoiser: Denoiser, ids: Int[Tensor, "batch seq"], *, block_size: int
) -> Float[Tensor, "batch seq vocab"]:
    """Forward a sequence block by block, each block over the cached keys and values of those before it (unshifted)."""
    from transformers import DynamicCache

    cache, pieces = DynamicCache(), []  # with a config, it would drop what windows have left behind
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    for start in range(0, ids.shape[1], block_size):
        end = min(start + block_size, ids.shape[1])
        seen = torch.ones((ids.shape[0], 1, end - start, end), dtype=torch.bool, device=ids.device)
        block = positions[:, start:end]
        output = denoiser.model(
            input_ids=ids[:, start:end],
            attention_mask=model_masks(denoiser.model, seen, block, positions[:, :end]),
            position_ids=block + first_position(denoiser.model.config),
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)
