"""Check that a model does what its settings say, by a few forwards of a short random sequence, not by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from redraft.layouts import Layout
from redraft.models import encoder_decoder
from redraft.models.cache import Slots, SlotSpans
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

BIDIRECTIONAL = "every layer is bidirectional"
POSITIONS = "positions are the model's own"
ISOLATED = "nothing leaks past the mask"
PADDING = "padding is inert"
BLOCKS = "blocks are causal"
CAUSAL = "committed text is autoregressive"
CACHED = "cached blocks equal uncached"
NEEDED = (BIDIRECTIONAL, POSITIONS, ISOLATED, PADDING)
"""Claims that must hold for every diffusion model."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about a model, and what was measured."""

    claim: str
    passed: bool
    measured: str


@torch.no_grad()
def check_model(model: Any, settings: DiffusionSettings, *, block_size: int = 4) -> list[Check]:
    """Measure every claim. Without a block size in the settings, blocks of `block_size` are checked for information.

    A library's error inside one check makes that check fail with the error's first line.
    """
    if model.config.model_type in encoder_decoder.MODEL_TYPES:
        raise ValueError(f"{model.config.model_type} is an encoder-decoder; it can be neither checked nor converted.")
    denoiser = Denoiser(model.eval(), DiffusionSettings(mask_token_id=settings.mask_token_id))
    size = settings.block_size or block_size
    ids = sequence(model, length=3 * size)
    checks = [_measured(CAUSAL, lambda: _check_causal(model, settings, ids))] if settings.context == "causal" else []
    return [
        *checks,
        _measured(BIDIRECTIONAL, lambda: _check_bidirectional(denoiser, ids)),
        _measured(POSITIONS, lambda: _check_positions(denoiser, ids)),
        _measured(ISOLATED, lambda: _check_isolated(denoiser, ids)),
        _measured(PADDING, lambda: _check_padding(denoiser, ids)),
        _measured(BLOCKS, lambda: _check_blocks(denoiser, ids, size)),
        _measured(CACHED, lambda: _check_cached(denoiser, ids, size)),
    ]


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
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # some models do not count padding as a position
        ids = torch.where(ids == padding, (ids + 1) % config.vocab_size, ids)
    return ids.to(next(model.parameters()).device)


def _changed(ids: Tensor, position: int) -> Tensor:
    """Return the ids with another token at one position."""
    other = ids.clone()
    other[0, position] = ids[0, position - 1] if ids[0, position] != ids[0, position - 1] else ids[0, position] ^ 1
    return other


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, in units of the logits' own size."""
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("nan")
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)).item()


def is_equal(difference: float, model: Any) -> bool:
    """Whether a difference is within the rounding of the model's dtype."""
    return difference <= (1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1)


def _check_bidirectional(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Change the last token: the logits before it must move, and each layer must carry the change backwards.

    The first position's must move too, unless windows shorter than the sequence keep the change from it.
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

    Each layer is called a second time, with only the last position of its own input disturbed. Otherwise the
    attention layers of a hybrid would hide that its recurrent layers still read from left to right.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    causal: list[str] = []
    modules = denoiser.model.named_modules()
    names: dict[nn.Module, str] = {m: name for name, m in modules if isinstance(m, GradientCheckpointingLayer)}

    def call_again(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        disturbed = hidden.clone()
        disturbed[:, -1] = disturbed[:, -1].flip(-1) * 1.5 + 0.5
        if args:
            again = layer.forward(disturbed, *args[1:], **kwargs)
        else:
            again = layer.forward(**kwargs | {"hidden_states": disturbed})
        before, after = (one[0] if isinstance(one, tuple) else one for one in (output, again))
        if torch.equal(before[:, -2], after[:, -2]):
            causal.append(names[layer])

    handles = [layer.register_forward_hook(call_again, with_kwargs=True) for layer in names]
    try:
        denoiser.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return causal


def _check_positions(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Call the model without positions: it must count them as we do."""
    inputs = denoiser.inputs(Query.everywhere(ids))
    del inputs["position_ids"]
    moved = difference(denoiser.logits(ids), denoiser.model(**inputs).logits)
    return is_equal(moved, denoiser.model), f"our positions move logits by {moved:.1e}"


def _check_isolated(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Let every position attend to itself alone: a change at one must not affect others, as recurrence would."""
    alone = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None]
    middle = ids.shape[1] // 2
    others = alone[0] != middle + 1
    plain, changed = (
        denoiser.logits(row, segment_ids=alone, isolate_segments=True)[0] for row in (ids, _changed(ids, middle))
    )
    leaked = difference(changed[others], plain[others])
    return is_equal(leaked, denoiser.model), f"a masked token moves other positions by {leaked:.1e}"


def _check_padding(denoiser: Denoiser, ids: Tensor) -> tuple[bool, str]:
    """Hide the end of a row: logits before it must be those of the row without it."""
    length = ids.shape[1] * 2 // 3
    segments = (torch.arange(ids.shape[1], device=ids.device) < length).long()[None]
    padded = denoiser.logits(ids, segment_ids=segments)[:, :length]
    moved = difference(padded, denoiser.logits(ids[:, :length]))
    return is_equal(moved, denoiser.model), f"padding moves logits by {moved:.1e}"


def _check_blocks(denoiser: Denoiser, ids: Tensor, size: int) -> tuple[bool, str]:
    """Change the last block: earlier logits must not move. Change a block's last token: the block's first must move."""
    layout = Layout(block_size=size)
    plain = denoiser.logits(ids, layout=layout)
    later = difference(denoiser.logits(_changed(ids, -1), layout=layout)[:, :-size], plain[:, :-size])
    within = difference(denoiser.logits(_changed(ids, size - 1), layout=layout)[:, 0], plain[:, 0])
    passed = is_equal(later, denoiser.model) and (within > 1e-6 or size == 1)
    return passed, f"a later block moves logits by {later:.1e}, the same block by {within:.1e}"


def _check_causal(model: Any, settings: DiffusionSettings, ids: Tensor) -> tuple[bool, str]:
    """Call the model as plain transformers does: without an open block its logits are the denoiser's."""
    plain = model(input_ids=ids).logits
    moved = difference(Denoiser(model, settings).logits(ids, shift=False), plain)
    return is_equal(moved, model), f"the context's mask moves logits by {moved:.1e}"


def _check_cached(denoiser: Denoiser, ids: Tensor, size: int) -> tuple[bool, str]:
    """Feed block by block over cached keys and values: logits must be those of one block-causal forward."""
    layout, slots = Layout(block_size=size), Slots(1, ids.shape[1])
    blocks = []
    for start in range(0, ids.shape[1], size):
        end = start + size
        spans = SlotSpans(starts=[start], ends=[end], key_ends=[end], reads_all=True)
        view = slots.view(spans, ids.device)
        blocks.append(denoiser.logits(ids[:, start:end], layout=layout, view=view))
    moved = difference(torch.cat(blocks, dim=1), denoiser.logits(ids, layout=layout))
    return is_equal(moved, denoiser.model), f"cached and uncached logits differ by {moved:.1e}"
