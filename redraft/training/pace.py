"""What a run can do in its minutes: how long a step takes, how many fit, whether compiling pays."""

import dataclasses
import time
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from redraft.models.device import can_compile
from redraft.training.callbacks import any_process
from redraft.training.config import TrainConfig
from redraft.training.loop import KeyedTrainer
from redraft.training.output import say
from redraft.training.trainer import DiffusionTrainer

Config = TypeVar("Config", bound=Any)
"""RunConfig, or another `Recorded` configuration with its `out` and `train`."""


def compile_if_it_pays(train: TrainConfig, trainer: DiffusionTrainer, console: Console) -> None:
    """Compile the transformer if that pays."""
    is_long = train.max_minutes > 2 if train.max_minutes else train.max_steps >= 500  # compiling takes about 20 s
    pays = is_long and can_compile() and not trainer.is_sharded  # each layer's gathering breaks the graph
    if train.compile == "on" or (train.compile == "auto" and pays):
        trainer.denoiser.model.base_model.compile()
        if train.compile == "auto":
            say(console, "compiling the transformer (--train.compile off to do without)")


def fitted_to_minutes(config: Config, trainer: KeyedTrainer, console: Console) -> Config:
    """Lower the number of steps to what fits into the minutes."""
    train = config.train
    assert train.max_minutes is not None
    start = time.monotonic()
    seconds = _measure_step(trainer, at_most=3 * train.max_minutes)
    spent = time.monotonic() - start
    evaluations = train.eval_every if trainer.eval_dataset is not None else 0
    evaluation = seconds / 3 * train.eval_windows / (train.batch_size * train.accumulation)
    update = 1.1 if trainer.uses_muon else 1.03  # the optimizer's own part of a step, which is not timed
    per_step = seconds * update + (evaluation / evaluations if evaluations else 0)
    steps = min(train.max_steps, max(1, int((60 * train.max_minutes - spent) / per_step)))
    (steps,) = broadcast_object_list([steps])
    say(console, f"{seconds:.2g} s per step: {steps} steps fit in {train.max_minutes:g} minutes")
    trainer.args.max_steps = steps
    return dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))


def _measure_step(trainer: KeyedTrainer, *, at_most: float) -> float:
    """Time one optimizer step's forwards and backwards: several, or what `at_most` seconds hold, but three at least.

    Weights, buffers and data order stay as they were.
    """
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    rows = list(islice(cycle(dataset), trainer.args.per_device_train_batch_size))
    device, times = trainer.args.device, []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for step in range(trainer.timed_steps):
        start = time.monotonic()
        trainer.state.global_step = step  # some objectives make another pass in some steps
        (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, device)
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=count)
        trainer.accelerator.backward(loss)
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
        if any_process(step >= 2 and sum(times) > at_most, device=device):
            break
    for buffer, before in buffers:
        buffer.copy_(before)
    trainer.state.global_step = 0
    trainer.forget_counts()
    return sum(times[2:]) / len(times[2:]) * trainer.args.gradient_accumulation_steps
