"""Turn any decoder or encoder of transformers into a diffusion model, without modelling code."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from redraft.checkpoints import local_path
from redraft.folders import LOCK_FILE, one_writer
from redraft.layouts import Layout
from redraft.models import encoder_decoder
from redraft.models.adapter import adapter_config, merge_adapter, split_adapter
from redraft.models.families import FAMILIES, find_family
from redraft.models.family import Family
from redraft.models.files import reading
from redraft.models.finite import check_finite, floats_of
from redraft.models.head import select_head_rows
from redraft.models.load import (
    check_tokenizer,
    is_encoder,
    language_model_class,
    load_denoiser,
    load_weights,
    read_config,
    read_raw_config,
    read_tokenizer,
    renaming_class,
)
from redraft.models.probe import BIDIRECTIONAL, BLOCKS, CAUSAL, NEEDED, PADDING, Check, check_model, sequence
from redraft.models.settings import DiffusionSettings

MASK_TOKEN = "<|mask|>"
RESERVED = re.compile(r"<\|?(reserved|unused|extra|spare|dummy)|\[unused|_unused", re.IGNORECASE)
_OTHER_HEAD = re.compile(r"pooler|seq_relationship|classifier|qa_outputs")
ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
"""Kinds of layers that can be converted. Sparse attention is none of them: it selects earlier keys only, which the
short sequences of the checks do not show."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` made, and what it measured."""

    folder: Path
    architecture: str
    settings: DiffusionSettings
    notes: tuple[str, ...]
    """What was chosen or created: the mask token, a missing head, a merged adapter."""
    checks: tuple[Check, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    mask_token_id: int | None = None,
    shift_logits: bool | None = None,
    block_size: int | None = None,
    context: Literal["block", "causal"] | None = None,
    within: Literal["full", "causal"] = "full",
    adapter: str | Path | None = None,
    to: str | None = None,
    family: str | None = None,
    dtype: str | torch.dtype = "auto",
    autoregressive: bool = False,
) -> Conversion:
    """Write `source` (folder, hub id or .gguf file) to the folder `out` as a diffusion model.

    An autoregressive model loses its causal mask (with a `block_size` it stays between blocks; in a causal `context`
    it goes in open blocks only, or, `within` causal, nowhere); an encoder keeps its head or gets one. The mask token is
    `mask_token_id`, the tokenizer's own, a reserved token, a spare row of the embedding, or a new row; the last three
    are set to the mean of the other rows. `shift_logits` keeps next-token alignment. `adapter` is merged into the
    weights, as is a source that is an adapter. `to` writes a family's own names, for the users of its code.
    `autoregressive` keeps a causal model causal (blocks of one token).

    Raises ValueError for a model that cannot be converted, with the reason, before anything is written.
    """
    out = Path(out)
    _check_new(out)
    Layout(block_size=block_size, context=context or "block", within=within)  # refuses what no model can have
    written_as = None if to is None else _family_to_write(to)
    source = local_path(source)
    if adapter is None:
        source, adapter = split_adapter(source)
    notes: list[str] = []
    model, tokenizer, settings = _read(
        source, notes, mask_token_id=mask_token_id, family=family, dtype=dtype, block_size=block_size
    )
    check_finite(source, floats_of(model))
    if adapter is not None:
        model = merge_adapter(model, adapter)
        notes.append(f"merged the adapter {adapter}")
        if trained := adapter_config(adapter).get("diffusion"):
            settings, tokenizer = DiffusionSettings.from_saved(trained), read_tokenizer(adapter) or tokenizer
    _check_head(source, model)
    is_causal = settings is None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if settings is None:
        mask, note = choose_mask(model, tokenizer, mask_token_id)
        notes.append(note)
        settings = DiffusionSettings(mask_token_id=mask)
    asked = {"shift_logits": shift_logits, "block_size": block_size, "context": context}
    chosen: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if context is not None:
        chosen["within"] = within if context == "causal" else None
    settings = replace(settings, **chosen)
    if autoregressive:
        if not is_causal:
            raise ValueError(f"{source} is not autoregressive ({type(model).__name__}); leave autoregressive out.")
        settings = replace(settings, process="autoregressive", shift_logits=True, block_size=1)
    settings.save_to(model.config)
    checks = check_model(model, settings)
    _check_claims(source, checks, settings)
    with one_writer(out):
        _check_new(out)  # another process may have written there meanwhile
        _save(model, out, family=written_as)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    return Conversion(
        folder=out, architecture=type(model).__name__, settings=settings, notes=tuple(notes), checks=tuple(checks)
    )


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(path.name != LOCK_FILE for path in out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name a new one.")


@torch.no_grad()
def _check_head(source: str | Path, model: Any) -> None:
    """Raise ValueError for a model whose logits do not come from calling its output embedding (`models.head`)."""
    if model.config.model_type in encoder_decoder.MODEL_TYPES:
        return  # refused by the checks
    ids = sequence(model, length=3)
    with select_head_rows(model, torch.tensor([0], device=ids.device)):
        num_rows = model(input_ids=ids).logits.flatten(0, -2).shape[0]
    if num_rows != 1:
        raise ValueError(
            f"{source} cannot be converted: {model.config.model_type} computes its logits without calling its output "
            "embedding, so they cannot be computed at chosen positions only."
        )


def _check_claims(source: str | Path, checks: list[Check], settings: DiffusionSettings) -> None:
    """Raise ValueError where a claim that the settings rest on does not hold."""
    needed = set(NEEDED) | ({BLOCKS} if settings.block_size else set())
    if settings.is_autoregressive:  # both of the others are of full attention
        needed -= {BIDIRECTIONAL, PADDING}
    if settings.context == "causal":
        needed |= {CAUSAL}
    if settings.within == "causal":
        needed -= {BIDIRECTIONAL}
    for check in checks:
        if check.claim in needed and not check.passed:
            raise ValueError(f"{source} cannot be converted: the check '{check.claim}' failed ({check.measured}).")


# --- Reading ---------------------------------------------------------------------------------------------------------


def _read(
    source: str | Path,
    notes: list[str],
    *,
    mask_token_id: int | None,
    family: str | None,
    dtype: str | torch.dtype,
    block_size: int | None,
) -> tuple[Any, Any, DiffusionSettings | None]:
    """Read a model, its tokenizer and its settings (None: not yet a diffusion model); note what was created."""
    from transformers import AutoConfig, AutoTokenizer

    path, gguf_file = source, None
    if str(source).endswith(".gguf"):
        if not Path(source).is_file():
            raise ValueError(f"no model at {source}: the file does not exist.")
        path, gguf_file = Path(source).parent, Path(source).name
        with reading(str(source)):
            config = AutoConfig.from_pretrained(path, gguf_file=gguf_file)
            tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
        notes.append("unpacked the GGUF blocks")
    else:
        raw = read_raw_config(source)
        if raw.get("diffusion") or find_family(raw, name=family, hub_id=str(source)) is not None:
            denoiser, tokenizer, _ = load_denoiser(
                source, mask_token_id=mask_token_id, dtype=dtype, device="cpu", family=family, block_size=block_size
            )
            settings = denoiser.settings
            return denoiser.model, tokenizer, None if settings.is_autoregressive else settings
        config, tokenizer = read_config(source, raw), read_tokenizer(source)
        check_tokenizer(source, tokenizer, config)
    model_class = language_model_class(config)
    if (reason := refusal(config, model_class)) is not None:
        raise ValueError(f"{source} cannot be converted: {reason}.")
    created: list[str] = []

    def may_differ(what: str, name: str) -> bool:
        """Let an encoder lack its vocabulary head, and bring heads for other tasks."""
        if not is_encoder(config):
            return False
        if _OTHER_HEAD.search(name):
            return what == "unexpected"
        is_head = what == "missing" and not name.startswith(f"{model_class.base_model_prefix}.")
        created.extend([name] * is_head)
        return is_head

    model = load_weights(model_class, path, config=config, dtype=dtype, gguf_file=gguf_file, may_differ=may_differ)
    if created:
        notes.append("created the vocabulary head: the checkpoint had none, so it must be trained")
    return model, tokenizer, None


def refusal(config: Any, model_class: Any) -> str | None:
    """Say why an architecture cannot be converted; None if only the checks can tell."""
    if getattr(config, "is_encoder_decoder", False):
        return f"{config.model_type} is an encoder-decoder, and a diffusion model here has one sequence"
    if config.get_text_config() is not config:
        return f"{config.model_type} is multimodal; convert its text model by itself"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS)
    if model_class._is_stateful or others:
        kinds = f" ({', '.join(others)})" if others else ""
        what = "recurrent, convolutional, sparse or compressing layers"
        return f"{config.model_type} has {what}{kinds}, made for reading left to right"
    return None


