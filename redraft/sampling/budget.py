"""Budgets: so many forwards, or so many seconds, and no more."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from redraft.errors import MOST, check_count, check_types


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a generation may cost. Whatever the policies say, every step commits its share of what is left."""

    forwards: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_count("forwards", self.forwards)
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive; got {self.seconds}.")


class Meter:
    """Counts one generation's forwards and seconds against its budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.begun = time.perf_counter()
        self.last = self.begun
        self.per_forward: float | None = None
        self.num_forwards = 0

    def count(self, num_forwards: int) -> None:
        """Note how many forwards were made so far, and how long the last one took.

        The first, with its prompt, tells little. The time of a step without a forward counts to the next forward.
        """
        if num_forwards == self.num_forwards:
            return
        now = time.perf_counter()
        took, self.last = now - self.last, now
        is_typical = self.per_forward is not None and self.num_forwards > 1
        self.per_forward = 0.5 * (self.per_forward + took) if is_typical and self.per_forward else took
        self.num_forwards = num_forwards

    def forwards_left(self, num_forwards: Int[Tensor, "batch"]) -> Int[Tensor, "batch"] | None:
        """Say how many forwards rows have left that took part in so many, the next included; None while not known."""
        if self.budget.forwards is not None:
            return (self.budget.forwards - num_forwards).clamp(min=1)
        if self.budget.seconds is None or self.per_forward is None:
            return None
        rest = self.budget.seconds - (time.perf_counter() - self.begun)
        return torch.full_like(num_forwards, max(1, int(min(rest / self.per_forward, MOST))))
