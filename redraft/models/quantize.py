"""Quantised weights: 8 or 4 bits in linear layers, through transformers' quantisers (torchao, bitsandbytes)."""

import logging
from typing import Any

import torch

from redraft.errors import unknown_name

QUANTIZATIONS = ("int8", "int4", "nf4")
INT4_GROUP = 32
"""Weights that share a scale and a zero in int4: 32 divides the widths of nearly every model, at 5 bits a weight."""


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
"""It warns, whenever peft is imported, of a missing kernel that is never used because of `keep_format`."""


def quantizer(
    name: str, *, config: Any, model_class: Any, device: torch.device, dtype: str | torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that pack each matrix where it will run.

    One scale per row for int8, groups of 32 for int4 (both torchao's), of 64 for nf4: the 4-bit NormalFloat of QLoRA
    (2305.14314), its scales quantised again, by bitsandbytes; products are taken in `dtype` ("auto": the checkpoint's).
    Embeddings, the head, norms and, for int4, linear layers whose width 32 does not divide keep the model's dtype.

    Raises ValueError for another name, without the package, for a checkpoint that is quantised already and for a
    mixture of experts, whose fused experts are no linear layers.
    """
    if name not in QUANTIZATIONS:
        raise unknown_name("quantization", name, QUANTIZATIONS)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"this checkpoint is quantised already; got quantization={name!r}. Leave it out.")
    if _has_fused_experts(model_class, config):
        raise ValueError(
            f"quantization={name!r} reaches linear layers, and nearly all weights of {config.model_type} are fused "
            "experts. Load it without, in bfloat16."
        )
    from transformers import utils

    package = "bitsandbytes" if name == "nf4" else "torchao"
    if not getattr(utils, f"is_{package}_available")():
        raise ValueError(
            f"quantization={name!r} needs {package}, which is not installed: pip install 'redraft[quant]'."
        )
    kernel = _nf4(config.dtype if dtype == "auto" else dtype) if name == "nf4" else _torchao(name, device)
    return {"quantization_config": kernel, "device_map": {"": device}}


def _nf4(dtype: str | torch.dtype | None) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _torchao(name: str, device: torch.device) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False))
    packing = "tile_packed_to_4d" if device.type == "cuda" else "plain_int32"
    kernel = Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format=packing, set_inductor_config=False)
    return TorchAoConfig(kernel)


def keep_format(model: Any) -> None:
    """Keep the layers of nf4 as they were packed.

    On a CPU with bfloat16 arithmetic they would repack themselves in the first forward without a gradient, for a kernel
    that multiplies in bfloat16 whatever the dtype is, and that needs the number of rows to be a multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _has_fused_experts(model_class: Any, config: Any) -> bool:
    """Tell whether matrices of several experts are stacked into one parameter."""
    with torch.device("meta"):
        return any(p.ndim == 3 and name.endswith("_proj") for name, p in model_class(config).named_parameters())
