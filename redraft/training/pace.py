"""Keep a run within its minutes: measure a step, compile where it pays, plan the steps, move the end on the way."""

import json
import math
from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from redraft.training.callbacks import any_process
from redraft.training.checkpoint import step_of
from redraft.training.config import TrainConfig
from redraft.training.loop import KeyedTrainer, log_interval
from redraft.training.output import say
from redraft.training.plan import PLAN_FILE, UNLIMITED, Clock, Plan

MUON, ADAMW = 1.1, 1.03  # time of a whole step / time of its forwards and backwards, which alone are measured
COMPILE_SECONDS = 40  # docs/lab-notes.md: measured with stdlib-demo on a CPU
COMPILED_SHARE = 0.85  # time of a compiled step / time of an eager one: 0.95 in float32, 0.78 in bfloat16
FEWEST_COMPILED = 200
"""Steps of a run without a time limit for which a step is timed, to see whether compiling pays."""
ROOM = 1.1
"""The end moves later where this many times the remaining steps fit; it moves earlier as soon as they do not fit."""
MARKS = 4
"""Log lines over which the pace is measured."""


class Pacer(TrainerCallback):
    """Plan the steps of a run, and end it within its minutes.

    At each log line the time of a step (over the last lines), the evaluations and checkpoints to come, and the seconds
    that are left say how many steps still fit. The plan's end moves there, and the learning rate with it, so that it
    reaches its end when the time does. The first process decides for all.
    """

    def __init__(self, trainer: KeyedTrainer, config: TrainConfig, *, clock: Clock, console: Console) -> None:
        self.trainer, self.config, self.clock, self.console = trainer, config, clock, console
        self.plan = trainer.plan
        self.plan.max_minutes = config.max_minutes
        self._minutes_before = 0.0
        self._seconds_per_window = 0.0
        self._pauses: list[float] = []
        self._marks: deque[tuple[int, float]] = deque(maxlen=MARKS)
        self._step_ended, self._is_pausing, self._said_end = 0.0, False, 0

    def minutes(self) -> float:
        """Return the minutes that the run has taken, with those of the runs that it continues."""
        return self._minutes_before + self.clock.seconds() / 60

    def seconds_left(self) -> float:
        """Return the seconds for steps: up to the limit, less the evaluation at the end (a tenth at most)."""
        limit = 60 * (self.config.max_minutes or 0)
        closing = self.trainer.closing_seconds + self.trainer.final_windows * self._seconds_per_window
        return limit - 60 * self.minutes() - min(closing, limit / 10)

    def affordable_windows(self) -> int:
        """Return how many windows the evaluation at the end can take: a batch at least."""
        if not self.config.max_minutes:
            return self.trainer.final_windows
        left = 60 * (self.config.max_minutes - self.minutes()) - self.trainer.closing_seconds
        windows = int(left / self._seconds_per_window) if self._seconds_per_window else self.trainer.final_windows
        (windows,) = broadcast_object_list([max(windows, self.config.batch_size)])
        return min(windows, self.trainer.final_windows)

    def begin(self) -> None:
        """Plan a new run; compile if that pays."""
        limit, steps = self.config.max_minutes, self.config.max_steps
        is_open = self.config.compile == "auto" and self.trainer.can_be_compiled
        if limit or (is_open and steps >= FEWEST_COMPILED):
            seconds = self._measure()
            training = min(steps * seconds, self.seconds_left() if limit else steps * seconds)
            (is_compiled,) = broadcast_object_list([is_open and compiling_pays(training)])
            if is_compiled:
                seconds = self.compile(eager=seconds)
            if limit:
                self.plan.end = self.plan.schedule_steps = self._steps_that_fit(seconds, step=0)
                self._say_steps(seconds)
        self._set_arguments(log_interval(self.plan.end))

    def resume(self, checkpoint: str) -> None:
        """Take over the plan of a checkpoint; train for longer if the settings ask for it.

        More steps than planned extend the run, as do more minutes. A run that is not at its end gets there later, its
        schedule stretched; a finished one goes through its schedule again, warm-up included. Raises ValueError where
        fewer steps are asked for than were planned.
        """
        step, state = step_of(checkpoint), TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        plan, train = self._read(Path(checkpoint), planned=state.max_steps), self.config
        if train.max_minutes is None and train.max_steps < plan.end:
            raise ValueError(
                f"the run was planned for {plan.end} steps; got train.max_steps {train.max_steps}. --resume trains for "
                "longer, not for less: give a larger number, or leave it out."
            )
        if plan.is_compiled and self.trainer.can_be_compiled:
            self.compile()
        has_new_limit = train.max_minutes != plan.max_minutes
        asked = max(train.max_steps, plan.max_steps)
        is_finished = step >= plan.end
        if is_finished and train.max_minutes and has_new_limit and asked <= max(plan.end, plan.max_steps):
            asked = UNLIMITED
        is_extended = asked > plan.end and (has_new_limit or asked > plan.max_steps)
        plan.max_steps, plan.max_minutes = asked, train.max_minutes
        if is_extended:
            self._extend(step, is_finished=is_finished)
        self._set_arguments(state.logging_steps)

    def _extend(self, step: int, *, is_finished: bool) -> None:
        plan, end = self.plan, self.plan.max_steps
        if limit := self.config.max_minutes:
            if self.seconds_left() <= 0:
                raise ValueError(
                    f"train.max_minutes {limit:g} counts the {self.minutes():.2g} minutes that the run has taken. "
                    f"Use --train.max-minutes {limit + math.ceil(self.minutes()):g}, for example."
                )
            end = self._steps_that_fit(self._measure(), step=step)
        (plan.start_again if is_finished else plan.move_end)(end, step=step)
        how = "warms up again and falls to its end" if is_finished else "falls more slowly to its end"
        say(self.console, f"training for longer, to step {end}: the learning rate {how} there")

    def _read(self, checkpoint: Path, *, planned: int) -> Plan:
        """Read the plan of a checkpoint; `planned` is the number of steps of one that an earlier version wrote."""
        file = checkpoint / PLAN_FILE
        saved = {
            "end": planned,
            "max_steps": planned,
            "schedule_steps": planned,
            "max_minutes": self.config.max_minutes,
        }
        self.plan = self.trainer.plan = Plan(**(json.loads(file.read_text()) if file.exists() else saved))
        self._minutes_before = self.plan.minutes
        return self.plan

    def _set_arguments(self, logging_steps: int) -> None:
        self.trainer.args.max_steps = max(self.plan.max_steps, self.plan.end)  # a bound: `state.max_steps` is the end
        self.trainer.args.logging_steps = logging_steps

    def _measure(self, *, max_seconds: float | None = None) -> float:
        """Time a step; until an evaluation was made, its time per window follows from it."""
        limit, train = self.config.max_minutes, self.config
        if max_seconds is None:
            max_seconds = 3 * limit if limit else 5.0
        seconds = measure_step(self.trainer, max_seconds=max_seconds, now=self.clock.now)
        (seconds,) = broadcast_object_list([seconds])
        self._seconds_per_window = seconds / 3 / (train.batch_size * train.accumulation)  # of a step, a forward
        return seconds * (MUON if self.trainer.uses_muon else ADAMW)

    def compile(self, *, eager: float | None = None) -> float:
        """Compile the transformer, with a moving line on a terminal; return the seconds of a step, all as measured."""
        plain = " (--train.compile off trains without)"
        say(self.console, f"compiling the transformer, which takes about {COMPILE_SECONDS} s of a CPU{plain}")
        start = self.clock.seconds()
        columns = SpinnerColumn(), TextColumn("compiling"), TimeElapsedColumn()
        self.plan.is_compiled = True
        self.trainer.compile()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            bar.add_task("", total=None)
            seconds = self._measure(max_seconds=0.0)
        before = f" instead of {eager:.2g} s" if eager else ""
        say(self.console, f"compiled in {self.clock.seconds() - start:.0f} s: a step takes {seconds:.2g} s{before}")
        return seconds

    def _steps_that_fit(self, seconds: float, *, step: int, fewest: int = 1) -> int:
        """Return the last step for which there is time, with the checkpoints on the way."""
        left, every = self.seconds_left(), self.config.save_every
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else self._evaluation_seconds()
        count = int(left / (seconds + pause / every))
        saves = (step + count) // every - step // every
        count = int((left - saves * pause) / seconds)
        (end,) = broadcast_object_list([step + max(count, fewest)])
        return int(min(self.plan.max_steps, end))

    def _evaluation_seconds(self) -> float:
        return self.trainer.eval_windows * self._seconds_per_window

    def _say_steps(self, seconds: float) -> None:
        taken, end, limit = self.minutes(), self.plan.end, self.config.max_minutes
        fit = f"{end} steps" if end == self.plan.max_steps else f"{end} of {self.plan.max_steps} steps"
        say(self.console, f"{seconds:.2g} s per step, {taken:.2g} of {limit:g} minutes taken so far: {fit} fit")
        self._said_end = end

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.max_steps = self.plan.end
        self._said_end = self.plan.end

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_pausing:
            self._pauses.append(self.clock.seconds() - self._step_ended)
            self._is_pausing = False
        if not self._marks:
            self._marks.append((state.global_step, self._training_seconds()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_ended = self.clock.seconds()
        self.plan.minutes = self.minutes()
        step = state.global_step
        is_limited = self.config.max_minutes is not None and step < self.plan.end
        if is_limited and any_process(self.seconds_left() <= 0, device=args.device):
            self._end_now(state, control)
        if step >= self.plan.end:
            control.should_evaluate = False  # the whole validation set follows

    def _end_now(self, state: Any, control: Any) -> None:
        state.max_steps = state.global_step
        self.plan.move_end(state.global_step, step=state.global_step)
        control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if windows := self.trainer.eval_windows:
            self._seconds_per_window = (self.clock.seconds() - self._step_ended) / windows
        self._is_pausing = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_pausing = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs or not self.config.max_minutes:
            return
        step, plan = state.global_step, self.plan
        self._marks.append((step, self._training_seconds()))
        (first, since), (last, now) = self._marks[0], self._marks[-1]
        if step < plan.end and last > first:
            seconds = (now - since) / (last - first)
            end = self._steps_that_fit(seconds, step=step, fewest=0)
            if end == step:
                self._end_now(state, control)
            elif end < plan.end or (end > plan.end and end - step > ROOM * (plan.end - step)):
                plan.move_end(end, step=step)
                state.max_steps = end
            if abs(plan.end - self._said_end) > plan.end / 4:
                say(self.console, f"step {step}: a step takes {seconds:.2g} s now, so the run ends at step {plan.end}")
                self._said_end = plan.end
        state.log_history[-1] |= {"minutes": round(self.minutes(), 3), "end": plan.end}

    def _training_seconds(self) -> float:
        """Return the seconds without the pauses for evaluations and checkpoints."""
        return self.clock.seconds() - sum(self._pauses)


def compiling_pays(seconds: float) -> bool:
    """Tell whether a training of so many seconds saves more by compiled steps than twice the time of compiling."""
    return seconds * (1 - COMPILED_SHARE) > 2 * COMPILE_SECONDS


def measure_step(trainer: KeyedTrainer, *, max_seconds: float, now: Callable[[], float]) -> float:
    """Time an optimizer step's forwards and backwards: at least three times, until `max_seconds` or `timed_steps`.

    Weights, buffers, random numbers and the order of the data stay as they were.
    """
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    rows = list(islice(cycle(dataset), trainer.args.per_device_train_batch_size))
    device, times = trainer.args.device, []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(trainer.timed_steps):
            start = now()
            trainer.state.global_step = step  # some objectives run a second pass in some steps
            (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, device)
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=count)
            trainer.accelerator.backward(loss)
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(now() - start)
            if any_process(step >= 2 and sum(times) > max_seconds, device=device):
                break
    for buffer, before in buffers:
        buffer.copy_(before)
    trainer.state.global_step = 0
    trainer.forget_counts()
    return sum(times[2:]) / len(times[2:]) * trainer.args.gradient_accumulation_steps
