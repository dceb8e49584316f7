"""A run survives gradients that are not finite, damaged checkpoints and a full disk."""

import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import redraft
from redraft.data.config import DataConfig
from redraft.latent.config import LatentRunConfig
from redraft.models.config import ModelConfig
from redraft.training import trainer as trainer_module
from redraft.training.callbacks import read_log
from redraft.training.checkpoint import damage, last_whole_checkpoint, tidy
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.guard import Spikes
from redraft.training.run import run

QUIET = Console(quiet=True)


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        text = "\n".join(f"def f_{i}_{j}(x):\n    return x + {i * j % 7}\n" for j in range(12))
        (corpus / f"module_{i}.py").write_text(text)
    return RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(source=str(corpus), seq_len=32, vocab_size=280),
        model=ModelConfig(size="hidden=32,layers=1,heads=2,intermediate=64"),
        train=TrainConfig(
            batch_size=4, max_steps=6, max_validation_windows=2, save_every=2, precision="float32", compile="off",
            max_checkpoints=20,
        ),
    )  # fmt: skip


def poison(monkeypatch, steps):
    """Make the loss of these steps infinite."""
    score = trainer_module.DiffusionTrainer.score

    def poisoned(self, objective, batch, key, **settings):
        total, nats = score(self, objective, batch, key, **settings)
        return (total * torch.inf if key.step in steps else total), nats

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "score", poisoned)


