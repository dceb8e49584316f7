"""A logged loss that jumps, traced to the window of data that cost most and to its step."""

from collections.abc import Sequence
from math import inf, isfinite
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

HISTORY, FEWEST = 20, 10  # logged losses that tell what is usual
DEVIATIONS, SHARE = 10, 0.1


def usual_loss(losses: Sequence[float]) -> tuple[float, float]:
    """Return the median of the last losses, and above what a loss has jumped; infinity where they are too few.

    That is 10 median absolute deviations above the median and a tenth above it: means and deviations would follow the
    jumps, and the losses of few rows have a heavy tail.
    """
    recent = [loss for loss in losses if isfinite(loss)][-HISTORY:]
    if len(recent) < FEWEST:
        return inf, inf
    middle = median(recent)
    deviation = median(abs(loss - middle) for loss in recent)
    return middle, middle + max(DEVIATIONS * deviation, SHARE * abs(middle))


class Spikes:
    """Remember on the device which row cost most since the last log, and look at it where the logged loss jumped."""

    def __init__(self) -> None:
        self._worst: tuple[Tensor, Tensor] | None = None  # its nats, (1,); its step and window, (1, 2)

    def record(self, nats: Float[Tensor, "rows"], windows: Int[Tensor, "rows"], *, step: int) -> None:
        """Compare one forward pass with the worst row so far; waits for nothing."""
        found, row = nats.detach().max(0, keepdim=True)
        place = torch.stack([torch.full_like(row, step), windows[row]], dim=1)  # (1, 2)
        nats, at = self._worst or (torch.full_like(found, -inf), place)
        self._worst = torch.fmax(nats, found), torch.where(found > nats, place, at)  # not NaN: that is the guard's

    def report(self, loss: float, earlier: Sequence[float], *, accelerator: Any) -> dict[str, Any]:
        """Say what is known of a jump, nothing where there is none. All processes call it, with the same losses."""
        worst, self._worst = self._worst, None
        usual, limit = usual_loss(earlier)
        if not limit < loss < inf or worst is None:
            return {}
        nats, at = accelerator.gather(worst)
        step, window = at[nats.argmax()].tolist()
        return {"usual_loss": usual, "spike_step": step + 1, "spike_window": window}
