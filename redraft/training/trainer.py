"""Training by an objective: the loss of a batch, and the evaluation on validation windows."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from redraft.data.collate import collate, targets_of
from redraft.data.packing import WindowDataset
from redraft.data.prepare import PreparedData, StreamedWindows
from redraft.data.tokenizer import token_byte_lengths
from redraft.likelihood.problem import CleanRows, NoiseKey, Objective, problem_loss
from redraft.models.attention import choose_attention
from redraft.models.denoiser import Denoiser
from redraft.models.device import can_compile
from redraft.models.head import head_is_plain
from redraft.training.adapter import enable_checkpointing
from redraft.training.config import RunConfig
from redraft.training.guard import Spikes
from redraft.training.loop import Batch
from redraft.training.sharding import WholeCheckpoints

EVALUATION_STEP = -1  # key of the noise of evaluation: no training step has it
VALIDATION_WINDOWS = 512  # of the evaluations before the end


class DiffusionTrainer(WholeCheckpoints):
    """Minimise an objective in nats per target token of the global batch, however it is split."""

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
        self.measure, self.ar_weight = config.objective.measure, config.objective.ar_weight
        self.pad_token_id = data.tokenizer.pad_token_id or 0  # some have none; the segment marks padding
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
        self.final_windows = min(train.max_validation_windows or len(data.validation), len(data.validation))
        self.eval_windows = min(limit, len(data.validation))
        self.can_be_compiled = can_compile() and not self.is_sharded  # FSDP gathers each layer: that breaks the graph

    @property
    def legend(self) -> str:  # type: ignore[override]
        """Name the numbers of the log lines, their units and their data."""
        unit = "pair" if self.data_config.kind == "preference" else "token"
        clean = f" + {self.ar_weight:g} times the autoregressive loss" if self.ar_weight else ""
        lines = [
            f"loss: nats per {unit}{clean} on training data under random noise, mean of the steps since the line before"
        ]
        if self.eval_windows:
            rows = "pairs" if unit == "pair" else f"windows (the {self.measure}, under a fixed noise)"
            lines.append(
                f"validation: nats per {unit} on {self.eval_windows} unseen {rows}, ± the standard error over them"
            )
        return "\n".join(lines)

    def describe_windows(self, total: int) -> str:
        """Say on what the evaluation at the end was made: a part of the windows where time or settings say so."""
        count = len(self.eval_dataset) if total else 0  # type: ignore[arg-type]
        share = f"all {total:,}" if count == total else f"{count:,} of {total:,}"
        return f"{share} validation windows of {self.data_config.seq_len} tokens"

    def compile(self) -> None:
        """Compile the transformer at its next forward."""
        self.denoiser.model.base_model.compile()

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
        """Make the rows that an objective takes from a batch."""
        return CleanRows(
            x_0=batch["input_ids"],
            segment_ids=batch["segment_ids"],
            is_target=targets_of(batch),
            has_padding=self.data_config.has_padding,
            isolate_segments=self.data_config.isolates_segments,
        )

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this process' share of the loss of the global batch: nats per token, or per pair."""
        # DDP averages gradients over processes, and the logged loss is averaged too: undo both.
        return self.total_loss(inputs, wrapped=model) * self.args.world_size / num_items_in_batch

    def total_loss(self, batch: Batch, *, wrapped: Any) -> Tensor:
        """Sum the losses of a batch, with gradient."""
        step = self.state.global_step
        key = NoiseKey(seed=self.args.seed, step=step, rows=batch["row"], total_rows=self._global_rows)
        with self.accelerator.autocast():  # the head runs outside of the forward that accelerate wraps
            total, nats = self.score(self.objective, batch, key, wrapped=wrapped)
        self.spikes.record(nats, batch.get("window", batch["row"]), step=step)
        return total

    def score(self, objective: Objective, batch: Batch, key: NoiseKey, *, wrapped: Any = None) -> tuple[Tensor, Tensor]:
        """Score a batch: the sum over it, with gradient, and each row's, in nats."""
        rows = self.clean_rows(batch)
        return problem_loss(
            self.denoiser,
            objective.problem(rows, key),
            num_rows=len(rows.x_0),
            wrapped=wrapped,
            has_plain_head=self._has_plain_head,
            is_sharded=self.is_sharded,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and name the window behind a jump of the loss. Raises ValueError where too many steps were skipped."""
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
        if self.data_config.kind == "text" and num_bytes:  # answers are padded with EOS tokens, which have no bytes
            metrics["eval_bits_per_byte"] = nats / num_bytes / math.log(2)
        return metrics

    def _validation_batches(self) -> Iterator[Batch]:
        """Divide windows among the processes; every process makes the same number of forward passes."""
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


def spread(dataset: Any, count: int) -> Any:
    """Take `count` windows spread evenly over a dataset."""
    if len(dataset) <= count:
        return dataset
    return torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])
