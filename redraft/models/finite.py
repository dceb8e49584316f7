"""What breaks a forward: NaN and infinity, refused when a model is loaded and explained in logits; want of memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(source: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError for a tensor that holds NaN or infinity, by name.

    One pass over the tensors where they lie, without a copy, and one wait for the device.
    """
    names, ends = [], []
    for name, tensor in tensors:
        names.append(name)
        ends.append(torch.stack(torch.aminmax(tensor.detach())).double())  # both are NaN where one element is
    if not ends:
        return
    is_finite = torch.stack(ends).isfinite().all(dim=1).tolist()  # sync
    damaged = [name for name, fine in zip(names, is_finite, strict=True) if not fine]
    if damaged:
        more = f" (and {len(damaged) - 1} more tensors)" if len(damaged) > 1 else ""
        raise ValueError(
            f"{source}: {damaged[0]} holds NaN or infinity{more}. The file is damaged, or its values are too large for "
            "the dtype it is loaded in: fetch it again, or load it with dtype='float32'."
        )


def floats_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the weights and buffers by name, with the scales of quantised ones."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from _floats(name, tensor)


def _floats(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that are made of others
        for part in tensor.__tensor_flatten__()[0]:
            yield from _floats(f"{name}.{part}", getattr(tensor, part))
    elif tensor.dtype in CHECKED and tensor.numel() and not tensor.is_meta:
        yield name, tensor


@torch.no_grad()
def explain_nan(denoiser: Any, input_ids: Int[Tensor, "batch seq"]) -> ValueError:
    """Make the error for logits that are NaN: one more forward finds the first tensor that is not finite."""
    first: list[str] = []
    leaves = {module: name for name, module in denoiser.model.named_modules() if not any(module.children())}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not first and isinstance(hidden, Tensor) and not hidden.isfinite().all():
            first.append(leaves[module])

    handles = [module.register_forward_hook(look) for module in leaves]
    try:
        check_finite("this model", floats_of(denoiser.model))
        denoiser.logits(input_ids)
    except ValueError as error:
        return error
    finally:
        for handle in handles:
            handle.remove()
    if first:
        dtype = str(denoiser.model.dtype).removeprefix("torch.")
        return ValueError(
            f"the logits are NaN, though no weight is: the output of {first[0]} is the first that is not finite in "
            f"{dtype}. Load the model with another dtype (dtype='float32'), and look for damage in that layer."
        )
    return ValueError(
        "the logits are NaN, though the model's own are finite: a guide, a logits processor or cfg_scale made them so, "
        "or left no token."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is full, on any device: torch has no class for the host's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
