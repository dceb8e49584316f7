"""Stages of latent thinking run as any other run does: resumed, stopped, split, guarded."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from redraft.cli import _dispatch
from redraft.latent.checkpoint import load_thinker
from redraft.latent.config import LatentRunConfig, ThoughtObjective
from redraft.latent.objective import ForcedLoss
from redraft.latent.stages import StageTrainer, run_stage
from redraft.latent.tasks import find_task
from redraft.recipes import RECIPES
from redraft.training.callbacks import read_log
from redraft.training.checkpoint import damage
from redraft.training.plan import Clock

QUIET = Console(quiet=True)
SMALL = {
    "autoencoder": {"hidden_size": 32, "latent_dim": 4},
    "denoiser": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The stages cut down to seconds; autoencoder and denoiser have been run, for the others to start from."""
    folder = tmp_path_factory.mktemp("stages")
    task = folder / "sums.jsonl"
    rows = [
        {"prompt": f"{a} {b}", "blocks": [f"{a} + {b}", f"= {a + b}"][: 1 + a % 2], "answer": "x " * (1 + b % 3)}
        for a in range(8)
        for b in range(8)
    ]
    task.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for stage, before in (("autoencoder", None), ("denoiser", "autoencoder"), ("rollout", "denoiser")):
        config = RECIPES[f"latent-{stage}"]()
        found[stage] = replace(
            config,
            out=str(folder / stage),
            task=str(task),
            start=before and str(folder / before),
            force=True,
            **{name: replace(getattr(config, name), **small) for name, small in SMALL.items() if name == stage},
            train=replace(
                config.train, batch_size=8, max_steps=6, max_minutes=None, save_every=2, ema_decay=0.9,
                precision="float32", max_checkpoints=10,
            ),
        )  # fmt: skip
        if stage != "rollout":
            run_stage(found[stage], console=QUIET)
    return found


def with_train(config, tmp_path, name="run", **changes):
    return replace(config, out=str(tmp_path / name), train=replace(config.train, **changes))


def logged(folder, name):
    return [line[name] for line in read_log(Path(folder) / "log.jsonl") if name in line]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


SIGNALLED = """
import os, signal, sys
from redraft.cli import main
from redraft.latent.stages import StageTrainer

name, step, *arguments = sys.argv[1:]
loss_of, sent = StageTrainer.compute_loss, []

def compute_loss(self, *args, **kwargs):
    if self.state.global_step == int(step) and not sent:
        sent.append(name)
        os.kill(os.getpid(), signal.Signals[name])
    return loss_of(self, *args, **kwargs)

StageTrainer.compute_loss = compute_loss
main(["train", *arguments])
"""


