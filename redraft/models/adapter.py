"""Adapters of peft (LoRA and relatives): find one, put it on a model, merge it into the weights."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redraft.checkpoints import local_path
from redraft.models.files import Raw, check_raw, first_line, read_json, reading
from redraft.models.finite import check_finite
from redraft.models.gate import add_gate, check_base, is_gated_folder, lora_settings
from redraft.models.probe import difference, is_equal, sequence


def split_adapter(path: str | Path) -> tuple[str | Path, str | Path | None]:
    """Return the base model and the adapter of a folder; a folder without an adapter is its own base.

    Raises ValueError where the adapter does not name its base.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return path, None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).absolute() == Path(path).absolute():
        raise ValueError(f"the adapter {path} names no base model. Load the base, with adapter={str(path)!r}.")
    return local_path(base), path


def adapter_config(adapter: str | Path | None) -> Raw:
    """Read the config.json that training saved beside an adapter; empty for adapters from elsewhere."""
    file = Path(adapter or "") / "config.json"
    raw = read_json(file) if adapter and file.is_file() else {}
    check_raw(raw)
    return raw


def attach_adapter(model: Any, adapter: str | Path) -> Any:
    """Put a peft adapter on a model. Raises ValueError where it is not one or does not fit every weight."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    has_gate = is_gated_folder(adapter)
    with reading(f"an adapter from {adapter}"):
        if has_gate:
            settings = lora_settings(adapter)
        else:
            settings = PeftConfig.from_pretrained(str(adapter))
        weights = load_peft_weights(str(adapter), device="cpu")
    check_finite(adapter, weights.items())
    widest = max((max(weight.shape, default=0) for weight in weights.values()), default=0)
    for rank in (getattr(settings, "r", 0), *getattr(settings, "rank_pattern", {}).values()):
        if isinstance(rank, int) and rank > widest:  # before memory is taken
            raise ValueError(f"the adapter {adapter} has rank {rank}, and its weights have {widest} rows at most.")
    if has_gate:
        check_base(adapter, model)
    settings.inference_mode = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice is for those who make adapters
            wrapped = get_peft_model(model, settings)
        result: Any = set_peft_model_state_dict(wrapped, weights)
    except Exception as error:  # an adapter's settings may fail anywhere in peft
        raise ValueError(f"the adapter {adapter} does not fit this model: {first_line(error)}.") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        names = [*missing, *result.unexpected_keys]
        raise ValueError(f"the adapter {adapter} does not fit this model: {len(names)} weights, first {names[0]}.")
    if has_gate:
        add_gate(wrapped.get_base_model())
    return wrapped


@torch.no_grad()
def share_weights(model: Any, base: Any) -> int:
    """Let a model with an adapter use the weights of its base, which is loaded too; return how many bytes that frees.

    Weights that differ stay apart.
    """
    freed, of_base = 0, dict(base.named_parameters())
    for name, own in model.named_parameters():
        other = of_base.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if other is not None and own.data_ptr() != other.data_ptr() and own.dtype == other.dtype and own.equal(other):
            own.data = other.data
            freed += other.nbytes
    return freed


@torch.no_grad()
def merge_adapter(model: Any, adapter: str | Path) -> Any:
    """Add an adapter to the weights, and check that the logits are those of the model with the adapter.

    Raises ValueError where the weights have no place for it (biases of an architecture without them).
    """
    if is_gated_folder(adapter):
        raise ValueError(
            f"the adapter {adapter} has a gate: merged, it would act on all tokens. Load it over its base instead: "
            f"redraft.load({str(adapter)!r})."
        )
    wrapped, ids = attach_adapter(model, adapter).eval(), sequence(model, length=12)
    laid_over = wrapped(input_ids=ids).logits
    untie(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # they are tied no more
            merged = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"the adapter {adapter} cannot be merged: {first_line(error)}. Load it on top of its base instead: "
            f"redraft.load(BASE, adapter={str(adapter)!r})."
        ) from error
    moved = difference(merged(input_ids=ids).logits, laid_over)
    if not is_equal(moved, model):
        raise ValueError(f"the adapter {adapter} cannot be merged: logits with it merged are off by {moved:.1e}.")
    return merged


def untie(model: Any) -> None:
    """Copy tied weights, so that each module has its own, where an adapter changes the embedding or the head."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not model.config.tie_word_embeddings or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    seen = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(parameter)
    model.config.tie_word_embeddings = False
