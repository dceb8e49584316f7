"""Fit a run into its time limit: measure a step, compute how many fit, decide whether compiling pays."""

import time
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from redraft.models.device import can_compile
from redraft.training.callbacks import any_process
from redraft.training.config import Run, TrainConfig
from redraft.training.loop import KeyedTrainer, log_interval
from redraft.training.output import say
from redraft.training.trainer import DiffusionTrainer

MUON, ADAMW = 1.1, 1.03  # time of a whole step / time of its forwards and backwards, which alone are measured


def compile_if_it_pays(train: TrainConfig, trainer: DiffusionTrainer, console: Console) -> None:
    """Compile the transformer where the run is long enough; FSDP gathers each layer, which breaks the graph."""
    is_long = train.max_minutes > 2 if train.max_minutes else train.max_steps >= 500  # compiling takes about 20 s
    if train.compile == "auto" and is_long and can_compile() and not trainer.is_sharded:
        trainer.denoiser.model.base_model.compile()
        say(console, "compiling the transformer (--train.compile off trains without)")


def fit_to_minutes(config: Run, trainer: KeyedTrainer, console: Console) -> Run:
    """Lower the number of steps so that the run fits into `max_minutes`."""
    train = config.train
    assert train.max_minutes is not None
    start = time.monotonic()
    seconds = _measure_step(trainer, max_seconds=3 * train.max_minutes)
    spent = time.monotonic() - start
    per_step = seconds * (MUON if trainer.uses_muon else ADAMW)
    if trainer.eval_dataset is not None:
        batches = len(trainer.eval_dataset) / (train.batch_size * train.accumulation)  # type: ignore[arg-type]
        per_step += seconds / 3 * batches / train.save_every  # a forward takes a third of a forward with backward
    steps = min(train.max_steps, max(1, int((60 * train.max_minutes - spent) / per_step)))
    (steps,) = broadcast_object_list([steps])
    say(console, f"{seconds:.2g} s per step: {steps} steps fit in {train.max_minutes:g} minutes")
    trainer.args.max_steps, trainer.args.logging_steps = steps, log_interval(steps)
    return replace(config, train=replace(train, max_steps=steps))


def _measure_step(trainer: KeyedTrainer, *, max_seconds: float) -> float:
    """Time an optimizer step's forwards and backwards: at least three times, until `max_seconds` or `timed_steps`.

    Weights, buffers and data order stay as they were.
    """
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    rows = list(islice(cycle(dataset), trainer.args.per_device_train_batch_size))
    device, times = trainer.args.device, []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for step in range(trainer.timed_steps):
        start = time.monotonic()
        trainer.state.global_step = step  # some objectives run a second pass in some steps
        (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, device)
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=count)
        trainer.accelerator.backward(loss)
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
        if any_process(step >= 2 and sum(times) > max_seconds, device=device):
            break
    for buffer, before in buffers:
        buffer.copy_(before)
    trainer.state.global_step = 0
    trainer.forget_counts()
    return sum(times[2:]) / len(times[2:]) * trainer.args.gradient_accumulation_steps
