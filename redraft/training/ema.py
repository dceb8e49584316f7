"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

AVERAGE_FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Keep avg <- decay * avg + (1 - decay) * weights after every optimizer step.

    torch's AveragedModel copies the whole module; this keeps the trained weights only.
    """

    def __init__(self, model: Any, *, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights for the time of the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight_before = weight.detach().clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(weight_before)

    def save(self, folder: Path) -> None:
        """Write the average beside a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.averages.items()}, folder / AVERAGE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the average of a checkpoint."""
        for name, tensor in load_file(folder / AVERAGE_FILE).items():
            self.averages[name].copy_(tensor)
