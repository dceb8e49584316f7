"""Invariances of the training loop: how the global batch is split, where a run is killed, what is evaluated twice."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import redraft
from redraft.data.prepare import DataConfig
from redraft.models.build import ModelConfig
from redraft.training.callbacks import read_log
from redraft.training.config import RunConfig, TrainConfig
from redraft.training.run import run

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus and a cache of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j % 7}\n" for j in range(12)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(corpus, cache, tmp_path):
    return RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(
            source=str(corpus), seq_len=32, vocab_size=300, validation_fraction=0.2, cache_dir=str(cache)
        ),
        model=ModelConfig(size="1m", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64),
        train=TrainConfig(
            batch_size=8, max_steps=6, eval_every=3, save_every=2, eval_windows=20, log_every=1, precision="float32",
            compile="off", device="cpu", report_to=(), learning_rate=1e-2, keep_checkpoints=10,
        ),
    )  # fmt: skip


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def losses(folder):
    return [line["loss"] for line in read_log(Path(folder) / "log.jsonl") if "loss" in line]


def gradient_norms(folder):
    return [line["grad_norm"] for line in read_log(Path(folder) / "log.jsonl") if "grad_norm" in line]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


@contextmanager
def launched(config, *, processes=1, resume=False):
    """Start `redraft train` as a user does, on the saved recipe of a config; its output goes to `process.stdout`."""
    path = Path(config.out).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(config)))
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*start, "redraft.cli", "train", str(path), *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process, *, code=0):
    """Wait for the end and return what was printed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def wait_for_log(process, config, *, lines=1):
    """Wait until the run has logged some lines."""
    log = Path(config.out) / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


def test_eight_rows_at_once_equal_one_row_eight_times(config):
    whole = run(config, console=QUIET)
    split = run(with_train(replace(config, out=config.out + "-split"), batch_size=1, accumulation=8), console=QUIET)
    assert losses(whole.folder) == pytest.approx(losses(split.folder), abs=1e-5)
    assert gradient_norms(whole.folder) == pytest.approx(gradient_norms(split.folder), abs=1e-4)
    assert_close(weights(whole.folder), weights(split.folder), 1e-4)


def gradients(config, batches_per_step):
    """Take the gradients of the first optimizer step, as the training loop would."""
    from redraft.data.prepare import prepare
    from redraft.models.build import build_model
    from redraft.models.denoiser import Denoiser
    from redraft.training.run import _build_trainer

    data = prepare(config.data)
    torch.manual_seed(0)
    settings = config.objective.settings(data.tokenizer.mask_token_id)
    model = build_model(config.model, settings, tokenizer=data.tokenizer)
    trainer = _build_trainer(config, data, Denoiser(model, settings), [])
    batches, count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), batches_per_step, torch.device("cpu")
    )
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses), {name: p.grad for name, p in model.named_parameters()}


def test_loss_and_gradients_of_a_step_do_not_depend_on_how_the_batch_is_split(config):
    whole, expected = gradients(config, 1)
    for batch_size, accumulation in ((1, 8), (4, 2)):
        split, found = gradients(with_train(config, batch_size=batch_size, accumulation=accumulation), accumulation)
        assert split == pytest.approx(whole, abs=1e-5)
        assert_close(found, expected, 1e-5)
    other, unequal = gradients(with_train(config, batch_size=4), 1)  # half of the batch: the test can fail
    assert abs(other - whole) > 1e-3
    assert any((unequal[name] - expected[name]).abs().max() > 1e-3 for name in expected)


def test_a_logger_that_is_not_installed_is_told(config):
    with pytest.raises(ValueError, match="train.report_to names trackio, which is not installed"):
        run(with_train(config, report_to=("trackio",)), console=QUIET)
    with pytest.raises(ValueError, match="unknown train.report_to 'tensorbord'.*Did you mean 'tensorboard'"):
        run(with_train(config, report_to=("tensorbord",)), console=QUIET)
    assert not Path(config.out).exists()


