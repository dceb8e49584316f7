"""The part of the training loop that all runs share: numbered rows, skipped steps, checkpoints."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from redraft.data.collate import PassSampler
from redraft.folders import write_whole
from redraft.training.checkpoint import IDENTITY_FILE, STAGING, explain_disk_errors, publish
from redraft.training.config import BaseRunConfig
from redraft.training.ema import WeightAverage
from redraft.training.guard import Guard
from redraft.training.machine import runs_on_cpu
from redraft.training.muon import MuonAdamW, layer_matrices
from redraft.training.plan import Plan

Batch = dict[str, Tensor]


def log_interval(max_steps: int) -> int:
    """Return the steps between log lines: a percent of the run, at least 1 and at most 100."""
    return min(max(max_steps // 100, 1), 100)


def training_arguments(config: BaseRunConfig, *, evaluates: bool) -> TrainingArguments:
    """Translate the settings of a run into those of transformers."""
    train = config.train
    arguments = TrainingArguments(
        output_dir=config.out,
        per_device_train_batch_size=train.batch_size // PartialState().num_processes,
        gradient_accumulation_steps=train.accumulation,
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.decay, train.decay),
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta_2,
        optim="adamw_torch_fused",
        bf16=train.precision == "bfloat16",
        use_cpu=runs_on_cpu(),
        seed=train.seed,
        logging_steps=log_interval(train.max_steps),
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.save_every,
        save_steps=train.save_every,
        save_total_limit=train.max_checkpoints,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
    )
    # One process uses one device: else transformers would replicate the model on all visible devices by threads.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class KeyedTrainer(Trainer):
    """The loop of transformers, with rows numbered over the global batch of a step.

    Noise is keyed by (seed, step, row) and losses are divided by counts over the global batch, so accumulation steps
    and processes change nothing but the order of additions, and a resumed run draws what the stopped one would have.
    """

    timed_steps = 8
    """Steps that are timed before a run that must fit into its minutes."""
    closing_seconds = 5.0
    """Time between the last step and the end of a run, without the evaluation of `final_windows`."""
    final_windows = 0
    """Validation windows of the evaluation at the end."""
    eval_windows = 0
    """Validation windows of each evaluation before."""
    can_be_compiled = False
    legend = "loss: mean of the steps since the line before"
    """What the numbers of a log line are."""

    # The loss is divided by counts over the whole global batch; the default would divide it once more.
    loss_is_scaled_for_ga = True

    def __init__(
        self, config: BaseRunConfig, model: Any, tokenizer: Any, *, eval_dataset: Any = None, **data: Any
    ) -> None:
        arguments = training_arguments(config, evaluates=eval_dataset is not None)
        model.to(arguments.device)  # before the average is copied from it
        train = config.train
        self.average = WeightAverage(model, decay=train.ema_decay) if train.ema_decay else None
        super().__init__(model, args=arguments, eval_dataset=eval_dataset, **data)
        self.uses_muon = train.optimizer == "muon"
        if self.uses_muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("train.optimizer muon needs whole matrices; got sharded weights. Use adamw, or ddp.")
        self.remove_callback(PrinterCallback)
        if self.average:
            self.add_callback(self.average)
        self.identity = config.identity()
        """Settings that every checkpoint records, to be compared at --resume."""
        self.tokenizer = tokenizer
        """Saved with every checkpoint, which can be loaded like a finished model."""
        self.plan = Plan(end=train.max_steps, max_steps=train.max_steps, schedule_steps=train.max_steps)
        self._checkpoint_parent: str | None = None
        self._sampler: PassSampler | None = None
        self._global_rows = 0
        self._batches: list[Batch] = []
        self.guard = Guard(Path(config.out) / "skipped", rank=self.args.process_index)
        self.forget_counts()

    def compile(self) -> None:
        """Compile the model, where `can_be_compiled` says so."""
        raise NotImplementedError

    def forget_counts(self) -> None:
        """Reset the counts of tokens and time: after a log line, and after work that is not training."""
        self._counted_since: float | None = None
        self._useful_tokens: Tensor | int = 0
        self._forwarded_tokens = 0

    def speed(self) -> dict[str, float]:
        """Forwarded tokens per second of all processes since the last call, and the part that is no padding."""
        seconds = time.perf_counter() - (self._counted_since or 0.0)
        tokens_per_second = max(round(self.args.world_size * self._forwarded_tokens / max(seconds, 1e-9)), 1)
        efficiency = round(float(self._useful_tokens) / max(self._forwarded_tokens, 1), 4)
        self.forget_counts()
        return {"tokens_per_second": tokens_per_second, "efficiency": efficiency}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Number the rows over the global batch of the next step, and count the divisor of its loss."""
        self._counted_since = self._counted_since or time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        world, rank = self.args.world_size, self.args.process_index
        first = 0
        for batch in batches:
            size = len(next(iter(batch.values())))
            batch["row"] = torch.arange(size) + first + rank * size
            first += world * size
        self._global_rows, self._batches = first, batches
        if not batches:
            return batches, None
        items, useful, positions = zip(*map(self.count, batches), strict=True)
        num_items = torch.stack(items).sum(0).to(device)
        if world > 1:
            num_items = self.accelerator.reduce(num_items, "sum")
        self._useful_tokens += sum(useful)
        self._forwarded_tokens += sum(positions)
        return batches, num_items

    def get_train_dataloader(self) -> Any:
        """Build the loader and give it its sampler, which needs the number of the pass (`set_epoch`).

        With many processes, or batches that a resumed run skips, accelerate's wrappers hide the sampler from it.
        """
        self._sampler = None
        loader: Any = super().get_train_dataloader()
        if self._sampler is not None:
            loader.set_sampler(self._sampler)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        self._sampler = PassSampler(len(dataset), batch_size=rows, seed=self.args.seed, lengths=self._lengths())
        return self._sampler

    def _lengths(self) -> list[int] | None:
        """Return the rows' lengths where they are to be grouped by them."""
        return None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build AdamW, with Muon for the matrices of the layers if `train.optimizer` is muon."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if self.uses_muon and not isinstance(optimizer, MuonAdamW):
            self.optimizer = optimizer = MuonAdamW(optimizer, layer_matrices(cast(nn.Module, self.model)))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the learning rate of a run of `plan.schedule_steps`, read at the plan's place."""
        if self.lr_scheduler is None:
            plan = self.plan

            def follow(rate: Callable[[float], float]) -> Callable[[int], float]:
                return lambda step: rate(plan.place(step))

            scheduler: Any = super().create_scheduler(plan.schedule_steps, optimizer)
            scheduler.lr_lambdas = [follow(rate) for rate in scheduler.lr_lambdas]
        return self.lr_scheduler

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count the items that the loss is divided by (any shape), real tokens, and positions."""
        raise NotImplementedError

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Let the optimizer skip a step whose gradient is not finite; every process has the same norm."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skip = self.guard.found_inf(torch.as_tensor(norm), self._batches, step=self.state.global_step)
        optimizer: Any = self.optimizer  # accelerate's wrapper of it
        optimizer.optimizer.found_inf = skip
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the steps skipped since the last loss, and the speed. Raises ValueError for too many skipped."""
        if "loss" in logs:
            self._tr_loss.zero_()  # Trainer subtracts it from itself, and inf - inf is NaN
            logs |= self.speed()
        # train_loss: the last line of a run, for steps skipped after the last loss
        if logs.keys() & {"loss", "train_loss"} and (skipped := self.guard.report()):
            logs["skipped_steps"] = skipped
        super().log(logs, *args, **kwargs)
        self.guard.check()

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_parent or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint into a staging folder, and move it when all processes have written their parts."""
        out = Path(cast(str, self.args.output_dir))
        staging = out / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._checkpoint_parent = str(staging)
        name = f"checkpoint-{self.state.global_step}"
        try:
            with explain_disk_errors(name, out):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    self._describe(staging / name)
        except ValueError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._checkpoint_parent = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(staging / name, out, keep=cast(int, self.args.save_total_limit))
        self.accelerator.wait_for_everyone()

    def _describe(self, folder: Path) -> None:
        """Write what our checkpoints hold besides those of transformers: average, plan, identity, tokenizer."""
        self.plan.save(folder)
        if self.average:
            self.average.save(folder)
        write_whole(folder / IDENTITY_FILE, json.dumps(self.identity, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)
