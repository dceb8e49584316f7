"""Console output never ends a run, and a folder is written by one run at a time."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console
from test_alive import QUIET
from test_alive import config as config
from transformers import TrainerControl, TrainerState, TrainingArguments

from redraft.folders import one_writer
from redraft.latent.config import LatentRunConfig
from redraft.training.callbacks import GracefulStop
from redraft.training.config import RunConfig
from redraft.training.output import LastingStream, lasting_output, say
from redraft.training.run import run


@pytest.mark.slow
def test_no_failing_output_ends_a_run_and_a_terminal_that_closes_leaves_a_checkpoint(config):
    recipe = Path(config.out).with_suffix(".json")
    recipe.write_text(json.dumps(asdict(config)))
    command = [sys.executable, str(Path(__file__).with_name("outlive.py")), str(recipe)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, env=buffered | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["runs"].values()) == {0}, found
    assert len(found["runs"]) == 7
    assert found["closed terminal"] == {"code": 128 + signal.SIGHUP, "damage": [None]}


class Failing:
    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def fileno(self):
        raise OSError("no file")


ERRORS = [
    BrokenPipeError(32, "gone"),
    OSError(28, "full"),
    BlockingIOError(11, "later"),
    RuntimeError("reentrant call"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_line_that_cannot_be_written_is_dropped(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with lasting_output():
        say(Console(), "a line")
        print("another", flush=True)
    assert isinstance(sys.stdout, Failing)


def test_what_an_encoding_lacks_is_written_in_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    LastingStream(stream).write("3 ± 1, ━\n")
    assert raw.getvalue() == b"3 \xb1 1, \\u2501\n"


def test_what_looks_like_markup_is_printed_as_it_is(capsys):
    say(Console(), "saved to runs/x[/red] and [bold]")
    assert capsys.readouterr().out == "saved to runs/x[/red] and [bold]\n"


def test_a_stopped_run_says_how_it_can_go_on():
    assert RunConfig(out="runs/a b").resume_command == "redraft train 'runs/a b' --resume"
    assert LatentRunConfig(task="countdown", out="r").resume_command == "redraft train r --resume"
    assert LatentRunConfig(task=None).resume_command == "run_stage(config, task=..., resume=True)"


@pytest.fixture(autouse=True)
def _hears_hang_ups():
    """Under nohup the tests themselves would inherit that they are ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def stopping(tmp_path):
    """Begin to listen for signals; return the callback, and what it tells the trainer after a step."""
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), TrainerState()
    stopped, control = GracefulStop(QUIET), TrainerControl()
    stopped.on_train_begin(arguments, state, control)

    def after_a_step():
        stopped.on_step_end(arguments, state, control)
        return control.should_save and control.should_training_stop

    return stopped, after_a_step


def test_a_hang_up_saves_and_a_second_one_does_not_end_the_saving(tmp_path):
    before, interrupt = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGINT)
    stopped, after_a_step = stopping(tmp_path)
    assert not after_a_step()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    assert after_a_step()
    assert stopped.received is signal.SIGHUP
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ctrl-C acts at once now
    stopped.restore()
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_hang_up_after_another_signal_does_not_end_the_saving(tmp_path):
    stopped, after_a_step = stopping(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    assert after_a_step()
    assert stopped.received is signal.SIGTERM
    stopped.restore()


def test_a_run_under_nohup_does_not_hear_a_hang_up(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopped, after_a_step = stopping(tmp_path)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not after_a_step()
        stopped.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_that_another_run_writes_to_is_refused_new_and_resumed(config):
    folder = Path(config.out)
    with (
        one_writer(folder),
        pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing to {folder}. Wait"),
    ):
        run(config, console=QUIET)
    assert not folder.exists()
    run(replace(config, train=replace(config.train, max_steps=2)), console=QUIET)
    before = sorted(folder.iterdir())
    with one_writer(folder), pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing to"):
        run(config, resume=True, console=QUIET)
    assert sorted(folder.iterdir()) == before