def test_two_processes_equal_one(config):
    torch.set_num_threads(1)
    whole = run(config, console=QUIET)
    two = with_train(replace(config, out=config.out + "-two"), batch_size=4)
    with launched(two, processes=2) as process:
        finish(process)
    assert losses(two.out) == pytest.approx(losses(whole.folder), abs=1e-5)
    assert gradient_norms(two.out) == pytest.approx(gradient_norms(whole.folder), rel=1e-5, abs=1e-5)
    assert_close(weights(whole.folder), weights(two.out), 1e-4)
    log = read_log(Path(two.out) / "log.jsonl")
    evaluations = [line["eval_nats_per_token"] for line in log if "eval_nats_per_token" in line]
    expected = [line["eval_nats_per_token"] for line in read_log(whole.folder / "log.jsonl") if "eval_loss" in line]
    assert evaluations == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_killed_at_a_random_moment_and_resumed_ends_bitwise_as_one_never_stopped(config, ema_decay):
    torch.set_num_threads(1)
    config = with_train(config, max_steps=60, eval_every=0, ema_decay=ema_decay)
    with launched(replace(config, out=config.out + "-whole")) as whole:
        finish(whole)
    with launched(config) as killed:
        wait_for_log(killed, config, lines=9)
        time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not (Path(config.out) / "model.safetensors").exists()
    with launched(config, resume=True) as resumed:
        finish(resumed)
    expected, found = weights(config.out + "-whole"), weights(config.out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(config.out) == losses(config.out + "-whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(config, number, code):
    with launched(with_train(config, max_steps=100_000, save_every=50_000)) as process:
        wait_for_log(process, config)
        process.send_signal(number)
        output = finish(process, code=code)
    assert f"redraft train {config.out} --resume" in output.replace("\n", "")
    assert list(Path(config.out).glob("checkpoint-*/optimizer.pt"))


def test_evaluation_gives_the_same_number_twice_and_its_standard_error(config):
    outcome = run(config, console=QUIET)
    again = [line for line in read_log(outcome.folder / "log.jsonl") if "eval_nats_per_token" in line]
    assert again[-2]["eval_nats_per_token"] > 0  # at the last step, over 20 windows
    assert again[-1]["eval_nats_per_token"] == outcome.held_out.nats_per_token
    assert 0 < outcome.held_out.standard_error < outcome.held_out.nats_per_token
    assert outcome.held_out.bits_per_byte > 0
    repeated = run(replace(config, out=config.out + "-again"), console=QUIET)
    assert repeated.held_out == outcome.held_out


def test_a_finished_folder_holds_all_that_is_needed(config):
    outcome = run(config, console=QUIET)
    lm = redraft.load(outcome.folder)
    assert lm.generate("def ", max_new_tokens=4).texts is not None
    assert RunConfig.read(outcome.folder / "recipe.json") == config
    assert (outcome.folder / "loss.png").stat().st_size > 1000


def test_training_lowers_the_loss_and_averaged_weights_are_saved(config):
    outcome = run(with_train(config, max_steps=80, eval_every=0, ema_decay=0.8), console=QUIET)
    assert losses(outcome.folder)[-1] < losses(outcome.folder)[0] - 1
    last = Path(outcome.folder) / "checkpoint-80"
    saved, averaged = weights(outcome.folder), load_file(last / "average.safetensors")
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    raw = load_file(last / "model.safetensors")
    assert any(not torch.equal(saved[name], raw[name]) for name in averaged)


def test_documents_can_be_kept_apart(config):
    apart = replace(config, data=replace(config.data, isolate_documents=True))
    outcome = run(apart, console=QUIET)
    assert outcome.steps == config.train.max_steps


def test_minutes_lower_the_number_of_steps(config):
    outcome = run(with_train(config, max_steps=10**6, max_minutes=0.05, eval_every=0, save_every=10**6), console=QUIET)
    assert outcome.steps < 10**5
    assert RunConfig.read(outcome.folder / "recipe.json").train.max_steps < 10**5


def mistakes(config):
    data, train = config.data, config.train
    empty, binary = Path(config.out).parent / "empty.txt", Path(config.out).parent / "binary.txt"
    empty.touch()
    binary.write_bytes(b"\0\1\2")
    return {
        "the corpus fills": replace(config, train=replace(train, batch_size=5000)),
        "one window needs seq_len=": replace(config, data=replace(data, seq_len=2000)),
        "holds no text": replace(config, data=replace(data, source=str(empty))),
        "binary": replace(config, data=replace(data, source=str(binary))),
        "no/such/file": replace(config, data=replace(data, source="no/such/file.txt")),
    }


@pytest.mark.parametrize("message", ["the corpus fills", "one window needs", "holds no text", "binary", "no/such/file"])
def test_a_corpus_that_cannot_be_used_is_told_before_anything_is_written(config, message):
    case = next(case for key, case in mistakes(config).items() if key.startswith(message))
    with pytest.raises(ValueError, match=message):
        run(case, console=QUIET)
    assert not Path(config.out).exists()


def test_a_run_without_held_out_documents_trains_and_saves(config):
    outcome = run(replace(config, data=replace(config.data, validation_fraction=0)), console=QUIET)
    assert outcome.held_out is None
    assert redraft.load(outcome.folder)


def test_a_run_stopped_between_its_last_step_and_its_end_takes_no_further_step(config):
    config = with_train(config, decay="constant", ema_decay=0.9)
    outcome = run(config, console=QUIET)
    expected = weights(outcome.folder)
    (outcome.folder / "model.safetensors").unlink()
    moved = outcome.folder.rename(outcome.folder.with_name("moved"))
    resumed = run(replace(config, out=str(moved)), resume=True, console=QUIET)
    assert resumed.steps == outcome.steps
    assert all(torch.equal(expected[name], found) for name, found in weights(moved).items())


def test_another_run_is_never_overwritten(config):
    run(config, console=QUIET)
    before = weights(config.out)
    with pytest.raises(ValueError, match="holds another run. Continue it with --resume"):
        run(config, console=QUIET)
    with pytest.raises(ValueError, match=r"settings differ: train.learning_rate: 0.01 -> 0.5"):
        run(with_train(config, learning_rate=0.5), resume=True, console=QUIET)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config.out).items())


