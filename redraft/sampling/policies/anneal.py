"""Annealing: a temperature that falls while a block is denoised."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import check_types
from redraft.sampling.policies.candidates import Window


@runtime_checkable
class Anneal(Protocol):
    """Give each row's temperature in this step: the logits are divided by it before anything looks at them."""

    def __call__(self, window: Window) -> Float[Tensor, "batch"]: ...


@dataclass(frozen=True, kw_only=True)
class LinearAnneal:
    """Fall from `start` towards `end` in even steps: end + (start - end) t, t = 1 at a block's first step.

    t is (N - n) / N at step n = 0..N-1 of N, so the last step is one short of `end` (DiffusionGemma, transformers 5).
    """

    start: float = 0.8
    end: float = 0.4

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.end <= self.start:
            raise ValueError(f"a temperature must fall and stay positive; got {self.start} to {self.end}.")

    def __call__(self, window: Window) -> Float[Tensor, "batch"]:
        t, _ = window.times
        return (self.end + (self.start - self.end) * t).to(torch.float32)
