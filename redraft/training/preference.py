"""Learning from preferences: VRPO (arXiv 2505.19223). The reference is the frozen start model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.data.collate import collate_preferences
from redraft.data.prepare import PreparedData
from redraft.likelihood.objectives.preference import bounds, preference_loss, preference_margins
from redraft.likelihood.problem import NoiseKey
from redraft.models.denoiser import Denoiser
from redraft.training.adapter import has_adapter
from redraft.training.config import RunConfig
from redraft.training.loop import Batch
from redraft.training.trainer import EVALUATION_STEP, DiffusionTrainer


class PreferenceTrainer(DiffusionTrainer):
    """Minimise -log sigmoid(beta * margin) per pair, the margins by the objective's bound on shared noise."""

    def __init__(self, config: RunConfig, data: PreparedData, denoiser: Denoiser) -> None:
        super().__init__(config, data, denoiser)
        self.beta, self.num_samples = config.objective.beta, config.objective.num_samples
        self._reference = self.denoiser
        if not has_adapter(denoiser.model):
            self._reference = replace(self.denoiser, model=deepcopy(denoiser.model).eval().requires_grad_(False))
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # margins, right pairs, pairs

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return collate_preferences(rows, pad_token_id=self.pad_token_id)

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count pairs, real tokens, and positions."""
        pairs = torch.tensor(len(batch["input_ids"]) // 2)
        return pairs, (batch["segment_ids"] > 0).sum(), batch["input_ids"].numel()

    @contextmanager
    def _reference_mode(self) -> Iterator[Denoiser]:
        """Give the reference model; with an adapter, it is the trained model with the adapter switched off."""
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
        rows, objective = self.clean_rows(batch), self.objective.evaluation()
        key = NoiseKey(seed=seed, step=step, rows=torch.cat([2 * pair, 2 * pair + 1]), total_rows=2 * total)
        settings: dict[str, Any] = {
            "num_samples": self.num_samples,
            "has_plain_head": self._has_plain_head and not self.is_sharded,
        }
        with self.accelerator.autocast():
            with torch.no_grad(), self._reference_mode() as reference:
                fixed = bounds(reference, objective, rows, key, **settings)
            return preference_margins(bounds(self.denoiser, objective, rows, key, wrapped=wrapped, **settings), fixed)

    def total_loss(self, batch: Batch, *, wrapped: Any) -> Tensor:
        """Sum the losses of the pairs of a batch, with gradient."""
        count = len(batch["input_ids"]) // 2
        pair = batch["row"][0] // 2 + torch.arange(count, device=batch["row"].device)  # whatever the split
        step, total = self.state.global_step, self._global_rows // 2
        margins = self.margins(batch, pair, seed=self.args.seed, step=step, total=total, wrapped=wrapped)
        self._sums += _sums_of(margins)
        return preference_loss(margins, beta=self.beta).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean margin and the share of right pairs since the last line."""
        if "loss" in logs:
            margin, right, count = self.accelerator.reduce(self._sums, "sum").tolist()
            logs |= {"margin": round(margin / max(count, 1), 4), "accuracy": round(right / max(count, 1), 4)}
            self._sums = torch.zeros_like(self._sums)
        super().log(logs, *args, **kwargs)

    def _validation_sums(self, batch: Batch) -> Tensor:
        """Sum over the pairs of a batch: losses, their squares, margins, right pairs."""
        total = len(self.eval_dataset)  # type: ignore[arg-type]
        margins = self.margins(
            batch, batch["row"], seed=0, step=EVALUATION_STEP, total=total, wrapped=self.model_wrapped
        )[batch["is_counted"]]
        losses = preference_loss(margins, beta=self.beta).to(torch.float64)
        return torch.stack([losses.sum(), losses.square().sum(), *_sums_of(margins)[:2]])

    def _metrics(self, *sums: float) -> dict[str, float]:
        loss, squares, margin, right = sums
        count = len(self.eval_dataset)  # type: ignore[arg-type]
        spread = max(squares / count - (loss / count) ** 2, 0.0) / max(count - 1, 1)
        return {
            "eval_loss": loss / count,
            "eval_standard_error": spread**0.5,
            "eval_margin": margin / count,
            "eval_accuracy": right / count,
        }


def _sums_of(margins: Float[Tensor, "pairs"]) -> Float[Tensor, "3"]:
    """Sum of margins, right pairs, pairs."""
    margins = margins.detach().to(torch.float64)
    return torch.stack([margins.sum(), (margins > 0).sum().to(margins), torch.full_like(margins, 1.0).sum()])
