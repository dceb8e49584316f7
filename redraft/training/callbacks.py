"""Callbacks of a run: progress on the console, log.jsonl, and a stop by signals or a time limit."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from redraft.folders import write_whole
from redraft.training.checkpoint import explain_disk_errors
from redraft.training.output import say

LOG_FILE = "log.jsonl"


class ProgressLines(TrainerCallback):
    """Show steps, loss, tokens per second and the time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, legend: str) -> None:
        self.console, self.legend = console, legend
        self._begin = (0.0, 0)
        text = TextColumn("training {task.completed:.0f}/{task.total:.0f}  {task.description}")
        self._bar = Progress(text, BarColumn(), TimeRemainingColumn(compact=True), console=console, transient=True)
        self._task = self._bar.add_task("")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = (time.perf_counter(), state.global_step)
        say(self.console, self.legend)
        if state.is_world_process_zero and self.console.is_terminal:
            self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "spike_step" in logs:
            place = f"window {logs['spike_window']}, in step {logs['spike_step']}"
            jump = f"the loss jumped to {logs['loss']:.3f} from a median of {logs['usual_loss']:.3f}"
            say(self.console, f"step {state.global_step}: {jump}; highest loss: training {place}")
        if "loss" in logs and self.console.is_terminal:
            self._bar.update(self._task, description=loss_line(logs))
        elif "loss" in logs:
            then, first_step = self._begin
            seconds_per_step = (time.perf_counter() - then) / max(state.global_step - first_step, 1)
            left = f"{(state.max_steps - state.global_step) * seconds_per_step / 60:.1f} min left"
            say(self.console, f"step {state.global_step}/{state.max_steps}  {loss_line(logs)}  {left}")
        elif "eval_loss" in logs and (state.global_step < state.max_steps or "eval_margin" in logs):
            say(
                self.console, f"step {state.global_step}: validation {validation_line(logs)}"
            )  # the last one: `announce`

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar.live.is_started:
            self._bar.stop()


def loss_line(logs: dict[str, float]) -> str:
    """Format a log entry: loss, speed, skipped steps, and the useful part of the tokens."""
    line = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,} tokens/s"
    if "skipped_steps" in logs:
        line += f"  {logs['skipped_steps']} steps skipped: gradient not finite"
    return line if logs["efficiency"] == 1 else f"{line} ({100 * logs['efficiency']:.0f} % useful)"


def validation_line(logs: dict[str, float]) -> str:
    """Format an evaluation: of windows of text, or of pairs of answers."""
    if "eval_margin" in logs:
        loss = f"loss {logs['eval_loss']:.4f} ± {logs['eval_standard_error']:.4f} nats per pair"
        return f"{loss}, margin {logs['eval_margin']:.4f} nats, {100 * logs['eval_accuracy']:.1f} % of pairs right"
    line = f"{logs['eval_nats_per_token']:.4f} ± {logs['eval_standard_error']:.4f} nats per token"
    return line + (f", {logs['eval_bits_per_byte']:.3f} bits per byte" if "eval_bits_per_byte" in logs else "")


class LogFile(TrainerCallback):
    """Append every log entry to log.jsonl. A resumed run first restores the file to the lines of its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            with explain_disk_errors(self.path.name, self.path.parent):
                write_whole(self.path, "".join(json.dumps(line) + "\n" for line in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            with explain_disk_errors(self.path.name, self.path.parent), self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def any_process(flag: bool, *, device: torch.device) -> bool:
    """Tell every process whether the flag of any of them is True, so that all stop at the same step."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


_HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none


class GracefulStop(TrainerCallback):
    """Finish the step, save a checkpoint and stop: on SIGINT, SIGTERM or SIGHUP.

    A second signal ends the process at once, but not a second SIGHUP: a terminal that closes sends several. SIGHUP
    stays ignored if it was (nohup).
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
            if number and not (number == _HANG_UP and signal.getsignal(number) is signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if any_process(self.received is not None, device=args.device):
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each, handler in self._previous.items():
            signal.signal(each, signal.SIG_IGN if each == _HANG_UP else handler)
        say(self.console, f"{self.received.name}: saving a checkpoint after this step (again to stop at once)")