@pytest.mark.parametrize(("accumulation", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_a_step_without_a_finite_gradient_changes_nothing_and_its_batch_is_kept(
    config, monkeypatch, accumulation, optimizer
):
    train = replace(config.train, save_every=1, accumulation=accumulation, optimizer=optimizer)
    config = replace(config, train=train)
    poison(monkeypatch, {3})
    out = run(config, console=QUIET).folder
    weights = [load_file(out / f"checkpoint-{n}" / "model.safetensors") for n in (3, 4, 5)]
    states = [torch.load(out / f"checkpoint-{n}" / "optimizer.pt") for n in (3, 4)]
    parts = states if optimizer == "adamw" else [state[part] for part in ("adamw", "muon") for state in states]
    moments = [part["state"] for part in parts]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    for before, after in zip(moments[::2], moments[1::2], strict=True):
        assert before
        assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "model.safetensors").values())
    lines = [line for line in read_log(out / "log.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in lines if "skipped_steps" in line] == [4]
    assert [line["step"] for line in lines if not math.isfinite(line["loss"])] == [4]  # the losses after it are losses
    kept = load_file(out / "skipped" / "step-3-process-0.safetensors")
    assert kept["0.input_ids"].shape == (4, 32)
    assert len([name for name in kept if name.endswith("input_ids")]) == accumulation


def test_too_many_of_them_end_the_run(config, monkeypatch):
    monkeypatch.setattr("redraft.training.guard.MAX_SKIPPED", 1)
    poison(monkeypatch, {2, 3})
    with pytest.raises(ValueError, match="2 steps had a gradient that is not finite"):
        run(config, console=QUIET)
    assert damage(Path(config.out) / "checkpoint-2") is None


def test_those_after_the_last_log_line_are_counted_too(config, monkeypatch):
    poison(monkeypatch, range(6))
    monkeypatch.setattr("redraft.training.guard.MAX_SKIPPED", 1)
    monkeypatch.setattr("redraft.training.pace.log_interval", lambda steps: 10)
    with pytest.raises(ValueError, match=r"6 steps had a gradient that is not finite, more than 1"):
        run(config, console=QUIET)
    assert not (Path(config.out) / "model.safetensors").exists()
    assert (Path(config.out) / "skipped" / "step-0-process-0.safetensors").exists()


NOTHING_YET = "There is no checkpoint yet; make room, then --resume starts from the first step"
WHOLE = "Earlier checkpoints are whole; make room, then --resume"


@pytest.mark.parametrize(
    ("what", "message", "advice"),
    [
        ("recipe", "recipe.json", "Nothing is lost; make room, then start again"),
        ("hashes", "checkpoint-2", NOTHING_YET),
        ("log", "log.jsonl", NOTHING_YET),
        ("batch", "the batch of step 3", WHOLE),
        ("model", "the model", WHOLE),
        ("curve", "loss.png", WHOLE),
    ],
)
def test_a_full_disk_is_one_line_wherever_it_is_found_and_says_what_is_left(config, monkeypatch, what, message, advice):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save, opened = trainer_module.DiffusionTrainer.save_model, Path.open
    poison(monkeypatch, {3})
    replaced = {
        "recipe": ("redraft.training.config.write_whole", full),
        "batch": ("redraft.training.guard.save_file", full),
        "curve": ("matplotlib.figure.Figure.savefig", full),
        "hashes": ("redraft.training.checkpoint.write_hashes", full),
        "log": (
            "pathlib.Path.open",
            lambda self, mode="r", **more: full() if mode == "a" else opened(self, mode, **more),
        ),
        "model": (
            "redraft.training.trainer.DiffusionTrainer.save_model",
            lambda self, folder, *rest, **more: (
                full() if folder.endswith(".model") else save(self, folder, *rest, **more)
            ),
        ),
    }
    monkeypatch.setattr(*replaced[what])
    with pytest.raises(ValueError, match=f"{message} could not be written.*No space left on device. {advice}."):
        run(config, console=QUIET)
    monkeypatch.undo()
    run(config, resume=(Path(config.out) / "recipe.json").exists(), console=QUIET)  # as it was told


DAMAGED = [b"{", b"null", b"[1, 2]", b'{"loss": 1.0}', b'{"step": "2"}', b"\xff\xfe\x00", b"[" * 100_000, b"\0" * 100]
TIMED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second", "train_loss"}


def timeless(lines):
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def test_damaged_lines_of_a_log_are_replaced_by_those_of_the_checkpoint(config):
    whole = run(config, console=QUIET).folder
    log, expected = whole / "log.jsonl", read_log(whole / "log.jsonl")
    first, *rest = log.read_bytes().splitlines()
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(whole / checkpoint)
    log.write_bytes(b"\n".join([first, *DAMAGED, *rest[:3], b'{"step": 2, "lo']))
    run(config, resume=True, console=QUIET)
    assert timeless(read_log(log)) == timeless(expected)


def test_a_log_that_cannot_be_written_is_one_line(config):
    out = run(config, console=QUIET).folder
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").mkdir()
    with pytest.raises(ValueError, match="log.jsonl could not be written: .*Is a directory"):
        run(config, resume=True, console=QUIET)


def test_a_run_that_is_resumed_after_its_end_logs_its_final_evaluation_once(config):
    out = run(config, console=QUIET).folder
    expected = [line for line in read_log(out / "log.jsonl") if "train_runtime" not in line]  # of no checkpoint
    assert len([line for line in expected if "eval_loss" in line]) == 3  # of two checkpoints, and at the end
    for _ in range(2):
        run(config, resume=True, console=QUIET)
        assert read_log(out / "log.jsonl") == expected
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in expected[:-1]))  # killed before it
    run(config, resume=True, console=QUIET)
    assert read_log(out / "log.jsonl") == expected


