"""Training by an objective: what a batch's loss is, what validation windows say, and which weights are saved."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from redraft.data.collate import collate, targets_of
from redraft.data.packing import WindowDataset
from redraft.data.prepare import PreparedData, StreamedWindows
from redraft.data.tokenizer import token_byte_lengths
from redraft.likelihood.problem import CleanRows, NoiseKey, Objective, solve
from redraft.models.attention import choose_attention
from redraft.models.denoiser import Denoiser
from redraft.models.head import head_is_plain
from redraft.training.adapter import enable_checkpointing, has_adapter, read_adapter
from redraft.training.config import RunConfig
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
VALIDATION_WINDOWS = 512  # of the evaluations before the end
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "FSDP", "DEEPSPEED")


class DiffusionTrainer(KeyedTrainer):
    """Minimise an objective in nats per target token of the global batch, whatever it is split into."""

    def __init__(self, config: RunConfig, data: PreparedData, denoiser: Denoiser) -> None:
        train, model = config.train, denoiser.model
        if train.gradient_checkpointing:
            enable_checkpointing(model)
        dataset = replace(data.train, is_endless=True) if isinstance(data.train, StreamedWindows) else data.train
        limit = min(train.max_validation_windows or VALIDATION_WINDOWS, VALIDATION_WINDOWS)
        super().__init__(
            config,
            model,
            data.tokenizer,
            train_dataset=dataset,
            eval_dataset=spread(data.validation, limit) if len(data.validation) else None,
            data_collator=self._collate,
        )
        self.data_config = config.data
        self.pad_token_id = data.tokenizer.pad_token_id or 0  # some have none; the segment marks padding
        self.is_sharded = self.accelerator.distributed_type is DistributedType.FSDP
        self._check_parallelism()
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        is_eager_gpu = train.compile == "off" and self.args.device.type == "cuda"  # flex attention is compiled
        wanted = "mask" if is_eager_gpu else "auto"
        attention = choose_attention(model, wanted, device=self.args.device, dtype=dtype)
        self.denoiser = replace(denoiser, attention=attention)
        self.objective: Objective = config.objective.build(
            mask_token_id=denoiser.settings.mask_token_id, vocab_size=model.config.vocab_size
        )
        self.token_byte_lengths = token_byte_lengths(data.tokenizer).to(self.args.device)
        is_deepspeed = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        self._has_plain_head = not is_deepspeed and head_is_plain(model)
        self.spikes = Spikes()

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and let it shard on the CPU too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.distributed_type is DistributedType.FSDP

    def _check_parallelism(self) -> None:
        """Raise ValueError for what cannot be trained in the way that the processes were launched."""
        kind = self.accelerator.distributed_type.value
        if kind not in SUPPORTED or (self.is_sharded and self.accelerator.state.fsdp_plugin.fsdp_version != 2):
            raise ValueError(f"training under {kind} (or FSDP 1) is not supported. Use ddp, fsdp2 or deepspeed.")
        if self.is_sharded and (self.average or has_adapter(self.model)):
            what = "train.ema_decay" if self.average else "an adapter"
            raise ValueError(f"{what} is not supported over sharded weights (fsdp2). Leave it out, or use ddp.")

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return collate(rows, pad_token_id=self.pad_token_id)

    def _lengths(self) -> list[int] | None:
        dataset, is_grouped = self.train_dataset, self.data_config.chat.batching == "grouped"
        is_chat = self.data_config.kind == "chat" and isinstance(dataset, WindowDataset)
        return dataset.lengths() if is_chat and is_grouped else None  # type: ignore[union-attr]

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count target tokens, real tokens, and positions."""
        return targets_of(batch).sum(), (batch["segment_ids"] > 0).sum(), batch["input_ids"].numel()

    def clean_rows(self, batch: Batch) -> CleanRows:
        """Name what an objective needs of a batch."""
        return CleanRows(
            x_0=batch["input_ids"],
            segment_ids=batch["segment_ids"],
            is_target=targets_of(batch),
            has_padding=self.data_config.has_padding,
            isolate_segments=self.data_config.isolates_segments,
        )

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
            total, nats = self.score(self.objective, inputs, key, wrapped=model)
        # DDP averages gradients over processes, and the logged loss is averaged too: undo both.
        loss = total * self.args.world_size / num_items_in_batch
        self.spikes.record(nats, inputs.get("window", inputs["row"]), step=self.state.global_step)
        return (loss, None) if return_outputs else loss

    def score(self, objective: Objective, batch: Batch, key: NoiseKey, *, wrapped: Any = None) -> tuple[Tensor, Tensor]:
        """Score a batch: the sum over it, with gradient, and each row's, in nats."""
        rows = self.clean_rows(batch)
        return solve(
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
        """Estimate the validation loss under a fixed noise: the same weights give the same number twice."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        with self.average.swapped_in() if self.average else nullcontext(), torch.no_grad():
            sums = sum(self._validation_sums(batch) for batch in self._validation_batches())
        model.train(was_training)
        metrics = self._metrics(*self.accelerator.reduce(sums, "sum").tolist())
        self.log(metrics)
        self.forget_counts()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_sums(self, batch: Batch) -> Tensor:
        """Sum over the windows of a batch: tokens, bytes, nats, squares of the windows' nats."""
        total_rows = len(self.eval_dataset)  # type: ignore[arg-type]
        key = NoiseKey(seed=0, step=EVALUATION_STEP, rows=batch["row"], total_rows=total_rows)
        with self.accelerator.autocast():
            _, nats = self.score(self.objective.evaluation(), batch, key, wrapped=self.model_wrapped)
        nats = nats.to(torch.float64) * batch["is_counted"].to(torch.float64)
        is_token = targets_of(batch) & batch["is_counted"][:, None]
        num_bytes = self.token_byte_lengths[batch["input_ids"]][is_token].sum()
        return torch.stack([is_token.sum().to(nats), num_bytes.to(nats), nats.sum(), (nats**2).sum()])

    def _metrics(self, *sums: float) -> dict[str, float]:
        """Turn sums over windows into a mean per token and its standard error, which is taken over windows."""
        tokens, num_bytes, nats, squares = sums
        windows = len(self.eval_dataset)  # type: ignore[arg-type]
        variance = max(squares / windows - (nats / windows) ** 2, 0.0)
        standard_error = (variance * windows / max(windows - 1, 1)) ** 0.5 * windows**0.5 / tokens
        mean = nats / tokens
        metrics = {"eval_nats_per_token": mean, "eval_standard_error": standard_error, "eval_loss": mean}
        if self.data_config.kind == "text" and num_bytes:  # the EOS that fills up an answer's blocks has no bytes
            metrics["eval_bits_per_byte"] = nats / num_bytes / math.log(2)
        return metrics

    def _validation_batches(self) -> Iterator[Batch]:
        """Deal windows to the processes; every process makes the same number of forward passes."""
        dataset: Any = self.eval_dataset
        world, rank = self.args.world_size, self.args.process_index
        size = self.args.per_device_train_batch_size
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


def spread(dataset: Any, count: int) -> Any:
    """Take `count` windows spread evenly over a dataset."""
    if len(dataset) <= count:
        return dataset
    return torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])