# --- The mask token --------------------------------------------------------------------------------------------------


def choose_mask(model: Any, tokenizer: Any, mask_token_id: int | None) -> tuple[int, str]:
    """Find or make the mask token's row, set its token in the tokenizer; return its id and what was done.

    Raises ValueError for an id outside the vocabulary.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id is not None:
        if not 0 <= mask_token_id < rows:
            raise ValueError(f"mask_token_id must lie in the vocabulary of {rows} tokens; got {mask_token_id}.")
        if tokenizer is not None and mask_token_id < len(tokenizer):
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)
        return mask_token_id, f"mask token: {mask_token_id}, as asked"
    if tokenizer is not None and tokenizer.mask_token_id is not None:
        chosen = int(tokenizer.mask_token_id)
        return chosen, f"mask token: {chosen}, the tokenizer's own {tokenizer.mask_token}"
    chosen, what = rows, "a new row"
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab().items()
        reserved = sorted((index, token) for token, index in vocabulary if RESERVED.match(token) and index < rows)
        tokenizer.add_special_tokens({"mask_token": reserved[0][1] if reserved else MASK_TOKEN})
        chosen = int(tokenizer.mask_token_id)
        if chosen < rows:
            what = f"the reserved {reserved[0][1]}" if reserved else "a spare row"
    _set_to_mean(model, chosen)
    return chosen, f"mask token: {chosen}, {what}, set to the mean of the other rows"


@torch.no_grad()
def _set_to_mean(model: Any, row: int) -> None:
    """Set a row of the embedding and of the head to the mean of the others; make the row where there is none."""
    if row >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(row + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Tensor = module.weight
        others = torch.arange(weight.shape[0], device=weight.device) != row
        weight[row] = weight[others].float().mean(dim=0).to(weight.dtype)


# --- Writing ---------------------------------------------------------------------------------------------------------


def _family_to_write(name: str) -> Family | None:
    family = find_family({}, name=name)
    if family is not None and family.original is None:
        names = [family.name for family in FAMILIES if family.original is not None]
        raise ValueError(f"a checkpoint cannot be written as {name}. Use one of {', '.join(names)}.")
    return family


def _save(model: Any, out: Path, *, family: Family | None) -> None:
    """Save under the stock names, or under a family's own."""
    if family is None:
        model.save_pretrained(out)
        return
    raw = family.original_config(model.config)
    stock_class = type(model)
    try:
        model.__class__ = renaming_class(stock_class, family)
        model._weight_conversions = None  # so that transformers looks for the renames to reverse, under that class
        model.save_pretrained(out)
    finally:
        model.__class__ = stock_class
    (out / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True, default=str) + "\n")
