"""What a stage of latent thinking hands to the loop, and the trainer that minimises its losses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from redraft.latent.autoencoder import TextAutoencoder
from redraft.latent.sequence import Part
from redraft.training.latent_config import LatentRunConfig
from redraft.training.loop import Batch, KeyedTrainer

Losses = dict[str, Tensor]
LossFunction = Callable[[Any, Batch, int, Part], Losses]


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of equally long tensors, fetched a batch at a time."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int | list[int]) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}

    __getitems__ = __getitem__


def _collate(batch: Any) -> Batch:
    """`Rows` fetches whole batches: there is nothing to collate, but for rows taken one by one."""
    whole: Batch = batch if isinstance(batch, dict) else default_collate(batch)
    return whole


class StageTrainer(KeyedTrainer):
    """Minimise `losses(wrapped_model, batch, step, part)["loss"]`; the other entries are logged beside it."""

    timed_steps = 32  # chance decides whether a step has a second pass

    def __init__(self, config: LatentRunConfig, stage: "Stage") -> None:
        super().__init__(config, stage.model, stage.tokenizer, train_dataset=stage.rows, data_collator=_collate)
        if self.args.world_size > 1:
            raise ValueError(
                f"latent stages train in one process; got {self.args.world_size}. Start it without torchrun."
            )
        self.losses = stage.losses
        self._sums: dict[str, Tensor] = {}
        self._passes: Counter[str] = Counter()

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count real blocks and answer tokens (where there are some), all real positions, and all positions."""
        columns = [
            c for name, c in batch.items() if name not in ("row", "alike") and c.ndim > 1 and c.dtype != torch.bool
        ]
        positions = sum(c[..., 0].numel() if c.is_floating_point() else c.numel() for c in columns)
        padding = sum(((~c).sum() for c in batch.values() if c.dtype == torch.bool), torch.tensor(0))
        items = [batch[name].sum() if name in batch else torch.tensor(0) for name in ("num_blocks", "is_answer")]
        if "num_blocks" in batch:
            padding = padding + (batch["blocks"].shape[1] - batch["num_blocks"]).sum() * batch["blocks"].shape[2]
        return torch.stack(items), positions - padding, positions

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute a batch's share of the loss of the global one."""
        batch = dict(inputs)
        num_blocks, num_answer = num_items_in_batch
        part = Part(rows=batch.pop("row"), total_rows=self._global_rows, num_blocks=num_blocks, num_answer=num_answer)
        with self.accelerator.autocast():  # the heads run outside of the forward that accelerate wraps
            losses = self.losses(model, batch, self.state.global_step, part)
        for name, loss in losses.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0) + loss.detach()
                self._passes[name] += 1  # some steps have no such part
        return (losses["loss"], None) if return_outputs else losses["loss"]

    def forget_counts(self) -> None:
        """Forget the parts of the loss, too."""
        super().forget_counts()
        self._forget_parts()

    def _forget_parts(self) -> None:
        self._sums, self._passes = {}, Counter()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts of the loss since the last line."""
        if "loss" in logs:
            split = self.args.gradient_accumulation_steps
            logs |= {name: round(float(total) * split / self._passes[name], 4) for name, total in self._sums.items()}
            self._forget_parts()
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage hands to the loop, and what is done once it is trained."""

    model: Any
    rows: Rows
    losses: LossFunction
    tokenizer: Any
    finish: Callable[[Console], None] = lambda _: None
    """What the trained model is saved with."""
    report: Callable[[Console], None] = lambda _: None
    """What is measured of it once it is saved."""
    autoencoder: TextAutoencoder | None = None


def stage_trainer(config: LatentRunConfig, stage: Stage) -> StageTrainer:
    """Build the trainer of a stage. Raises ValueError where there are fewer rows than in a step."""
    train = config.train
    if len(stage.rows) < train.batch_size * train.accumulation:
        raise ValueError(
            f"the task has {len(stage.rows)} rows, fewer than the {train.batch_size * train.accumulation} of one step "
            "(batch_size x accumulation). Lower --train.batch-size."
        )
    return StageTrainer(config, stage)
