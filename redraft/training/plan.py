"""The clock of a run, and the plan of its steps: where it ends, and how far its learning rate is. No torch."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from redraft.folders import write_whole

PLAN_FILE = "plan.json"
UNLIMITED = 10**9
"""Steps of a run that its minutes alone limit."""


@dataclass(kw_only=True)
class Clock:
    """Seconds since a command began."""

    now: Callable[[], float] = time.monotonic
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now()

    def seconds(self) -> float:
        """Return the seconds since the clock was made."""
        return self.now() - self.began


@dataclass(kw_only=True)
class Plan:
    """Where a run ends, and how far its learning rate is; every checkpoint holds it as plan.json.

    The learning rate after `step` steps is the one that a run of `schedule_steps` steps has after `place(step)` steps:
    `step` itself, until the end is moved (a machine that slows down) or the schedule starts again (a finished run that
    is trained for longer).
    """

    end: int
    """Steps after which the run ends."""
    max_steps: int
    """Steps asked for; `end` is below where time does not suffice."""
    schedule_steps: int
    """Steps that warm-up and decay are computed for."""
    turn: int = 0
    """Step of the last change of the plan."""
    place_at_turn: float = 0.0
    is_compiled: bool = False
    max_minutes: float | None = None
    minutes: float = 0.0
    """Minutes that the run has taken, up to the checkpoint."""

    def place(self, step: int) -> float:
        """Return the place in the schedule, from 0 to `schedule_steps`."""
        if (self.turn, self.end) == (0, self.schedule_steps):
            return step
        share = min((step - self.turn) / max(self.end - self.turn, 1), 1) if step < self.end else 1
        return self.place_at_turn + (self.schedule_steps - self.place_at_turn) * share

    def move_end(self, end: int, *, step: int) -> None:
        """End earlier or later; from the place at `step` on the schedule is compressed or stretched."""
        self.place_at_turn, self.turn, self.end = self.place(step), step, end

    def start_again(self, end: int, *, step: int) -> None:
        """Run through the whole schedule once more, warm-up included, from `step` to `end`."""
        self.place_at_turn, self.turn, self.end = 0.0, step, end

    def save(self, folder: Path) -> None:
        """Write the plan into a checkpoint."""
        write_whole(folder / PLAN_FILE, json.dumps(asdict(self), indent=2) + "\n")
