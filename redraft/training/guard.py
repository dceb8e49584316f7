"""What happens to a step whose gradient is not finite: it is skipped, counted, and its batch kept."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from redraft.training.checkpoint import explain_disk_errors

MAX_SKIPPED = 10  # steps; a run with more of them stops
MAX_SAVED = 5  # batches saved for inspection, of every process


class Guard:
    """Skip steps with a gradient that is not a number or infinite, without waiting for the device.

    The verdict stays on the device, where the fused AdamW reads it: weights and moments stay as they were, the learning
    rate goes on. It is looked at when the loss is logged, which waits for the device anyway.
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
                f"diverged. The first such batches are in {self.folder}. Begin a new run with a lower "
                "--train.learning-rate and another --out, or look at the data."
            )

    def _save(self, step: int, batches: Sequence[dict[str, Tensor]]) -> None:
        tensors = {f"{i}.{name}": value.cpu().contiguous() for i, b in enumerate(batches) for name, value in b.items()}
        with explain_disk_errors(f"the batch of step {step}", self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.folder / f"step-{step}-process-{self.rank}.safetensors")
