"""What all runs share, whatever they train: numbered rows, skipped steps, whole checkpoints."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from redraft.data.collate import PassSampler
from redraft.training.checkpoint import (
    OBJECTIVE_FILE,
    STAGING,
    delete_checkpoint,
    tidy,
    told_of_the_disk,
    write_hashes,
    write_whole,
)
from redraft.training.ema import WeightAverage
from redraft.training.guard import Guard
from redraft.training.muon import MuonAdamW, layer_matrices

Batch = dict[str, Tensor]


class KeyedTrainer(Trainer):
    """The loop of transformers, with rows numbered over the global batch of a step.

    Noise is keyed by (seed, step, row) and losses are divided by counts over the global batch, so accumulation steps
    and processes change nothing but the order of additions, and a resumed run draws what the stopped one would have.
    """

    timed_steps = 8
    """Steps that are timed before a run that must fit into its minutes."""

    # The loss is divided by counts over the whole global batch; the default would divide it once more.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        *,
        args: TrainingArguments,
        average: WeightAverage | None,
        max_skipped: int,
        uses_muon: bool = False,
        **data: Any,
    ) -> None:
        super().__init__(model, args=args, **data)
        self.uses_muon = uses_muon
        if uses_muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("train.optimizer muon needs whole matrices; got sharded weights. Use adamw, or ddp.")
        self.remove_callback(PrinterCallback)
        self.average = average
        self.tokens_seen = 0
        self.tokens_per_step = 0
        self.useful_tokens: Tensor | int = 0
        """Tokens of this process that are not padding, and how many it has forwarded, since the last log."""
        self.forwarded_tokens = 0
        self.objective: dict[str, Any] | None = None
        """Settings of what is minimised: every checkpoint says what it was trained with."""
        self.saved_tokenizer: Any = None
        """Saved with every checkpoint, which can be loaded like a finished model."""
        self._checkpoint_parent: str | None = None
        self._sampler: PassSampler | None = None
        self._global_rows = 0
        self._batches: list[Batch] = []
        folder = Path(args.output_dir or ".") / "skipped"
        self.guard = Guard(folder, most=max_skipped, rank=args.process_index)

    def efficiency(self) -> float:
        """Useful tokens / forwarded tokens of this process since the last call."""
        fraction = float(self.useful_tokens) / max(self.forwarded_tokens, 1)
        self.useful_tokens, self.forwarded_tokens = 0, 0
        return fraction

    def forget_counts(self) -> None:
        """Forget the steps that were only timed."""
        self.tokens_seen = 0
        self.efficiency()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Number the rows over the global batch of the coming step, and count what its loss is divided by."""
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
        self.useful_tokens += sum(useful)
        self.forwarded_tokens += sum(positions)
        self.tokens_per_step = world * sum(positions)
        self.tokens_seen += self.tokens_per_step
        return batches, num_items

    def get_train_dataloader(self) -> Any:
        """Build the loader, and tell it where its sampler is: with many processes it would not look deep enough.

        (It has to reach the sampler to tell it the pass, through the batches of the processes and those that a resumed
        run skips.)
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
        """Tell the rows' lengths where they are to be grouped by them."""
        return None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build AdamW, and Muon beside it where it is wanted."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if self.uses_muon and not isinstance(optimizer, MuonAdamW):
            self.optimizer = optimizer = MuonAdamW(optimizer, layer_matrices(cast(nn.Module, self.model)))
        return optimizer

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count what the loss is divided by (any shape), real tokens, and positions."""
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
        """Log, with the number of steps skipped since the last loss. Raises ValueError where they are too many."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers takes it from itself, and an infinite one would be NaN from then on
        if logs.keys() & {"loss", "train_loss"} and (skipped := self.guard.report()):  # and what came after the last
            logs["skipped_steps"] = skipped
        super().log(logs, *args, **kwargs)
        self.guard.check()

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_parent or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint aside and rename it when it is whole: a killed run leaves no half of one."""
        assert self.args.output_dir is not None
        out = Path(self.args.output_dir)
        staging = out / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._checkpoint_parent = str(staging)
        name = f"checkpoint-{self.state.global_step}"
        try:
            with told_of_the_disk(name, out):
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
            with told_of_the_disk(name, out):
                write_hashes(staging / name)  # of every process' files: all have written them
            delete_checkpoint(out / name)  # a damaged one that was passed over
            (staging / name).rename(out / name)
            tidy(out, step=self.state.global_step, keep=self.args.save_total_limit or 0)
        self.accelerator.wait_for_everyone()

    def _describe(self, folder: Path) -> None:
        """Write what a checkpoint of ours has beside weights and moments."""
        if self.average:
            self.average.save(folder)
        if self.objective is not None:
            write_whole(folder / OBJECTIVE_FILE, json.dumps(self.objective, indent=2) + "\n")
        if self.saved_tokenizer is not None:
            self.saved_tokenizer.save_pretrained(folder)