def test_an_unwritable_place_and_a_full_disk_are_told_before_the_start(config, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(ValueError, match="is a file"):
        run(replace(config, out=str(blocker)), console=QUIET)
    with pytest.raises(ValueError, match="cannot write to"):
        run(replace(config, out=str(blocker / "deeper")), console=QUIET)
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(config, resume=True, console=QUIET)
    from redraft.training import run as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"the checkpoints of this run need \d+\.\d MB and .* has 0\.0 MB free"):
        run(config, console=QUIET)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (TrainConfig, {"max_steps": -5}, "train.max_steps must be at least 1; got -5"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate must be positive"),
        (TrainConfig, {"warmup": 1.5}, "warmup is a fraction"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must lie in"),
        (DataConfig, {"seq_len": 1}, "seq_len must be at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_told(section, settings, message):
    with pytest.raises(ValueError, match=message):
        section(**settings)


def test_a_tokenizer_without_a_mask_token_is_told(config, tmp_path):
    from redraft.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some text"], vocab_size=260)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    bare = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "tokenizer")))
    with pytest.raises(ValueError, match="the tokenizer must have mask_token"):
        run(bare, console=QUIET)


def test_a_recipe_file_with_an_unknown_setting_is_told(tmp_path):
    (tmp_path / "recipe.json").write_text('{"train": {"learnin_rate": 1.0}}')
    with pytest.raises(ValueError, match="unknown setting .*'learnin_rate'.*Did you mean 'learning_rate'"):
        RunConfig.read(tmp_path / "recipe.json")
