"""What fits into the minutes of a run, on a clock that the test holds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from redraft.latent.stages import StageTrainer
from redraft.training import callbacks, pace
from redraft.training.config import RunConfig, TrainConfig
from redraft.training.loop import KeyedTrainer
from redraft.training.trainer import DiffusionTrainer

QUIET = Console(quiet=True)


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


class Trainer(KeyedTrainer):
    """Stands in for a trainer whose n-th timed pass takes `seconds(n)`; it has a buffer that every pass changes."""

    def __init__(self, clock, seconds, *, accumulation=1, uses_muon=False, timed_steps=8, eval_dataset=None):
        self.clock, self.seconds = clock, seconds
        self.uses_muon, self.timed_steps, self.eval_dataset = uses_muon, timed_steps, eval_dataset
        self.model = torch.nn.BatchNorm1d(1)
        self.train_dataset = [0, 1, 2]
        self.args = SimpleNamespace(
            per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, device=torch.device("cpu"),
            max_steps=None, logging_steps=None,
        )  # fmt: skip
        self.state = SimpleNamespace(global_step=7)
        self.accelerator = SimpleNamespace(backward=torch.Tensor.backward)
        self.passes, self.steps, self.forgotten = [], [], 0

    def data_collator(self, rows):
        return rows

    def get_batch_samples(self, batches, count, device):
        assert count == 1
        return list(batches), torch.tensor(1)

    def _prepare_inputs(self, batch):
        return batch

    def compute_loss(self, model, batch, num_items_in_batch):
        self.clock.now += self.seconds(len(self.passes))
        self.passes.append(batch)
        self.steps.append(self.state.global_step)
        model.running_mean += 1
        return model.weight.sum()

    def forget_counts(self):
        self.forgotten += 1


@pytest.fixture
def clock(monkeypatch):
    held = Clock()
    monkeypatch.setattr(pace, "time", held)
    return held


def fitted(trainer, **train):
    config = RunConfig(train=TrainConfig(**{"max_steps": 10**6, **train}))
    fitted = pace.fit_to_minutes(config, trainer, QUIET).train.max_steps
    assert trainer.args.max_steps == fitted
    return fitted


def test_minutes_hold_as_many_steps_as_are_left_after_the_measurement(clock):
    trainer = Trainer(clock, lambda number: 0.5)
    # 10 minutes less 8 passes of 0.5 s, in steps of 0.5 s and 3 % for AdamW
    assert fitted(trainer, max_minutes=10.0) == int((600 - 4) / (0.5 * 1.03)) == 1157
    assert len(trainer.passes) == 8
    assert all(batch == [0, 1, 2, 0] for batch in trainer.passes)
    assert trainer.steps == list(range(8))  # some objectives make another pass in some steps


def test_a_step_of_muon_takes_a_tenth_more_and_one_of_several_passes_so_many_times_as_long(clock):
    assert fitted(Trainer(clock, lambda number: 0.5, uses_muon=True), max_minutes=10.0) == int(596 / (0.5 * 1.1))
    assert fitted(Trainer(clock, lambda number: 0.5, accumulation=4), max_minutes=10.0) == int(596 / (4 * 0.5 * 1.03))


def test_the_first_two_passes_are_not_counted_in_a_step_but_in_the_time(clock):
    slow_at_first = Trainer(clock, lambda number: 10.0 if number < 2 else 0.5)
    assert fitted(slow_at_first, max_minutes=10.0) == int((600 - 23) / (0.5 * 1.03))


def test_the_measurement_ends_after_a_twentieth_of_the_time_but_not_before_three_passes(clock):
    quick = Trainer(clock, lambda number: 1.0)
    fitted(quick, max_minutes=2.0)  # 6 s are a twentieth: the seventh pass is the first beyond them
    assert len(quick.passes) == 7
    slow = Trainer(clock, lambda number: 100.0)
    assert fitted(slow, max_minutes=2.0) == 1
    assert len(slow.passes) == 3


def test_evaluations_take_a_third_of_a_pass_for_each_batch_of_their_windows(clock):
    trainer = Trainer(clock, lambda number: 0.5, eval_dataset=range(320))
    train = {"max_minutes": 10.0, "batch_size": 32}
    per_step = 0.5 * 1.03 + 0.5 / 3 * 10 / 20
    assert fitted(trainer, save_every=20, **train) == int(596 / per_step)
    trainer.passes.clear()
    trainer.eval_dataset = None
    assert fitted(trainer, **train) == 1157


def test_the_wished_number_of_steps_is_never_exceeded(clock):
    assert fitted(Trainer(clock, lambda number: 0.5), max_minutes=10.0, max_steps=50) == 50


def test_measuring_leaves_buffers_gradients_and_counts_as_they_were(clock):
    trainer = Trainer(clock, lambda number: 0.5)
    fitted(trainer, max_minutes=10.0)
    assert trainer.model.running_mean.item() == 0
    assert trainer.model.weight.grad is None
    assert (trainer.state.global_step, trainer.forgotten) == (0, 1)


def test_a_latent_stage_times_more_steps_as_chance_decides_what_each_does():
    assert (KeyedTrainer.timed_steps, StageTrainer.timed_steps) == (8, 32)


@pytest.mark.parametrize(
    ("train", "can", "is_sharded", "is_compiled"),
    [
        ({"max_steps": 500}, True, False, True),
        ({"max_steps": 499}, True, False, False),
        ({"max_steps": 10**6, "max_minutes": 2.0}, True, False, False),
        ({"max_steps": 1, "max_minutes": 2.1}, True, False, True),
        ({"max_steps": 500}, False, False, False),
        ({"max_steps": 500}, True, True, False),
        ({"max_steps": 500, "compile": "off"}, True, False, False),
    ],
)
def test_compiling_is_for_runs_of_500_steps_or_more_than_two_minutes(monkeypatch, train, can, is_sharded, is_compiled):
    monkeypatch.setattr(pace, "can_compile", lambda: can)
    compiled = []
    model = SimpleNamespace(base_model=SimpleNamespace(compile=lambda: compiled.append(1)))
    trainer = object.__new__(DiffusionTrainer)
    trainer.denoiser, trainer.is_sharded = SimpleNamespace(model=model), is_sharded
    pace.compile_if_it_pays(replace(TrainConfig(), **train), trainer, QUIET)
    assert bool(compiled) == is_compiled


@pytest.mark.parametrize(("minutes", "step", "ends"), [(-1.0, 3, True), (-1.0, 10, False), (10**6, 3, False)])
def test_the_clock_saves_and_ends_a_run_that_is_late_but_for_its_last_step(tmp_path, minutes, step, ends):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    clock, state, control = callbacks.GracefulStop(QUIET, minutes=minutes), TrainerState(), TrainerControl()
    state.global_step, state.max_steps = step, 10
    clock.on_train_begin(arguments, state, control)
    clock.on_step_end(arguments, state, control)
    clock.restore()
    assert (control.should_save, control.should_training_stop) == (ends, ends)
