"""A gate over an adapter: it acts on the tokens of open blocks alone, and the base reads committed text as before.

Then an autoregressive model that learns to draft keeps its own text, token for token (Gated LoRA, "Your LLM Knows the
Future", arXiv 2507.11851). Such an adapter cannot be merged, and its folder names a type that peft refuses, as peft
would apply it to every token.
"""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redraft.folders import write_whole
from redraft.models.files import read_json

PEFT_TYPE = "REDRAFT_GATED_LORA"
BASE = "base_fingerprint"
"""The entry of adapter_config.json that tells the weights which the adapter was trained over."""
OPEN = "open_tokens"
"""The argument of a gated model's forward: which tokens of the flattened input the adapter acts on, (n,)."""


class Gate:
    """Holds for the layer that runs in this thread which tokens are open.

    An attention module gets the tokens as an argument, and notes them for the linear layers after it. A layer that is
    computed again in the backward pass, perhaps in another thread, gets them again.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self.heard = 0
        """How often an attention module was told which tokens are open."""

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before an attention module: note which tokens are open."""
        self._local.tokens = kwargs.get(OPEN)
        self.heard += OPEN in kwargs

    def pick(self, module: nn.Module, args: tuple[Float[Tensor, "batch seq dim"]]) -> Tensor:
        """Before the first matrix of an adapter: keep the open tokens alone."""
        self._local.shape = args[0].shape[:-1]
        return args[0].flatten(0, -2).index_select(0, self._tokens(args[0].device))

    def put(self, module: nn.Module, args: Any, output: Float[Tensor, "n dim"]) -> Float[Tensor, "batch seq dim"]:
        """After the second matrix: add nothing to the other tokens."""
        shape = self._local.shape
        whole = output.new_zeros(shape.numel(), output.shape[-1])
        return whole.index_copy(0, self._tokens(output.device), output).view(*shape, -1)

    def _tokens(self, device: torch.device) -> Int[Tensor, "n"]:
        tokens = getattr(self._local, "tokens", None)
        return torch.zeros(0, dtype=torch.int64, device=device) if tokens is None else tokens


_NO_GATE = (
    "has no self_attn layers that are told which tokens are open, which a gated adapter needs. Leave adapter.gate out."
)


@torch.no_grad()
def add_gate(model: Any) -> None:
    """Let the adapter that a model has act on open tokens alone. Raises ValueError for an architecture without one."""
    from peft.tuners.lora import LoraLayer

    gate, adapted = Gate(), {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    attentions = {name: module for name, module in model.named_modules() if name.endswith(".self_attn")}
    if not attentions:
        raise ValueError(f"{model.config.model_type} {_NO_GATE}")
    layers = tuple(name.removesuffix("self_attn") for name in attentions)
    if outside := [name for name in adapted if not name.startswith(layers)]:
        raise ValueError(
            f"a gated adapter acts inside of decoder layers; {outside[0]} lies outside. Name other adapter.targets."
        )
    for attention in attentions.values():
        attention.register_forward_pre_hook(gate.note, with_kwargs=True)
    for layer in adapted.values():
        for name in layer.lora_A:
            layer.lora_A[name].register_forward_pre_hook(gate.pick)
            layer.lora_B[name].register_forward_hook(gate.put)
    model.is_gated = True
    # Whether layers pass on what they are given is only seen when they run.
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        model(input_ids=ids, **{OPEN: ids[0]})
    except TypeError:
        gate.heard = 0
    if gate.heard < len(attentions):
        raise ValueError(f"{model.config.model_type} {_NO_GATE}")


def is_gated(model: Any) -> bool:
    """Tell whether a model has a gated adapter."""
    return bool(getattr(model, "is_gated", False))


def is_gated_folder(adapter: str | Path) -> bool:
    """Tell whether the adapter in a folder is gated."""
    file = Path(adapter) / "adapter_config.json"
    return file.is_file() and read_json(file).get("peft_type") == PEFT_TYPE


def mark_gated(folder: str | Path, model: Any) -> None:
    """Write into a saved adapter that it is gated, and over which weights."""
    file = Path(folder) / "adapter_config.json"
    saved = read_json(file) | {"peft_type": PEFT_TYPE, BASE: fingerprint(model)}
    write_whole(file, json.dumps(saved, indent=2) + "\n")


def lora_settings(adapter: str | Path) -> Any:
    """Read the settings of a gated adapter as peft's."""
    from peft import LoraConfig

    saved = read_json(Path(adapter) / "adapter_config.json")
    return LoraConfig(**{name: value for name, value in saved.items() if name not in ("peft_type", BASE)})


def check_base(adapter: str | Path, model: Any) -> None:
    """Raise ValueError where a gated adapter was trained over other weights: drafts would not fit the text.

    Weights that were quantised, in training or now, cannot be compared.
    """
    before, now = read_json(Path(adapter) / "adapter_config.json").get(BASE), fingerprint(model)
    if before is not None and now is not None and before != now:
        raise ValueError(
            f"the adapter {adapter} was trained over other weights than those of this model. Load its base."
        )


@torch.no_grad()
def fingerprint(model: Any) -> str | None:
    """Hash some numbers of each weight, in bfloat16: the same in float64, float32 and bfloat16.

    None for quantised weights, and for float16, which rounds otherwise.
    """
    import hashlib

    if getattr(model, "is_quantized", False) or model.dtype == torch.float16:
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".lora_" in name or not weight.is_floating_point():
            continue
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.replace(".base_layer.", ".").removeprefix("base_model.model.").encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
