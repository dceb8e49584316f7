"""What fits into the minutes of a run, on a clock that the test holds."""

import json
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState
from transformers.optimization import _get_linear_schedule_with_warmup_lr_lambda as linear

from redraft.latent.stages import StageTrainer
from redraft.training import pace
from redraft.training.config import TrainConfig
from redraft.training.loop import KeyedTrainer
from redraft.training.plan import Clock, Plan

QUIET = Console(quiet=True)


class Trainer(KeyedTrainer):
    """Stands in for a trainer whose n-th timed pass takes `seconds(n)`; it has a buffer that every pass changes."""

    def __init__(self, seconds, *, accumulation=1, uses_muon=False, timed_steps=8, windows=0, can_be_compiled=False):
        self.now, self.seconds = 100.0, seconds
        self.uses_muon, self.timed_steps, self.can_be_compiled = uses_muon, timed_steps, can_be_compiled
        self.eval_windows = self.final_windows = windows
        self.model = torch.nn.BatchNorm1d(1)
        self.train_dataset = [0, 1, 2]
        self.args = SimpleNamespace(
            per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, device=torch.device("cpu"),
            max_steps=None, logging_steps=None,
        )  # fmt: skip
        self.state = SimpleNamespace(global_step=7)
        self.accelerator = SimpleNamespace(backward=torch.Tensor.backward)
        self.passes, self.steps, self.forgotten, self.is_compiled = [], [], 0, False

    def data_collator(self, rows):
        return rows

    def get_batch_samples(self, batches, count, device):
        assert count == 1
        return list(batches), torch.tensor(1)

    def _prepare_inputs(self, batch):
        return batch

    def compute_loss(self, model, batch, num_items_in_batch):
        torch.rand(1)  # dropout
        self.now += self.seconds(len(self.passes))
        self.passes.append(batch)
        self.steps.append(self.state.global_step)
        model.running_mean += 1
        return model.weight.sum()

    def forget_counts(self):
        self.forgotten += 1

    def compile(self):
        self.is_compiled = True


def pacer_of(trainer, *, elapsed=0.0, console=QUIET, **train):
    config = TrainConfig(**{"max_steps": 10**6, **train})
    trainer.plan = Plan(end=config.max_steps, max_steps=config.max_steps, schedule_steps=config.max_steps)
    clock = Clock(now=lambda: trainer.now)
    trainer.now += elapsed
    return pace.Pacer(trainer, config, clock=clock, console=console)


def fitted(trainer, **train):
    pacer = pacer_of(trainer, **train)
    pacer.begin()
    assert trainer.plan.end == trainer.plan.schedule_steps <= trainer.args.max_steps
    return trainer.plan.end


def test_minutes_hold_as_many_steps_as_are_left_after_preparing_measuring_and_the_end():
    trainer = Trainer(lambda number: 0.5)
    # 10 minutes less 60 s of preparing, 8 passes of 0.5 s and 5 s to save, in steps of 0.5 s and 3 % for AdamW
    assert fitted(trainer, max_minutes=10.0, elapsed=60.0) == int((600 - 60 - 4 - 5) / (0.5 * 1.03)) == 1031
    assert len(trainer.passes) == 8
    assert all(batch == [0, 1, 2, 0] for batch in trainer.passes)
    assert trainer.steps == list(range(8))  # some objectives make another pass in some steps


def test_a_step_of_muon_takes_a_tenth_more_and_one_of_several_passes_so_many_times_as_long():
    assert fitted(Trainer(lambda number: 0.5, uses_muon=True), max_minutes=10.0) == int(591 / (0.5 * 1.1))
    assert fitted(Trainer(lambda number: 0.5, accumulation=4), max_minutes=10.0) == int(591 / (4 * 0.5 * 1.03))


def test_the_first_two_passes_are_not_counted_in_a_step_but_in_the_time():
    slow_at_first = Trainer(lambda number: 10.0 if number < 2 else 0.5)
    assert fitted(slow_at_first, max_minutes=10.0) == int((600 - 23 - 5) / (0.5 * 1.03))


def test_the_measurement_ends_after_a_twentieth_of_the_time_but_not_before_three_passes():
    quick = Trainer(lambda number: 1.0)
    fitted(quick, max_minutes=2.0)  # 6 s are a twentieth: the seventh pass is the first beyond them
    assert len(quick.passes) == 7
    slow = Trainer(lambda number: 100.0)
    assert fitted(slow, max_minutes=2.0) == 1
    assert len(slow.passes) == 3


def test_evaluations_take_a_third_of_a_pass_for_each_batch_of_their_windows():
    trainer = Trainer(lambda number: 0.5, windows=320)
    evaluation = 0.5 / 3 * 10
    left = 600 - 4 - 5 - evaluation  # the evaluation at the end
    saves = int(left / (0.5 * 1.03 + evaluation / 20)) // 20
    steps = int((left - saves * evaluation) / 0.515)
    assert fitted(trainer, save_every=20, max_minutes=10.0, batch_size=32) == steps