def test_a_stopped_run_is_loaded_from_its_last_checkpoint_and_says_so(config, caplog):
    out = run(config, console=QUIET).folder
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    assert redraft.load(out).generate("def ", max_new_tokens=4, steps=2).texts is not None
    assert f"the training of {out} has not ended: using its last checkpoint, checkpoint-6" in caplog.text
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=f"Continue it with `redraft train {out} --resume`.$"):
        redraft.load(out)
    LatentRunConfig(out=str(out)).save(out)
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "config.json").touch()  # of a latent stage, which is no whole model
    with pytest.raises(ValueError, match=f"Continue it with `redraft train {out} --resume`.$"):
        redraft.load(out)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "seq_len", 16),
        ("data", "vocab_size", 270),
        ("model", "size", "hidden=64,layers=1,heads=2,intermediate=64"),
    ],
)
def test_a_checkpoint_of_another_model_or_cut_of_the_data_is_not_gone_on_with(config, section, name, value):
    config = replace(config, train=replace(config.train, max_steps=2))
    run(config, console=QUIET)
    part = getattr(config, section)
    edited = replace(config, **{section: replace(part, **{name: value})})
    edited.save(Path(config.out))  # as by hand
    told = f"checkpoint-2 was trained with {name} {getattr(part, name)!r}, but recipe.json .* has {value!r} now"
    with pytest.raises(ValueError, match=told):
        run(edited, resume=True, console=QUIET)


def test_a_run_goes_on_after_its_data_were_moved(config):
    config = replace(config, train=replace(config.train, max_steps=2))
    run(config, console=QUIET)
    moved = shutil.move(config.data.source, config.data.source + "-moved")
    config = replace(config, data=replace(config.data, source=moved))
    config.save(Path(config.out))
    assert run(config, resume=True, console=QUIET).steps == 2


@pytest.mark.parametrize("learning_rate", [1e6, 1e30])
def test_a_run_whose_weights_explode_says_so_and_is_no_success(config, learning_rate):
    console = Console(record=True, width=300, file=io.StringIO())
    outcome = run(replace(config, train=replace(config.train, learning_rate=learning_rate)), console=console)
    said = console.export_text()
    assert re.match("the norm of its weights went from [0-9.]+ to ", outcome.diverged)
    assert f"the run diverged: {outcome.diverged}. The model in {outcome.folder} is of no use. Start another" in said
    assert "saved to" not in said


