"""Learning from preferences: VRPO (arXiv 2505.19223), with the start, frozen, as reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.data.collate import collate_preferences, targets_of
from redraft.likelihood.objectives.preference import bounds, preference_loss, preference_margins
from redraft.likelihood.problem import CleanRows, NoiseKey
from redraft.models.denoiser import Denoiser
from redraft.training.adapter import has_adapter
from redraft.training.loop import Batch
from redraft.training.trainer import EVALUATION_STEP, DiffusionTrainer


class PreferenceTrainer(DiffusionTrainer):
    """Minimise -log sigmoid(beta * margin) per pair, the margins by the objective's bound on shared noise."""

    def __init__(self, denoiser: Denoiser, *args: Any, beta: float, num_samples: int, **kwargs: Any) -> None:
        super().__init__(denoiser, *args, **kwargs)
        self.beta, self.num_samples = beta, num_samples
        self._reference = denoiser
        if not has_adapter(denoiser.model):
            self._reference = replace(denoiser, model=deepcopy(denoiser.model).eval().requires_grad_(False))
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # margins, right pairs, pairs

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return collate_preferences(rows, pad_token_id=self.pad_token_id)

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count pairs, real tokens, and positions."""
        pairs = torch.tensor(len(batch["input_ids"]) // 2)
        return pairs, (batch["segment_ids"] > 0).sum(), batch["input_ids"].numel()

    @contextmanager
    def _reference_mode(self) -> Iterator[Denoiser]:
        """Give the model as it was at the start; under an adapter it is the same one, for a while without it."""
        model = self.denoiser.model
        if self._reference is not self.denoiser:
            yield self._reference
            return
        was_training = model.training
        model.eval()
        model.disable_adapters()
        try:
            yield self.denoiser
        finally:
            model.enable_adapters()
            model.train(was_training)

    def margins(
        self, batch: Batch, pair: Int[Tensor, "pairs"], *, seed: int, step: int, total: int, wrapped: Any
    ) -> Float[Tensor, "pairs"]:
        """Estimate the margins of a batch of `pair` numbers out of `total`, in nats; the policy's part has gradient."""
        rows = CleanRows(
            x_0=batch["input_ids"],
            segment_ids=batch["segment_ids"],
            is_target=targets_of(batch),
            has_padding=True,
            isolate_segments=self.isolate_segments,
        )
        key = NoiseKey(seed=seed, step=step, rows=torch.cat([2 * pair, 2 * pair + 1]), total_rows=2 * total)
        objective = self.training_objective.evaluation()
        settings: dict[str, Any] = {
            "num_samples": self.num_samples,
            "has_plain_head": self._has_plain_head and not self.is_sharded,
        }
        with self.accelerator.autocast():
            with torch.no_grad(), self._reference_mode() as reference:
                fixed = bounds(reference, objective, rows, key, **settings)
            return preference_margins(bounds(self.denoiser, objective, rows, key, wrapped=wrapped, **settings), fixed)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return this process' share of the mean loss over the pairs of the global batch."""
        assert num_items_in_batch is not None
        count = len(inputs["input_ids"]) // 2
        pair = inputs["row"][0] // 2 + torch.arange(count, device=inputs["row"].device)  # whatever the split
        step, total = self.state.global_step, self._global_rows // 2
        margins = self.margins(inputs, pair, seed=self.args.seed, step=step, total=total, wrapped=model)
        losses = preference_loss(margins, beta=self.beta)
        self._sums += _tally(margins)
        loss = losses.sum() * self.args.world_size / num_items_in_batch  # DDP averages over processes: undone
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean margin and the share of right pairs since the last line."""
        if "loss" in logs:
            margin, right, count = self.accelerator.reduce(self._sums, "sum").tolist()
            logs |= {"margin": round(margin / max(count, 1), 4), "accuracy": round(right / max(count, 1), 4)}
            self._sums = torch.zeros_like(self._sums)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the held-out pairs under a fixed noise: the same weights give the same numbers twice."""
        with self.average.swapped_in() if self.average else torch.no_grad(), torch.no_grad():
            losses, squares, margin, right = self._judge()
        count = len(self.eval_dataset)  # type: ignore[arg-type]
        spread = max(squares / count - (losses / count) ** 2, 0.0) / max(count - 1, 1)
        metrics = {
            "eval_loss": losses / count,
            "eval_standard_error": spread**0.5,
            "eval_margin": margin / count,
            "eval_accuracy": right / count,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judge(self) -> list[float]:
        """Sum over the held-out pairs: losses, their squares, margins, right pairs."""
        model, dataset = self.model_wrapped, self.eval_dataset
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        settings: dict[str, Any] = {"seed": 0, "step": EVALUATION_STEP, "total": len(dataset), "wrapped": model}  # type: ignore[arg-type]
        for batch in self._evaluation_batches(dataset):
            margins = self.margins(batch, batch["row"], **settings)[batch["is_counted"]]
            losses = preference_loss(margins, beta=self.beta).to(torch.float64)
            sums += torch.stack([losses.sum(), losses.square().sum(), *_tally(margins)[:2]])
        model.train(was_training)
        found: list[float] = self.accelerator.reduce(sums, "sum").tolist()
        return found


def _tally(margins: Float[Tensor, "pairs"]) -> Float[Tensor, "3"]:
    """Sum of margins, right pairs, pairs."""
    found = margins.detach().to(torch.float64)
    return torch.stack([found.sum(), (found > 0).sum().to(found), torch.full_like(found, 1.0).sum()])