def test_the_wished_number_of_steps_is_never_exceeded():
    assert fitted(Trainer(lambda number: 0.5), max_minutes=10.0, max_steps=50) == 50


def test_measuring_leaves_buffers_gradients_counts_and_random_numbers_as_they_were():
    trainer = Trainer(lambda number: 0.5)
    before = torch.random.get_rng_state()
    fitted(trainer, max_minutes=10.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trainer.model.running_mean.item() == 0
    assert trainer.model.weight.grad is None
    assert (trainer.state.global_step, trainer.forgotten) == (0, 1)


def test_a_latent_stage_times_more_steps_as_chance_decides_what_each_does():
    assert (KeyedTrainer.timed_steps, StageTrainer.timed_steps) == (8, 32)


@pytest.mark.parametrize(
    ("train", "can", "is_compiled"),
    [
        ({"max_steps": 2000}, True, True),
        ({"max_steps": 2000}, False, False),
        ({"max_steps": 2000, "compile": "off"}, True, False),
        ({"max_steps": 300}, True, False),  # 155 s: too short to save twice the time of compiling
        ({"max_steps": 2000, "max_minutes": 2.0}, True, False),
        ({"max_steps": 2000, "max_minutes": 30.0}, True, True),
        ({"max_steps": 199}, True, False),
    ],
)
def test_the_transformer_is_compiled_where_that_saves_twice_the_time_it_takes(train, can, is_compiled):
    trainer = Trainer(lambda number: 0.5, can_be_compiled=can)
    pacer_of(trainer, **train).begin()
    assert trainer.is_compiled == trainer.plan.is_compiled == is_compiled
    is_measured = "max_minutes" in train or (can and train["max_steps"] >= 200 and train.get("compile") != "off")
    assert bool(trainer.passes) == is_measured


def test_what_compiling_takes_and_saves_is_said(capsys):
    seconds = {8: 30.0, 9: 3.0, 10: 0.5}
    trainer = Trainer(lambda number: seconds.get(number, 1.0), can_be_compiled=True)
    pacer = pacer_of(trainer, max_minutes=30.0, console=Console(width=200))
    pacer.begin()
    lines = capsys.readouterr().out.splitlines()
    assert "compiling the transformer, which takes about" in lines[0]
    assert lines[1] == "compiled in 34 s: a step takes 0.52 s instead of 1 s"
    assert trainer.plan.end == int((1800 - 8 - 33.5 - 5) / 0.515)


def rates_of(trainer, pacer, seconds, *, pause=0.0, first=0):
    """Run the loop without a model, step n in `seconds(n)`. Return each step's learning rate, of a peak of 1."""
    control, state, args = TrainerControl(), TrainerState(), SimpleNamespace(device=torch.device("cpu"))
    plan, rates = trainer.plan, []
    rate = partial(linear, num_warmup_steps=plan.schedule_steps // 20, num_training_steps=plan.schedule_steps)
    state.global_step = first
    pacer.on_train_begin(args, state, control)
    while state.global_step < state.max_steps:
        pacer.on_step_begin(args, state, control)
        rates.append(rate(plan.place(state.global_step)))
        trainer.now += seconds(state.global_step)
        state.global_step += 1
        pacer.on_step_end(args, state, control)
        if state.global_step % trainer.args.logging_steps == 0:
            state.log_history.append({})
            pacer.on_log(args, state, control, logs={"loss": 1.0})
        if pause and state.global_step % pacer.config.save_every == 0:
            trainer.now += pause
            pacer.on_save(args, state, control)
    return rates, state


def test_the_learning_rate_reaches_its_end_in_time_on_a_machine_that_slows_down_threefold_midway():
    trainer = Trainer(lambda number: 0.5)
    pacer = pacer_of(trainer, max_minutes=10.0)
    pacer.begin()
    planned = trainer.plan.end
    rates, state = rates_of(trainer, pacer, lambda step: 0.5 if step < planned // 2 else 1.5)
    assert planned == 1147
    assert planned * 0.6 < len(rates) == trainer.plan.end < planned * 0.7
    assert 585 < 60 * pacer.minutes() < 600
    assert rates[-1] < 0.01
    assert max(abs(a - b) for a, b in pairwise(rates[58:])) < 0.01  # no jump
    assert state.log_history[-1]["end"] == trainer.plan.end


def test_a_plain_run_has_the_learning_rates_of_its_steps_bitwise():
    trainer = Trainer(lambda number: 0.5)
    pacer = pacer_of(trainer, max_minutes=10.0, max_steps=200)
    pacer.begin()
    rates, _ = rates_of(trainer, pacer, lambda step: 0.5 + (step % 7) / 10)
    assert rates == [linear(step, num_warmup_steps=10, num_training_steps=200) for step in range(200)]


def test_a_machine_that_was_slow_when_it_was_measured_trains_for_more_steps():
    trainer = Trainer(lambda number: 2.0)
    pacer = pacer_of(trainer, max_minutes=10.0, max_steps=1000)
    pacer.begin()
    planned = trainer.plan.end
    rates, _ = rates_of(trainer, pacer, lambda step: 0.5)
    assert planned < 300
    assert len(rates) == 1000
    assert rates[-1] < 0.01


def test_checkpoints_and_evaluations_are_part_of_the_time():
    trainer = Trainer(lambda number: 0.5)
    pacer = pacer_of(trainer, max_minutes=10.0, save_every=100)
    pacer.begin()
    rates, _ = rates_of(trainer, pacer, lambda step: 0.5, pause=20.0)
    assert 570 < 60 * pacer.minutes() <= 600
    assert rates[-1] < 0.01


def test_a_run_ends_in_time_whatever_happens_between_two_log_lines():
    trainer = Trainer(lambda number: 0.5)
    pacer = pacer_of(trainer, max_minutes=10.0)
    pacer.begin()
    rates, state = rates_of(trainer, pacer, lambda step: 100.0 if step > 1140 else 0.5)
    assert len(rates) == state.max_steps == trainer.plan.end == 1142  # one slow step, and no more
    assert rates[-1] < 0.05


@pytest.mark.parametrize(("left", "windows"), [(100.0, 320), (20.0, 150), (-5.0, 32)])
def test_the_evaluation_at_the_end_takes_the_windows_for_which_there_is_time(left, windows):
    trainer = Trainer(lambda number: 0.5, windows=320)
    pacer = pacer_of(trainer, max_minutes=10.0)
    pacer.begin()
    pacer._seconds_per_window = 0.1
    trainer.now += 600 - left - 60 * pacer.minutes()
    assert pacer.affordable_windows() == windows


def checkpoint_of(tmp_path, *, step, end, logging_steps=1, **plan):
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir()
    state = TrainerState(global_step=step, max_steps=end, logging_steps=logging_steps)
    state.save_to_json(str(folder / "trainer_state.json"))
    if plan:
        Plan(**{"end": end, "max_steps": end, "schedule_steps": end} | plan).save(folder)
    return str(folder)


def resumed(folder, **train):
    trainer = Trainer(lambda number: 0.5)
    pacer = pacer_of(trainer, **train)
    pacer.resume(folder)
    return trainer, pacer


@pytest.mark.parametrize("plan", [{}, {"minutes": 3.0}])
def test_a_run_continues_as_it_was_planned(tmp_path, plan):
    """A checkpoint of an earlier version has no plan."""
    trainer, _ = resumed(checkpoint_of(tmp_path, step=40, end=100, logging_steps=3, **plan), max_steps=100)
    assert (trainer.plan.end, trainer.plan.place(41), trainer.args.logging_steps) == (100, 41, 3)
    assert trainer.passes == []


def test_a_finished_run_that_is_trained_for_longer_warms_up_again_and_ends_at_the_new_end(tmp_path):
    trainer, _ = resumed(checkpoint_of(tmp_path, step=100, end=100, minutes=3.0), max_steps=300)
    assert [trainer.plan.place(step) for step in (100, 200, 300)] == [0, 50, 100]
    trainer.plan.save(tmp_path)  # its next checkpoint
    again = Plan(**json.loads((tmp_path / "plan.json").read_text()))
    assert again == trainer.plan


def test_a_stopped_run_that_is_trained_for_longer_stretches_what_is_left_of_its_schedule(tmp_path):
    trainer, _ = resumed(checkpoint_of(tmp_path, step=60, end=100, minutes=3.0), max_steps=140)
    assert [trainer.plan.place(step) for step in (60, 100, 140)] == [60, 80, 100]


def test_minutes_count_those_before_the_checkpoint_and_more_of_them_train_a_finished_run_for_longer(tmp_path):
    folder = checkpoint_of(tmp_path, step=100, end=100, max_minutes=5.0, minutes=4.5)
    trainer, pacer = resumed(folder, max_steps=100, max_minutes=10.0, elapsed=30.0)
    assert trainer.plan.end == 100 + int((300 - 4 - 5) / 0.515)
    assert trainer.plan.place(100) == 0
    rates, _ = rates_of(trainer, pacer, lambda step: 0.5, first=100)
    assert 9.5 < pacer.minutes() <= 10
    assert rates[-1] < 0.01


def test_a_finished_run_with_the_limit_it_had_stays_finished(tmp_path):
    folder = checkpoint_of(tmp_path, step=80, end=80, max_steps=100, schedule_steps=90, max_minutes=5.0, minutes=4.9)
    assert resumed(folder, max_steps=80, max_minutes=5.0)[0].plan.end == 80


def test_fewer_steps_than_planned_and_minutes_that_are_gone_are_refused(tmp_path):
    folder = checkpoint_of(tmp_path, step=100, end=100, minutes=12.0)
    with pytest.raises(ValueError, match=r"planned for 100 steps; got train.max_steps 50"):
        resumed(folder, max_steps=50)
    with pytest.raises(ValueError, match=r"max_minutes 10 counts the 12 minutes .* Use --train.max-minutes 22"):
        resumed(folder, max_steps=100, max_minutes=10.0)
