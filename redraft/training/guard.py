"""Skip and count steps whose gradient is not finite; find the window behind a jump of the logged loss.

Neither waits for the device before the loss is logged.
"""

from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from redraft.training.checkpoint import explain_disk_errors

MAX_SKIPPED = 10  # steps; a run with more of them stops
MAX_SAVED = 5  # batches saved for inspection, of every process
HISTORY, MIN_LOSSES = 20, 10  # logged losses
DEVIATIONS, SHARE = 10, 0.1


class Guard:
    """Skip steps whose gradient is NaN or infinite, without waiting for the device.

    The verdict stays on the device, where the fused AdamW reads it: it leaves weights and moments unchanged; the
    learning rate schedule continues. The host reads it when the loss is logged, which waits for the device anyway.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self.num_skipped = 0
        self._recent: list[tuple[int, Sequence[dict[str, Tensor]], Tensor]] = []

    def found_inf(self, norm: Tensor, batches: Sequence[dict[str, Tensor]], *, step: int) -> Tensor:
        """Return 1 for a step to be skipped, 0 for another, in the form that fused optimizers take."""
        verdict = (~torch.isfinite(norm.detach())).float()
        self._recent.append((step, batches, verdict))
        return verdict

    def report(self) -> int:
        """Count the steps skipped since the last call, and save their batches."""
        if not self._recent:
            return 0
        verdicts = torch.stack([verdict for _, _, verdict in self._recent]).tolist()
        bad = [(step, batches) for (step, batches, _), skip in zip(self._recent, verdicts, strict=True) if skip]
        for step, batches in bad[: max(0, MAX_SAVED - self.num_skipped)]:
            self._save(step, batches)
        self._recent.clear()
        self.num_skipped += len(bad)
        return len(bad)

    def check(self) -> None:
        """Raise ValueError where more steps were skipped than allowed."""
        if self.num_skipped > MAX_SKIPPED:
            raise ValueError(
                f"{self.num_skipped} steps had a gradient that is not finite, more than {MAX_SKIPPED}: the run "
                f"diverged. The first such batches are in {self.folder}. Start a new run with a lower "
                "--train.learning-rate and another --out, or check the data."
            )

    def _save(self, step: int, batches: Sequence[dict[str, Tensor]]) -> None:
        tensors = {f"{i}.{name}": value.cpu().contiguous() for i, b in enumerate(batches) for name, value in b.items()}
        with explain_disk_errors(f"the batch of step {step}", self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.folder / f"step-{step}-process-{self.rank}.safetensors")


def usual_loss(losses: Sequence[float]) -> tuple[float, float]:
    """Return the median of the last losses, and the limit above which a loss has jumped; infinity if too few.

    The limit is 10 median absolute deviations above the median, and at least a tenth above it: mean and standard
    deviation would follow the jumps, and the losses of few rows have a heavy tail.
    """
    recent = [loss for loss in losses if isfinite(loss)][-HISTORY:]
    if len(recent) < MIN_LOSSES:
        return inf, inf
    middle = median(recent)
    deviation = median(abs(loss - middle) for loss in recent)
    return middle, middle + max(DEVIATIONS * deviation, SHARE * abs(middle))


class Spikes:
    """Keep on the device which row had the highest loss since the last log; read it if the logged loss jumped."""

    def __init__(self) -> None:
        self._worst: tuple[Tensor, Tensor] | None = None  # its nats, (1,); its step and window, (1, 2)

    def record(self, nats: Float[Tensor, "rows"], windows: Int[Tensor, "rows"], *, step: int) -> None:
        """Compare one forward pass with the worst row so far; does not wait for the device."""
        highest, row = nats.detach().max(0, keepdim=True)
        place = torch.stack([torch.full_like(row, step), windows[row]], dim=1)  # (1, 2)
        before, place_before = self._worst or (torch.full_like(highest, -inf), place)
        # fmax ignores NaN, which the guard counts.
        self._worst = torch.fmax(before, highest), torch.where(highest > before, place, place_before)

    def report(self, loss: float, earlier: Sequence[float], *, accelerator: Any) -> dict[str, Any]:
        """Return the window and step behind a jump, nothing where there is none. All processes call it."""
        worst, self._worst = self._worst, None
        usual, limit = usual_loss(earlier)
        if not limit < loss < inf or worst is None:
            return {}
        nats, places = accelerator.gather(worst)
        step, window = places[nats.argmax()].tolist()
        return {"usual_loss": usual, "spike_step": step + 1, "spike_window": window}
