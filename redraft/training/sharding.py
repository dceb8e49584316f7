"""Save and load weights and optimizer state that FSDP2 has sharded.

A checkpoint is written unsharded, as by one process: it resumes under any number of processes, sharded or not.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from redraft.models.gate import is_gated, mark_gated
from redraft.models.load import load_weights
from redraft.training.adapter import has_adapter, read_adapter
from redraft.training.loop import KeyedTrainer

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "FSDP", "DEEPSPEED")


class WholeCheckpoints(KeyedTrainer):
    """Write and read unsharded checkpoints, also of sharded weights and of adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind = self.accelerator.distributed_type.value
        self.is_sharded = kind == "FSDP"
        if kind not in SUPPORTED or (self.is_sharded and self.accelerator.state.fsdp_plugin.fsdp_version != 2):
            raise ValueError(f"training under {kind} (or FSDP 1) is not supported. Use ddp, fsdp2 or deepspeed.")
        if self.is_sharded and (self.average or has_adapter(self.model)):
            what = "train.ema_decay" if self.average else "an adapter"
            raise ValueError(f"{what} is not supported over sharded weights (fsdp2). Leave it out, or use ddp.")

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and let it shard on the CPU too, where accelerate alone would not."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if state.distributed_type is DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
        self.is_fsdp_enabled = state.distributed_type is DistributedType.FSDP

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if has_adapter(self.model) and self.args.should_save:  # its diffusion settings may differ from its base's
            folder = output_dir or self.args.output_dir
            cast(Any, self.model).config.save_pretrained(folder)
            if is_gated(self.model):
                mark_gated(cast(str, folder), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if has_adapter(self.model):
            read_adapter(self.model, resume_from_checkpoint)
        else:
            restore_weights(self.model, resume_from_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, sharded or not; all processes take part."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model
        weights = whole(dict(model.state_dict(keep_vars=True)), keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = whole(optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer  # accelerate's wrapper
        scheduler: Any = self.lr_scheduler
        saved = torch.load(Path(checkpoint) / OPTIMIZER_FILE, mmap=True, weights_only=True)
        load_moments(optimizer.optimizer, saved)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))
        return None


def whole(tree: Any, *, keep: bool) -> Any:
    """Gather every sharded tensor of a tree onto the CPU, one at a time; all processes take part.

    Processes that do not `keep` the result get empty tensors. Tied weights stay one tensor.
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


@torch.no_grad()
def restore_weights(model: Any, folder: str | Path) -> None:
    """Give every process its part of the weights of a checkpoint. Raises ValueError where they do not fit.

    The model's own class reads them, as names in a file may differ from the model's (experts are saved one by one).
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
