"""The one training loop: transformers' Trainer with an objective of ours."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from transformers import TrainingArguments

from redraft.data.collate import collate, targets_of
from redraft.data.packing import WindowDataset
from redraft.likelihood.problem import CleanRows, Estimate, NoiseKey, Objective, problem_loss
from redraft.models.denoiser import Denoiser
from redraft.models.head import head_is_plain
from redraft.training.adapter import has_adapter, read_adapter
from redraft.training.ema import WeightAverage
from redraft.training.loop import Batch, KeyedTrainer
from redraft.training.sharding import (
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    load_moments,
    restore_weights,
    shard_on_cpu,
    whole,
    whole_weights,
)
from redraft.training.spikes import Spikes

EVALUATION_STEP = -1  # the noise of evaluation is keyed apart from that of every training step

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


class DiffusionTrainer(KeyedTrainer):
    """Minimise an objective in nats per target token of the global batch, whatever it is split into."""

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        *,
        args: TrainingArguments,
        train_dataset: Any,
        eval_dataset: Any,
        pad_token_id: int,
        token_byte_lengths: Tensor,
        has_padding: bool = False,
        isolate_segments: bool = False,
        groups_lengths: bool = False,
        average: WeightAverage | None = None,
        max_skipped: int = 10,
        uses_muon: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.groups_lengths = groups_lengths
        super().__init__(
            denoiser.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self._collate,
            average=average,
            max_skipped=max_skipped,
            uses_muon=uses_muon,
        )
        self.is_sharded = self.accelerator.distributed_type is DistributedType.FSDP
        self._check_parallelism(average)
        self.denoiser = denoiser
        self.training_objective = objective
        self.token_byte_lengths = token_byte_lengths
        self.has_padding = has_padding
        self.isolate_segments = isolate_segments
        self._has_plain_head = self.accelerator.distributed_type is not DistributedType.DEEPSPEED and head_is_plain(
            denoiser.model
        )
        self.spikes = Spikes()

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and let it shard on the CPU too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.distributed_type is DistributedType.FSDP

    def _check_parallelism(self, average: WeightAverage | None) -> None:
        """Raise ValueError for what cannot be trained in the way that the processes were launched."""
        kind = self.accelerator.distributed_type
        if kind not in (*REPLICATED, DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"training under {kind.value} is not supported. Launch it with ddp, fsdp2 or deepspeed.")
        if not self.is_sharded:
            return
        if self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("FSDP of version 1 is not supported. Set fsdp_version: 2, or use --launch fsdp2.")
        if average or has_adapter(self.model):
            what = "train.ema_decay" if average else "an adapter"
            raise ValueError(f"{what} is not supported over sharded weights (fsdp2). Leave it out, or use ddp.")

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return collate(rows, pad_token_id=self.pad_token_id)

    def _lengths(self) -> list[int] | None:
        dataset = self.train_dataset
        return dataset.lengths() if self.groups_lengths and isinstance(dataset, WindowDataset) else None

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count target tokens, real tokens, and positions."""
        return targets_of(batch).sum(), (batch["segment_ids"] > 0).sum(), batch["input_ids"].numel()

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this process' share of the loss of the global batch, in nats per token."""
        assert num_items_in_batch is not None
        key = NoiseKey(
            seed=self.args.seed, step=self.state.global_step, rows=inputs["row"], total_rows=self._global_rows
        )
        with self.accelerator.autocast():  # the head runs outside of the forward that accelerate wraps
            total, nats = self.score(self.training_objective, inputs, key, wrapped=model)
        # DDP averages gradients over processes, and the logged loss is averaged too: undo both.
        loss = total * self.args.world_size / num_items_in_batch
        self.spikes.record(nats, inputs.get("window", inputs["row"]), step=self.state.global_step)
        return (loss, None) if return_outputs else loss

    def score(self, objective: Objective, batch: Batch, key: NoiseKey, *, wrapped: Any = None) -> tuple[Tensor, Tensor]:
        """Score a batch: the sum over it, with gradient, and each row's, in nats."""
        rows = CleanRows(
            x_0=batch["input_ids"],
            segment_ids=batch["segment_ids"],
            is_target=targets_of(batch),
            has_padding=self.has_padding,
            isolate_segments=self.isolate_segments,
        )
        return problem_loss(
            self.denoiser,
            objective.problem(rows, key),
            num_rows=len(rows.x_0),
            wrapped=wrapped,
            has_plain_head=self._has_plain_head,
            is_sharded=self.is_sharded,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with a jump of the loss. Raises ValueError where too many steps were skipped."""
        if "loss" in logs:
            earlier = [line["loss"] for line in self.state.log_history if "loss" in line]
            logs |= self.spikes.report(logs["loss"], earlier, accelerator=self.accelerator)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Estimate the held-out loss under a fixed noise: the same weights give the same number twice."""
        with self.average.swapped_in() if self.average else torch.no_grad(), torch.no_grad():
            estimate = self.estimate()
        metrics = {
            "eval_nats_per_token": estimate.nats_per_token,
            "eval_standard_error": estimate.standard_error,
            "eval_loss": estimate.nats_per_token,
        }
        if estimate.bits_per_byte is not None:
            metrics["eval_bits_per_byte"] = estimate.bits_per_byte
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def estimate(self) -> Estimate:
        """Average over the evaluation windows; the standard error is taken over windows."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        dataset: Any = self.eval_dataset
        objective = self.training_objective.evaluation()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # tokens, bytes, nats, nats squared
        for batch in self._evaluation_batches(dataset):
            key = NoiseKey(seed=0, step=EVALUATION_STEP, rows=batch["row"], total_rows=len(dataset))
            with self.accelerator.autocast():
                _, nats = self.score(objective, batch, key, wrapped=model)
            counts = batch["is_counted"].to(torch.float64)
            nats = nats.to(torch.float64) * counts
            is_token = targets_of(batch) & batch["is_counted"][:, None]
            num_bytes = self.token_byte_lengths.to(self.args.device)[batch["input_ids"]][is_token].sum()
            sums += torch.stack([is_token.sum().to(sums), num_bytes.to(sums), nats.sum(), (nats**2).sum()])
        model.train(was_training)
        tokens, num_bytes, nats, squares = self.accelerator.reduce(sums, "sum").tolist()
        return _estimate(len(dataset), tokens=tokens, num_bytes=num_bytes, nats=nats, squares=squares)

    def _evaluation_batches(self, dataset: Any) -> Iterator[Batch]:
        """Deal windows to the processes; every process makes the same number of forward passes."""
        world, rank = self.args.world_size, self.args.process_index
        size = self.args.per_device_eval_batch_size
        for first in range(0, len(dataset), size * world):
            index = torch.arange(first + rank * size, first + (rank + 1) * size)
            is_counted = index < len(dataset)
            index = index.clamp(max=len(dataset) - 1)
            if world == 1:
                index, is_counted = index[is_counted], is_counted[is_counted]
            batch = self._collate([dataset[int(i)] for i in index]) | {"row": index, "is_counted": is_counted}
            yield self._prepare_inputs(batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if has_adapter(self.model) and self.args.should_save:  # whose settings may not be those of its base
            self.denoiser.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if has_adapter(self.model):
            read_adapter(self.model, resume_from_checkpoint)
        else:
            restore_weights(self.model, resume_from_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, whatever it is sharded over; all processes take part."""
        if not self.is_sharded:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = whole(optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer  # accelerate's wrapper
        scheduler: Any = self.lr_scheduler
        saved = torch.load(Path(checkpoint) / OPTIMIZER_FILE, mmap=True, weights_only=True)
        load_moments(optimizer.optimizer, saved)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))
        return None


def _estimate(windows: int, *, tokens: float, num_bytes: float, nats: float, squares: float) -> Estimate:
    """Turn sums over windows into a mean per token and its standard error."""
    variance = max(squares / windows - (nats / windows) ** 2, 0.0)
    standard_error = (variance * windows / max(windows - 1, 1)) ** 0.5 * windows**0.5
    return Estimate(
        nats_per_token=nats / tokens,
        standard_error=standard_error / tokens,
        bits_per_byte=nats / num_bytes / math.log(2) if num_bytes else None,
    )
