"""LoRA (arXiv 2106.09685): low-rank matrices beside frozen linear layers; QLoRA (2305.14314) if these are quantised."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redraft.checkpoints import public_name
from redraft.models.config import AdapterConfig
from redraft.models.gate import add_gate

ALL_LINEAR = "all-linear"


def add_adapter(model: Any, config: AdapterConfig) -> None:
    """Freeze the model and put float32 matrices beside its targets, in place: at first they add nothing.

    Raises ValueError for targets that name no linear layer.
    """
    from peft import LoraConfig

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft's annotation says int; it only divides it
        target_modules=_targets(model, config.targets),
    )
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `merge_adapter` unties them
        model.add_adapter(lora)
    if config.gate:
        add_gate(model)
    if Path(model.name_or_path).is_dir():
        lora.base_model_name_or_path = public_name(model.name_or_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _targets(model: Any, targets: str) -> str | list[str]:
    """Resolve the targets to what peft takes. Raises ValueError for a name without a linear layer."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
    from transformers.pytorch_utils import Conv1D

    if targets == "auto":
        targets = ",".join(PEFT_TARGETS.get(model.config.model_type, [ALL_LINEAR]))
    if targets == ALL_LINEAR:
        return targets
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    chosen = [target.strip() for target in targets.split(",")]
    for target in chosen:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            candidates = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"adapter.targets names no linear layer of {model.config.model_type}; got {target!r}. Choose among "
                f"{', '.join(candidates)}, or use {ALL_LINEAR}."
            )
    return chosen


def has_adapter(model: Any) -> bool:
    """Tell whether `add_adapter` was called on the model; `save_pretrained` then writes the adapter alone."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def read_adapter(model: Any, folder: str) -> None:
    """Put the weights of a saved adapter into the one that the model has."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"), adapter_name="default")


def enable_checkpointing(model: Any) -> None:
    """Keep only the inputs of each layer for the backward pass. Raises ValueError for a model that cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def num_parameters(model: Any) -> tuple[int, int]:
    """Count the parameters that are trained, and all."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())
