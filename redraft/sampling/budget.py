"""Budgets: so many forwards, or so many seconds, and no more."""

import math
import time
from dataclasses import dataclass

from jaxtyping import Float, Int
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

    def deadline(self) -> float:
        """Say when the time is over that begins now."""
        return math.inf if self.seconds is None else time.perf_counter() + self.seconds

    def forwards_left(
        self, num_forwards: Int[Tensor, "batch"], deadline: Float[Tensor, "batch"], clock: "Clock"
    ) -> Int[Tensor, "batch"] | None:
        """Say how many forwards rows have left that took part in so many, the next included; None while not known."""
        if self.forwards is not None:
            return (self.forwards - num_forwards).clamp(min=1)
        if self.seconds is None or clock.per_forward is None:
            return None
        return ((deadline - time.perf_counter()) / clock.per_forward).clamp(min=1, max=MOST).long()


@dataclass
class Clock:
    """How many seconds a forward takes."""

    per_forward: float | None = None
    num_forwards: int = 0
    since_last: float = 0.0

    def count(self, seconds: float, num_forwards: int) -> None:
        """Note the time of a step, and how many forwards were made so far.

        The first, with its prompt, tells little. The time of a step without a forward counts to the next forward.
        """
        self.since_last += seconds
        if num_forwards > self.num_forwards:
            before = self.per_forward if self.per_forward and self.num_forwards > 1 else self.since_last
            self.per_forward = 0.5 * (before + self.since_last)
            self.num_forwards, self.since_last = num_forwards, 0.0
