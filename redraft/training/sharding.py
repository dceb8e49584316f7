"""Weights and moments that FSDP2 has sharded, to and from the checkpoints of one process.

A checkpoint is written whole, as by an unsharded run: it resumes under any number of processes, sharded or not.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from redraft.models.load import load_weights

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Take up FSDP where it was launched on the CPU: accelerate does so on accelerators alone, fully_shard on both."""
    state: Any = accelerator.state
    if state.distributed_type is DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()


def whole(tree: Any, *, keep: bool) -> Any:
    """Gather every sharded tensor of a tree onto the CPU, one at a time; all processes take part.

    Those that do not `keep` the result get empty tensors. What stands in it twice (tied weights) stays one tensor.
    """
    gathered: dict[int, Tensor] = {}

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in gathered:
            full = leaf.full_tensor().detach() if isinstance(leaf, DTensor) else leaf.detach()
            gathered[id(leaf)] = full.cpu() if keep else full.new_empty(0, device="cpu")
        return gathered[id(leaf)]

    return tree_map(gather, tree)


def whole_weights(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """Gather the weights of a model."""
    weights: dict[str, Tensor] = whole(dict(model.state_dict(keep_vars=True)), keep=keep)
    return weights


@torch.no_grad()
def restore_weights(model: Any, folder: str | Path) -> None:
    """Give every process its part of the weights of a checkpoint. Raises ValueError where they do not fit.

    The model's own class reads them: the names in a file need not be those of the model (experts are saved one by one).
    """
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    weights = load_weights(kind, folder, config=model.config, dtype=model.dtype).state_dict()
    for name, value in model.state_dict(keep_vars=True).items():
        value.copy_(like(weights[name], value))


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor as a parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give every process its part of an optimizer's state. Parameters are numbered as in the optimizer's groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {name: like(value, parameters[number]) if name != "step" else value for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
