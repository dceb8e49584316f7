"""What a run shows and keeps while it trains: a progress bar, log.jsonl, a clock, and a graceful end on signals."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from redraft.training.checkpoint import told_of_the_disk, write_whole
from redraft.training.ema import WeightAverage
from redraft.training.output import say

LOG_FILE = "log.jsonl"


def preferences(logs: dict[str, float]) -> str:
    """Say how the pairs of an evaluation were judged."""
    return (
        f"preference loss {logs['eval_loss']:.4f} ± {logs['eval_standard_error']:.4f} (log 2 at the start), "
        f"{100 * logs['eval_accuracy']:.1f} % of the pairs right, margin {logs['eval_margin']:.2f} nats"
    )


class Progressed(TrainerCallback):
    """Show steps, loss, tokens per second and the time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, *, measure: str = "NELBO") -> None:
        self.console = console
        self.measure = measure
        self.trainer: Any = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = (time.perf_counter(), self.trainer.tokens_seen)
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "spike_step" in logs:
            say(
                self.console,
                f"step {state.global_step}: the loss jumped to {logs['loss']:.3f}, usually {logs['usual_loss']:.3f}; "
                f"dearest was training window {logs['spike_window']}, in step {logs['spike_step']}",
            )
        if "loss" in logs:
            logs["tokens_per_second"] = round(self._tokens_per_second())
            logs["efficiency"] = round(self.trainer.efficiency(), 4)  # useful tokens / forwarded tokens
            line = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,} tokens/s"
            if "skipped_steps" in logs:
                line += f"  {logs['skipped_steps']} steps skipped: gradient not finite"
            if logs["efficiency"] < 1:
                line += f" ({100 * logs['efficiency']:.0f} % useful)"
            if self._bar:
                self._bar.update(self._task, description=line)
            else:
                tokens_left = (state.max_steps - state.global_step) * self.trainer.tokens_per_step
                left = tokens_left / logs["tokens_per_second"]
                say(self.console, f"step {state.global_step}/{state.max_steps}  {line}  {left / 60:.1f} min left")
        elif "eval_margin" in logs:
            say(self.console, f"step {state.global_step}: held out, {preferences(logs)}")
            self._last = (time.perf_counter(), self.trainer.tokens_seen)
        elif "eval_nats_per_token" in logs:
            bits = f", {logs['eval_bits_per_byte']:.3f} bits per byte" if "eval_bits_per_byte" in logs else ""
            say(
                self.console,
                f"step {state.global_step}: held-out {self.measure} {logs['eval_nats_per_token']:.4f} ± "
                f"{logs['eval_standard_error']:.4f} nats per token{bits}",
            )
            self._last = (time.perf_counter(), self.trainer.tokens_seen)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _tokens_per_second(self) -> float:
        """Average since the last call."""
        now, seen = time.perf_counter(), self.trainer.tokens_seen
        then, seen_then = self._last
        self._last = (now, seen)
        return max((seen - seen_then) / max(now - then, 1e-9), 1.0)


class LogFile(TrainerCallback):
    """Append every log to log.jsonl; a resumed run first drops the lines of steps it will take again."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.path = folder / LOG_FILE
        self.console = console

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            self._keep([line for line in self._whole_lines() if line["step"] <= state.global_step])

    def drop_final_evaluation(self, *, step: int) -> None:
        """Drop what follows the summary of the training: a run that resumes after its last step evaluates again."""
        lines = self._whole_lines() if self.path.exists() else []
        ends = [i for i, line in enumerate(lines) if line["step"] == step and "train_runtime" in line]
        if ends:
            self._keep(lines[: ends[-1] + 1])

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Read the lines, and say where some are damaged; the last one may have been cut short by a kill."""
        lines = list(_entries(self.path))
        bad = [number for number, line in enumerate(lines, 1) if line is None]
        if bad and bad[0] < len(lines):
            say(self.console, f"{self.path}: {len(bad)} damaged lines are left out, line {bad[0]} the first")
        return [line for line in lines if line is not None]

    def _keep(self, lines: list[dict[str, Any]]) -> None:
        with told_of_the_disk(self.path.name, self.path.parent):
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            with told_of_the_disk(self.path.name, self.path.parent), self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl; damaged lines, as a kill leaves them, are left out."""
    return [line for line in _entries(path) if line is not None]


def _entries(path: Path) -> Iterator[dict[str, Any] | None]:
    """Read log.jsonl line by line, a damaged one as None. Raises ValueError where the file cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Move it away to go on without it.") from error
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        yield entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def any_process(flag: bool, *, device: torch.device) -> bool:
    """Tell every process whether one of them raised its flag, so that all stop at the same step."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


_HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none


class StoppedBySignal(TrainerCallback):
    """On the first SIGINT, SIGTERM or SIGHUP finish the step, save a checkpoint and stop; the second acts at once.

    But not a second SIGHUP: a terminal that closes sends several. Where it is ignored (nohup) it stays so.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
            if number and not (number == _HANG_UP and signal.getsignal(number) is signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any_process(self.received is not None, device=args.device):
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        hang_up = self._previous.pop(_HANG_UP, None) if _HANG_UP else None
        self.restore()
        if _HANG_UP and hang_up is not None:
            self._previous[_HANG_UP] = hang_up  # until the end
            signal.signal(_HANG_UP, signal.SIG_IGN)
        say(self.console, f"{self.received.name}: saving a checkpoint after this step (again to stop at once)")


class Clock(TrainerCallback):
    """Save and stop when the time is up."""

    def __init__(self, console: Console, *, minutes: float) -> None:
        self.console = console
        self.minutes = minutes
        self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        is_late = time.monotonic() - self._start > 60 * self.minutes and state.global_step < state.max_steps
        if any_process(is_late, device=args.device):
            say(self.console, f"{self.minutes:g} minutes are up at step {state.global_step} of {state.max_steps}")
            control.should_save = True
            control.should_training_stop = True


class Averaging(TrainerCallback):
    """Update the weight average after each step."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.average.update()