def signalled(name, step, *arguments):
    """Train in a process of its own, which gets a signal at a step, however fast the machine is."""
    command = [sys.executable, "-c", SIGNALLED, name, str(step), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser", pytest.param("rollout", marks=pytest.mark.slow)])
def test_a_stage_resumed_from_a_checkpoint_ends_bitwise_as_one_never_stopped(configs, tmp_path, stage, monkeypatch):
    config = configs[stage]
    whole = run_stage(with_train(config, tmp_path, "whole"), console=QUIET)
    config = with_train(config, tmp_path)
    loss_of, losses = StageTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5 and not losses:
            losses.append(None)
            raise KeyboardInterrupt
        return loss_of(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, console=QUIET)
    assert not (tmp_path / "run/model.safetensors").exists()
    assert all(damage(path) is None for path in (tmp_path / "run").glob("checkpoint-*"))
    resumed = run_stage(config, resume=True, console=QUIET)
    expected, found = weights(whole.folder), weights(resumed.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logged(whole.folder, "loss") == logged(resumed.folder, "loss")


@pytest.mark.slow
def test_a_stage_stopped_by_sigterm_and_then_killed_is_gone_on_with_by_the_command_line(configs, tmp_path):
    config = with_train(configs["denoiser"], tmp_path, max_steps=12, save_every=4)
    torch.set_num_threads(1)
    whole = run_stage(replace(config, out=str(tmp_path / "whole")), console=QUIET)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(asdict(config)))
    done = signalled("SIGTERM", 6, str(recipe))
    assert done.returncode == 128 + signal.SIGTERM, done.stdout
    assert f"redraft train {config.out} --resume" in done.stdout.replace("\n", "")
    assert signalled("SIGKILL", 9, config.out, "--resume").returncode == -signal.SIGKILL
    assert not (Path(config.out) / "model.safetensors").exists()
    assert _dispatch(["train", config.out, "--resume"]) == 0
    expected, found = weights(whole.folder), weights(config.out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logged(whole.folder, "loss") == logged(config.out, "loss")


@pytest.mark.parametrize("times", ["logit-normal", "uniform"])
def test_eight_rows_at_once_equal_two_rows_four_times(configs, tmp_path, times, monkeypatch):
    monkeypatch.setattr("redraft.latent.stages.ForcedLoss", partial(ForcedLoss, joint=0.4))
    assert_split_equals_whole(replace(configs["denoiser"], objective=ThoughtObjective(times=times)), tmp_path)


@pytest.mark.slow
def test_rollout_too_is_the_same_however_a_batch_is_split(configs, tmp_path):
    assert_split_equals_whole(configs["rollout"], tmp_path)


def assert_split_equals_whole(config, tmp_path):
    config = replace(config, train=replace(config.train, optimizer="adamw"))  # Muon enlarges rounding
    whole = run_stage(with_train(config, tmp_path, "whole"), console=QUIET).folder
    split = run_stage(with_train(config, tmp_path, "split", batch_size=2, accumulation=4), console=QUIET).folder
    for name in ("loss", "grad_norm"):
        assert logged(whole, name) == pytest.approx(logged(split, name), abs=1e-5, rel=1e-5)
    for name in ("flow", "stop", "answer", "rollout"):
        assert logged(whole, name) == pytest.approx(logged(split, name), abs=2e-4)
    expected, found = weights(whole), weights(split)
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-4
    return whole


def test_a_step_without_a_finite_gradient_is_skipped_and_too_many_end_the_stage(configs, tmp_path, monkeypatch):
    compute_loss = StageTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) * (torch.inf if self.state.global_step in (2, 3) else 1)

    monkeypatch.setattr(StageTrainer, "compute_loss", poisoned)
    folder = run_stage(with_train(configs["denoiser"], tmp_path, save_every=1), console=QUIET).folder
    before, after = (load_file(folder / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert logged(folder, "skipped_steps") == [1, 1]
    assert load_file(folder / "skipped/step-2-process-0.safetensors")["0.blocks"].shape[0] == 8
    monkeypatch.setattr("redraft.training.guard.MAX_SKIPPED", 1)
    with pytest.raises(ValueError, match="2 steps had a gradient that is not finite"):
        run_stage(with_train(configs["denoiser"], tmp_path, "few"), console=QUIET)


def test_minutes_lower_the_number_of_steps_so_that_the_learning_rate_reaches_its_end(configs, tmp_path):
    config = with_train(configs["denoiser"], tmp_path, max_steps=10_000, max_minutes=1.0)
    ticks = count()  # a second each time it is read
    outcome = run_stage(config, console=QUIET, clock=Clock(now=lambda: next(ticks)))
    assert 1 < outcome.steps < 45 < next(ticks) <= 61
    assert json.loads((outcome.folder / "recipe.json").read_text())["train"]["max_steps"] == outcome.steps


def test_the_first_log_line_tells_of_steps_that_trained_and_not_of_those_that_were_timed(configs, tmp_path):
    config = configs["denoiser"]
    plain = run_stage(with_train(config, tmp_path, "plain"), console=QUIET).folder
    timed = run_stage(with_train(config, tmp_path, "timed", max_minutes=5), console=QUIET).folder
    for name in ("flow", "stop", "answer"):
        assert logged(plain, name) == logged(timed, name)


def test_parts_of_the_loss_are_means_over_the_steps_that_have_them(configs, tmp_path, monkeypatch):
    # a joint step has no stop loss
    monkeypatch.setattr("redraft.latent.stages.ForcedLoss", partial(ForcedLoss, joint=0.5))
    config = with_train(configs["denoiser"], tmp_path, "each")
    each = logged(run_stage(config, console=QUIET).folder, "stop")
    assert 0 < len(each) < 6
    config = replace(config, out=str(tmp_path / "all"))
    monkeypatch.setattr("redraft.training.pace.log_interval", lambda max_steps: 6)
    (mean,) = logged(run_stage(config, console=QUIET).folder, "stop")
    assert mean == pytest.approx(sum(each) / len(each), abs=2e-4)


def test_a_model_is_saved_before_it_is_measured_so_that_a_broken_verifier_costs_nothing(configs, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("redraft.latent.stages.share_solved", broken)
    config = with_train(configs["denoiser"], tmp_path, max_steps=2)
    with pytest.raises(ZeroDivisionError):
        run_stage(config, console=QUIET)
    assert load_thinker(config.out).think("3 4", steps=1)


def test_bfloat16_trains_a_rollout_and_all_it_contains(configs, tmp_path):
    config = with_train(configs["rollout"], tmp_path, precision="bfloat16", max_steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(run_stage(config, console=QUIET).folder).values())


def test_resuming_with_other_settings_is_refused(configs, tmp_path):
    config = with_train(configs["denoiser"], tmp_path)
    run_stage(config, console=QUIET)
    with pytest.raises(ValueError, match=r"settings differ: objective.times: 'logit-normal' -> 'uniform'"):
        run_stage(replace(config, objective=ThoughtObjective(times="uniform")), resume=True, console=QUIET)


@pytest.fixture
def stopped(configs, tmp_path, monkeypatch):
    """A denoiser stopped at step 3 of 6, from an autoencoder of its own."""
    start = tmp_path / "ae"
    shutil.copytree(configs["denoiser"].start, start)
    config = replace(with_train(configs["denoiser"], tmp_path), start=str(start))
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", until(3))
        with pytest.raises(KeyboardInterrupt):
            run_stage(config, console=QUIET)
    return config


def until(step):
    compute_loss = StageTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    return interrupted


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("denoiser", {"weighting": "unit"}, "weighting 'inverse-t', but recipe.json .* has 'unit' now"),
        ("objective", {"times": "uniform"}, "times 'logit-normal', but recipe.json .* has 'uniform' now"),
    ],
)
def test_an_edited_recipe_is_not_resumed(stopped, section, changes, told):
    path = Path(stopped.out) / "recipe.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {section: saved[section] | changes}))
    with pytest.raises(ValueError, match=told):
        run_stage(LatentRunConfig.read(path), resume=True, console=QUIET)


def test_a_stage_goes_on_from_the_autoencoder_it_was_begun_on_alone(stopped):
    weights_file = Path(stopped.start) / "model.safetensors"
    saved = load_file(weights_file)
    metadata = {"format": "pt"}
    save_file({name: tensor + 1 for name, tensor in saved.items()}, weights_file, metadata=metadata)
    with pytest.raises(ValueError, match="was trained with hashes of the start"):
        run_stage(stopped, resume=True, console=QUIET)
    save_file(saved, weights_file, metadata=metadata)
    assert run_stage(stopped, resume=True, console=QUIET).steps == 6


def test_a_stage_goes_on_with_the_examples_it_was_begun_on_alone(stopped):
    path = Path(stopped.task)
    saved = path.read_text()
    path.write_text(saved.replace("= 3", "= 4"))
    try:
        with pytest.raises(ValueError, match="was trained with hash of the examples"):
            run_stage(stopped, resume=True, console=QUIET)
    finally:
        path.write_text(saved)
    assert run_stage(stopped, resume=True, console=QUIET).steps == 6


def test_a_run_with_a_task_from_python_goes_on_in_python_alone(configs, tmp_path, monkeypatch, capsys):
    config, task = with_train(configs["autoencoder"], tmp_path), find_task(configs["autoencoder"].task)
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", until(3))
        with pytest.raises(KeyboardInterrupt):
            run_stage(config, task=task, console=QUIET)
    assert json.loads((Path(config.out) / "recipe.json").read_text())["task"] is None
    assert _dispatch(["train", config.out, "--resume"]) == 2
    assert "started with a task from Python, which its recipe cannot name" in capsys.readouterr().err
    assert run_stage(config, task=task, resume=True, console=QUIET).steps == 6
    assert _dispatch(["think", "--check", config.out]) == 2
    assert "was trained on a task from Python" in capsys.readouterr().err
