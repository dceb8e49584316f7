"""Budgets: so many forwards, or so many seconds, and no more."""

import time
from dataclasses import dataclass

from redraft.errors import check_types


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a generation may cost. Whatever the policies say, every step commits its share of what is left."""

    forwards: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.forwards is not None and self.forwards < 1:
            raise ValueError(f"forwards must be at least 1; got {self.forwards}.")
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

    def count(self) -> None:
        """Note that a forward has been made, and how long it took; the first one, with its prompt, tells little."""
        now = time.perf_counter()
        took, self.last = now - self.last, now
        is_typical = self.per_forward is not None and self.num_forwards > 1
        self.per_forward = 0.5 * (self.per_forward + took) if is_typical and self.per_forward else took
        self.num_forwards += 1

    def forwards_left(self) -> int | None:
        """Say how many forwards are left, this one included; None while nothing is known."""
        if self.budget.forwards is not None:
            return max(1, self.budget.forwards - self.num_forwards)
        if self.budget.seconds is None or self.per_forward is None:
            return None
        rest = self.budget.seconds - (time.perf_counter() - self.begun)
        return max(1, int(rest / self.per_forward))