def test_a_run_that_learns_has_not_diverged(config):
    console = Console(record=True, width=300, file=io.StringIO())
    outcome = run(config, console=console)
    assert outcome.diverged is None
    assert f"saved to {outcome.folder}" in console.export_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(config):
    whole = run(config, console=QUIET).folder
    expected = load_file(whole / "model.safetensors")
    broken = whole / "checkpoint-6" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:100])
    console = Console(record=True, width=300, quiet=False, file=sys.stderr)
    run(config, resume=True, console=console)
    assert "checkpoint-6 is damaged (optimizer.pt is not as it was written)" in console.export_text()
    found = load_file(whole / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for folder in whole.glob("checkpoint-*"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint of"):
        run(config, resume=True, console=QUIET)


def test_a_checkpoint_half_deleted_is_not_taken_and_one_passed_over_does_not_outlive_those_after_it(config):
    out = run(config, console=QUIET).folder
    (out / "checkpoint-6" / "hashes.json").unlink()  # what goes first
    assert last_whole_checkpoint(out, QUIET) == str(out / "checkpoint-4")
    (out / "checkpoint-2").rename(out / "checkpoint-5")
    tidy(out, step=5, keep=1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-5"]


@pytest.mark.slow
def test_a_jump_of_the_loss_is_one_line_with_its_window_and_step(config, monkeypatch):
    """Some windows hold other tokens from step 60 on; without them nothing is told."""
    config = replace(
        config, objective=ObjectiveConfig(kind="ar"), train=replace(config.train, max_steps=100, learning_rate=1e-2)
    )
    quiet = run(replace(config, out=config.out + "-quiet"), console=QUIET).folder
    assert not [line for line in read_log(quiet / "log.jsonl") if "spike_step" in line]
    collate = trainer_module.DiffusionTrainer._collate

    def corrupted(self, rows):
        for row in rows:
            if row["window"] < 8 and self.state.global_step >= 60:
                row["input_ids"] = torch.arange(32) * 7
        return collate(self, rows)

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "_collate", corrupted)
    console = Console(record=True, width=300, file=io.StringIO())
    line, *_ = [line for line in read_log(run(config, console=console).folder / "log.jsonl") if "spike_step" in line]
    window = line["spike_window"]
    assert window < 8
    assert line["spike_step"] == line["step"]
    assert line["loss"] > 1.1 * line["usual_loss"]
    assert line["step"] > 60
    assert f"highest loss: training window {window}, in step {line['step']}" in console.export_text()


def test_a_jump_names_the_dearest_row_of_all_steps_and_processes_since_the_last_log():
    spikes, usual = Spikes(), [1.0] * 20
    other = (torch.tensor([7.5]), torch.tensor([[3, 40]]))  # what another process found
    accelerator = SimpleNamespace(gather=lambda mine: [torch.cat(both) for both in zip(mine, other, strict=True)])
    for step, nats in enumerate([[1.0, 8.0], [3.0, 2.0], [float("nan"), 1.0]]):
        spikes.record(torch.tensor(nats), torch.tensor([10, 11]) + step, step=step)
    assert spikes.report(2.0, usual, accelerator=accelerator) == {
        "usual_loss": 1.0, "spike_step": 1, "spike_window": 11
    }  # fmt: skip
    spikes.record(torch.tensor([5.0]), torch.tensor([12]), step=3)
    assert spikes.report(2.0, usual, accelerator=accelerator)["spike_window"] == 40
    spikes.record(torch.tensor([5.0]), torch.tensor([12]), step=4)
    assert spikes.report(1.05, usual, accelerator=accelerator) == {}, "less than a tenth is no jump"
    assert spikes.report(9.0, usual[:9], accelerator=accelerator) == {}, "too few to tell"


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(config):
    run(replace(config, train=replace(config.train, max_steps=2)), console=QUIET)
    folder = Path(config.out)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(asdict(replace(config, train=replace(config.train, max_steps=4)))))
    most = (folder / "checkpoint-2" / "optimizer.pt").stat().st_size // 2
    command = [sys.executable, "-m", "redraft.cli", "train", str(folder), "--resume"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert full.returncode == 2, full.stderr
    assert "checkpoint-4 could not be written" in full.stderr + full.stdout
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert damage(folder / "checkpoint-2") is None
    assert subprocess.run(command, capture_output=True).returncode == 0


def killed(config, how, *, objective=None, **changes):
    """What kills.py makes of a run with dropout and an average, over several passes."""
    model = replace(config.model, dropout=0.1)
    config = replace(
        config,
        model=model,
        objective=objective or config.objective,
        train=replace(config.train, ema_decay=0.9, **changes),
    )
    recipe = Path(config.out).with_suffix(".json")
    recipe.write_text(json.dumps(asdict(config)))
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), how, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_twenty_sigkills_at_random_moments_lose_nothing_and_end_bitwise_as_a_run_never_killed(config):
    """The joint objective of a causal context; its blocks grow while the run is killed."""
    joint = ObjectiveConfig(
        kind="block", block_size=8, context="causal", ar_weight=0.2, smallest_block=1, grow_steps=120
    )  # fmt: skip
    made = killed(config, "random", objective=joint, max_steps=600, save_every=6, max_checkpoints=2)
    assert [one["code"] for one in made["rounds"]] == [-signal.SIGKILL] * 20, made
    steps = [one["step"] for one in made["rounds"]]
    assert steps == sorted(steps)
    assert 0 < steps[-1] < 600
    assert (made["code"], made["differences"]) == (0, [])


@pytest.mark.slow
def test_a_sigkill_at_any_change_of_a_file_loses_nothing_and_leaves_nothing_behind(config):
    made = killed(config, "each", max_steps=4, save_every=2, max_checkpoints=1)
    assert made["kills"]["new"] > 15
    assert made["kills"]["resumed"] > 30
    assert made["wrong"] == {}
