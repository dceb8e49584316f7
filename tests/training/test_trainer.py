"""Invariances of the training loop: how the global batch is split, where a run is killed, what is evaluated twice."""

import json
import math
import os
import shutil
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
from safetensors.torch import load_file, save_file

import redraft
from redraft.data.config import ChatConfig, DataConfig
from redraft.data.prepare import prepare
from redraft.models.attention import choose_attention
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.recipes import RECIPES
from redraft.training.callbacks import read_log
from redraft.training.checkpoint import write_hashes
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.plan import Clock
from redraft.training.run import run
from redraft.training.trainer import DiffusionTrainer

QUIET = Console(quiet=True)
OBJECTIVES = {
    "masked": ObjectiveConfig(),
    "uniform": ObjectiveConfig(kind="uniform"),
    "block": ObjectiveConfig(kind="block", block_size=8, t_min=0.2, t_max=0.8),
    "ar": ObjectiveConfig(kind="ar"),
    "joint": ObjectiveConfig(
        kind="block", block_size=8, context="causal", smallest_block=1, grow_steps=4, ar_weight=0.2, plain=True
    ),
    "cart": ObjectiveConfig(cart=0.1),
    "complementary": ObjectiveConfig(complementary=True),
}
KINDS = {name: objective for name, objective in OBJECTIVES.items() if name not in ("cart", "complementary")}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


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
            source=str(corpus), seq_len=32, vocab_size=300, validation_fraction=0.2
        ),
        model=ModelConfig(size="hidden=32,layers=2,heads=2,intermediate=64"),
        train=TrainConfig(
            batch_size=8, max_steps=6, save_every=2, max_validation_windows=20, precision="float32", compile="off",
            learning_rate=1e-2, max_checkpoints=10,
        ),
    )  # fmt: skip


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def losses(folder):
    return [line["loss"] for line in read_log(Path(folder) / "log.jsonl") if "loss" in line]


def gradient_norms(folder):
    return [line["grad_norm"] for line in read_log(Path(folder) / "log.jsonl") if "grad_norm" in line]


def evaluations(folder):
    lines = read_log(Path(folder) / "log.jsonl")
    return [line["eval_nats_per_token"] for line in lines if "eval_nats_per_token" in line]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


KILLED_IN_STEP_35 = """
import os, signal, sys
from redraft.cli import main
from redraft.training.ema import WeightAverage
update, steps = WeightAverage.update, []
def update_or_die(self):
    steps.append(1)
    if len(steps) == 35:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self)
WeightAverage.update = update_or_die
main(sys.argv[1:])
"""


@contextmanager
def launched(config, *, flags=(), program=("-m", "redraft.cli")):
    """Start `redraft train` as a user does, on the saved recipe of a config; its output goes to `process.stdout`."""
    path = Path(config.out).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(config)))
    command = [sys.executable, *program, "train", str(path), *flags]
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
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def wait_for_log(process, config, *, lines=1):
    """Wait until the run has logged some lines."""
    log = Path(config.out) / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


def over_passes(config):
    """The same run on so few windows that it goes over them more than once, 28 to a pass."""
    return replace(config, data=replace(config.data, max_documents=6, vocab_size=280))


def on_conversations(config):
    """The same run on conversations in batches of like length, a little over a pass."""
    source = Path(config.out).with_suffix(".chat.jsonl")
    rows = [{"prompt": f"{i}?", "response": "yes " * (1 + i * i % 7)} for i in range(50)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatConfig(batching="grouped")
    return replace(
        config, data=replace(config.data, kind="chat", source=str(source), seq_len=64, vocab_size=270, chat=chat)
    )


@pytest.mark.parametrize(
    "data", [None, *(pytest.param(d, marks=pytest.mark.slow) for d in (over_passes, on_conversations))]
)
def test_eight_rows_at_once_equal_one_row_eight_times(config, data):
    config = data(config) if data else config
    whole = run(config, console=QUIET)
    split = run(with_train(replace(config, out=config.out + "-split"), batch_size=1, accumulation=8), console=QUIET)
    assert losses(whole.folder) == pytest.approx(losses(split.folder), abs=1e-5)
    assert gradient_norms(whole.folder) == pytest.approx(gradient_norms(split.folder), abs=1e-4)
    assert_close(weights(whole.folder), weights(split.folder), 1e-4)


def built(config):
    """Build the model and the trainer of a run."""
    from redraft.models.build import build_model
    from redraft.models.denoiser import Denoiser

    data = prepare(config.data)
    torch.manual_seed(0)
    settings = config.objective.settings(data.tokenizer.mask_token_id)
    model = build_model(config.model, settings, tokenizer=data.tokenizer)
    return model, DiffusionTrainer(config, data, Denoiser(model, settings))


def gradients(config, batches_per_step):
    """Take the gradients of the first optimizer step, as the training loop would."""
    model, trainer = built(config)
    batches, count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), batches_per_step, torch.device("cpu")
    )
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses), {name: p.grad for name, p in model.named_parameters()}


@every_objective
def test_loss_and_gradients_of_a_step_do_not_depend_on_how_the_batch_is_split(config, objective):
    config = replace(config, objective=objective)
    whole, expected = gradients(config, 1)
    for batch_size, accumulation in ((1, 8), (4, 2)):
        split, found = gradients(with_train(config, batch_size=batch_size, accumulation=accumulation), accumulation)
        assert split == pytest.approx(whole, abs=1e-5)
        assert_close(found, expected, 1e-5)
    other, unequal = gradients(with_train(config, batch_size=4), 1)  # half of the batch: the test can fail
    assert abs(other - whole) > 1e-4
    assert any((unequal[name] - expected[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.parametrize(
    "objective", [pytest.param(o, id=n, marks=[] if n == "joint" else pytest.mark.slow) for n, o in OBJECTIVES.items()]
)
def test_every_objective_resumes_bitwise_however_its_batch_is_split_and_its_checkpoint_says_what_it_is(
    config, objective
):
    config = replace(config, objective=objective)
    at_once = run(replace(config, out=config.out + "-at-once"), console=QUIET)
    config = with_train(config, batch_size=2, accumulation=4)
    outcome = run(config, console=QUIET)
    assert losses(outcome.folder) == pytest.approx(losses(at_once.folder), abs=1e-4)
    assert_close(weights(outcome.folder), weights(at_once.folder), 1e-3)
    expected, logged = weights(outcome.folder), losses(outcome.folder)
    (outcome.folder / "model.safetensors").unlink()
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(outcome.folder / checkpoint)
    resumed = run(config, resume=True, console=QUIET)
    assert all(torch.equal(expected[name], found) for name, found in weights(resumed.folder).items())
    assert losses(resumed.folder) == logged
    assert resumed.validation == outcome.validation
    loaded = redraft.load(outcome.folder).denoiser.settings
    process = {"uniform": "uniform", "ar": "autoregressive"}.get(objective.kind, "masked")
    assert (loaded.process, loaded.block_size) == (process, {"block": 8, "ar": 1}.get(objective.kind))
    other = ObjectiveConfig(t_min=0.5)
    with pytest.raises(ValueError, match=r"settings differ: objective\..*t_min"):
        run(replace(config, objective=other), resume=True, console=QUIET)


@pytest.mark.slow
def test_a_run_with_muon_resumes_bitwise_and_its_optimizer_cannot_be_changed_on_the_way(config):
    plain = run(replace(config, out=config.out + "-adamw"), console=QUIET).folder
    config = with_train(config, optimizer="muon", accumulation=2, batch_size=4)
    outcome = run(config, console=QUIET)
    expected, logged = weights(outcome.folder), losses(outcome.folder)
    assert abs(logged[-1] - losses(plain)[-1]) > 1e-4  # another optimizer
    (outcome.folder / "model.safetensors").unlink()
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(outcome.folder / checkpoint)
    run(config, resume=True, console=QUIET)
    assert all(torch.equal(expected[name], found) for name, found in weights(outcome.folder).items())
    assert losses(outcome.folder) == logged
    with pytest.raises(ValueError, match="settings differ: train.optimizer: 'muon' -> 'adamw'"):
        run(with_train(config, optimizer="adamw"), resume=True, console=QUIET)


def test_an_autoregressive_checkpoint_is_a_plain_causal_model_that_redraft_reads_too(config):
    from transformers import AutoModelForCausalLM

    outcome = run(replace(config, objective=OBJECTIVES["ar"]), console=QUIET)
    plain = AutoModelForCausalLM.from_pretrained(outcome.folder)
    ids = torch.randint(5, 300, (2, 12))
    with torch.no_grad():
        causal = plain(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids[:, :6]).logits, causal[:, :6], atol=1e-5)
    ours = redraft.load(outcome.folder)
    assert torch.allclose(ours.logits(ids)[:, 1:], causal[:, :-1], atol=1e-4)
    greedy = plain.generate(ids[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[0, 12:]
    assert ours.generate(ids[0], max_new_tokens=6, stop=None).tokens[0].tolist() == greedy.tolist()
    converted = redraft.convert(outcome.folder, outcome.folder / "converted").settings
    assert (converted.process, converted.block_size, converted.shift_logits) == ("masked", None, False)


def test_targets_named_by_the_data_are_all_that_is_noised_and_counted(config):
    from redraft.likelihood.problem import NoiseKey

    _, trainer = built(config)
    dataset = trainer.train_dataset
    batch = trainer._collate([dataset[i] for i in range(4)])
    batch["is_target"] = torch.arange(32).expand(4, -1) >= 20
    _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(count) == 4 * 12
    key = NoiseKey(seed=0, step=0, rows=torch.arange(4), total_rows=4)
    for objective in OBJECTIVES.values():
        goal = objective.build(mask_token_id=4, vocab_size=300)
        total, rows = trainer.score(goal, batch, key)
        assert torch.isfinite(total)
        assert (rows > 0).any()
        nothing = batch | {"is_target": torch.zeros(4, 32, dtype=torch.bool)}
        assert trainer.score(goal, nothing, key)[0].item() == 0


def test_an_objective_of_ones_own_is_one_file(config, tmp_path, monkeypatch):
    """The file is the one in docs/training.md."""
    docs = (Path(__file__).parents[2] / "docs/training.md").read_text()
    code = docs.split("### Your own objective")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    (tmp_path / "focal.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ObjectiveConfig(kind="focal:Focal")
    plain = run(config, console=QUIET)
    outcome = run(replace(config, out=config.out + "-own", objective=own), console=QUIET)
    assert losses(outcome.folder)[0] < losses(plain.folder)[0]
    assert abs(outcome.validation.nats_per_token - plain.validation.nats_per_token) < 1  # reported as the same bound
    assert RunConfig.read(outcome.folder / "recipe.json").objective == own


@pytest.mark.slow
def test_a_run_killed_between_two_checkpoints_and_resumed_ends_bitwise_as_one_never_stopped(config):
    """With its average of the weights, which is killed before it takes up a step. Many more kills: test_alive.py."""
    torch.set_num_threads(1)
    config = with_train(config, max_steps=60, ema_decay=0.9)
    with launched(replace(config, out=config.out + "-whole")) as whole:
        finish(whole)
    with launched(config, program=("-c", KILLED_IN_STEP_35)) as killed:
        finish(killed, code=-signal.SIGKILL)
    assert (Path(config.out) / "checkpoint-34").exists()
    assert not (Path(config.out) / "model.safetensors").exists()
    with launched(config, flags=["--resume"]) as resumed:
        finish(resumed)
    expected, found = weights(config.out + "-whole"), weights(config.out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(config.out) == losses(config.out + "-whole")


@pytest.mark.slow
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
    assert again[-2]["eval_nats_per_token"] > 0  # at the checkpoint before, over 20 windows
    assert again[-1]["eval_nats_per_token"] == outcome.validation.nats_per_token
    assert 0 < outcome.validation.standard_error < outcome.validation.nats_per_token
    assert outcome.validation.bits_per_byte > 0
    repeated = run(replace(config, out=config.out + "-again"), console=QUIET)
    assert repeated.validation == outcome.validation


def test_resuming_does_not_warn_of_tied_weights(config, monkeypatch):
    told = []
    monkeypatch.setattr("transformers.trainer.logger.warning", told.append)
    run(config, console=QUIET)
    run(config, resume=True, console=QUIET)
    assert told == []


@pytest.mark.parametrize("train", [{}, {"precision": "bfloat16"}], ids=["float32", "bfloat16"])
def test_block_diffusion_in_pieces_trains_as_under_a_mask(config, train, tmp_path, monkeypatch):
    block = replace(
        config, data=replace(config.data, seq_len=256), objective=ObjectiveConfig(kind="block", block_size=8)
    )
    found = []
    for attention in ("mask", "auto"):
        choose = lambda model, _, way=attention, **more: choose_attention(model, way, **more)  # noqa: E731
        monkeypatch.setattr("redraft.training.trainer.choose_attention", choose)
        one = with_train(block, batch_size=2, max_steps=3, **train)
        run(replace(one, out=str(tmp_path / attention)), console=QUIET)
        found.append(losses(tmp_path / attention))
    assert found[0] == pytest.approx(found[1], abs=1e-4 if not train else 2e-2)
    under_a_mask, in_pieces = (weights(tmp_path / attention) for attention in ("mask", "auto"))
    assert any((in_pieces[name] != under_a_mask[name]).any() for name in in_pieces)  # another way: rounding shows


def test_a_finished_folder_holds_all_that_is_needed(config):
    outcome = run(config, console=QUIET)
    lm = redraft.load(outcome.folder)
    assert lm.generate("def ", max_new_tokens=4).texts is not None
    assert RunConfig.read(outcome.folder / "recipe.json") == config
    assert (outcome.folder / "loss.png").stat().st_size > 1000


def test_training_lowers_the_loss_and_averaged_weights_are_saved(config):
    outcome = run(with_train(config, max_steps=80, ema_decay=0.8), console=QUIET)
    assert losses(outcome.folder)[-1] < losses(outcome.folder)[0] - 1
    last = Path(outcome.folder) / "checkpoint-80"
    saved, averaged = weights(outcome.folder), load_file(last / "average.safetensors")
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    raw = load_file(last / "model.safetensors")
    assert any(not torch.equal(saved[name], raw[name]) for name in averaged)


@pytest.mark.parametrize(("minutes", "measured", "slow", "steps"), [(0.2, 3, 1, 7), (10, 8, 1, 9), (0.2, 3, 3, 4)])
def test_minutes_lower_the_number_of_steps(config, monkeypatch, minutes, measured, slow, steps):
    """A pass takes a second of this clock, `slow` seconds from the third step on (test_pace.py has the arithmetic)."""
    now, calls, compute_loss = [0.0], [], DiffusionTrainer.compute_loss

    def count(*args, **settings):
        calls.append(1)
        now[0] += slow if len(calls) > measured + 2 else 1
        return compute_loss(*args, **settings)

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", count)
    monkeypatch.setattr(DiffusionTrainer, "closing_seconds", 0.5)
    config = with_train(config, max_steps=9, max_minutes=minutes, save_every=1000)
    outcome = run(config, console=QUIET, clock=Clock(now=lambda: now[0]))
    assert outcome.steps == RunConfig.read(outcome.folder / "recipe.json").train.max_steps == steps
    assert len(calls) == measured + steps


def test_a_finished_run_is_trained_for_longer_and_a_stop_on_the_way_changes_nothing(config):
    folder = run(config, console=QUIET).folder
    longer = with_train(config, max_steps=12)
    assert run(longer, resume=True, console=QUIET).steps == 12
    weights = load_file(folder / "model.safetensors")
    rates = [line["learning_rate"] for line in read_log(folder / "log.jsonl") if "loss" in line]
    assert rates[6:] == rates[:6]  # the schedule again
    for step in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert run(longer, resume=True, console=QUIET).steps == 12
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for wrong in (config, with_train(longer, learning_rate=1.0)):
        with pytest.raises(ValueError, match="or for longer .* but these settings differ"):
            run(wrong, resume=True, console=QUIET)


def mistakes(config):
    data, train = config.data, config.train
    empty, binary = Path(config.out).parent / "empty.txt", Path(config.out).parent / "binary.txt"
    empty.touch()
    binary.write_bytes(b"\0\1\2")
    return {
        "the corpus fills": replace(config, train=replace(train, batch_size=5000)),
        "fills no window of seq_len=2000": replace(config, data=replace(data, seq_len=2000)),
        "holds no text": replace(config, data=replace(data, source=str(empty))),
        "binary": replace(config, data=replace(data, source=str(binary))),
        "no/such/file": replace(config, data=replace(data, source="no/such/file.txt")),
    }


@pytest.mark.parametrize(
    "message", ["the corpus fills", "fills no window of seq_len=2000", "holds no text", "binary", "no/such/file"]
)
def test_a_corpus_that_cannot_be_used_is_told_before_anything_is_written(config, message):
    case = next(case for key, case in mistakes(config).items() if key.startswith(message))
    with pytest.raises(ValueError, match=message):
        run(case, console=QUIET)
    assert not Path(config.out).exists()


def test_a_run_without_held_out_documents_trains_and_saves(config):
    outcome = run(replace(config, data=replace(config.data, validation_fraction=0)), console=QUIET)
    assert outcome.validation is None
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
    with pytest.raises(ValueError, match="holds a run. Continue it with --resume"):
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
        (TrainConfig, {"learning_rate": math.inf}, "learning_rate must be a finite number; got inf"),
        (TrainConfig, {"max_minutes": math.inf}, "max_minutes must be a finite number; got inf"),
        (TrainConfig, {"epochs": math.inf}, "epochs must be a finite number; got inf"),
        (TrainConfig, {"weight_decay": -1.0}, "weight_decay must be at least 0; got -1.0"),
        (TrainConfig, {"epochs": 2.0, "max_steps": 9}, "epochs 2 sets the number of steps; got train.max_steps 9"),
        (TrainConfig, {"beta_2": 1.5}, r"beta_2 must lie in \[0, 1\); got 1.5"),
        (TrainConfig, {"seed": -1}, "seed must lie in .*; got -1"),
        (ModelConfig, {"dropout": 1.5}, r"model.dropout must lie in \[0, 1\); got 1.5"),
        (AdapterConfig, {"alpha": math.inf}, "adapter.alpha must be a finite number; got inf"),
        (ObjectiveConfig, {"beta": math.inf}, "beta must be a finite number; got inf"),
        (ObjectiveConfig, {"complementary": True, "t_min": 0.5}, r"must be symmetric about 0.5; got 0.5, 1.0"),
        (RunConfig, {"out": ""}, "out must name the folder of the run"),
        (
            RunConfig,
            {"objective": ObjectiveConfig(kind="block", block_size=64), "data": DataConfig(seq_len=32)},
            "block_size must not exceed data.seq_len; got 64 and 32",
        ),
        (TrainConfig, {"warmup": 1.5}, r"warmup must lie in \[0, 1\); got 1.5"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must lie in"),
        (DataConfig, {"seq_len": 1}, "seq_len must lie in .2, 1048576.; got 1"),
        (ObjectiveConfig, {"kind": "blok"}, "unknown objective.kind 'blok'.*Did you mean 'block'"),
        (ObjectiveConfig, {"kind": "block"}, "block_size goes with kind block; got None, block. Set it, e.g. to 16"),
        (ObjectiveConfig, {"context": "causal"}, "context causal is for kind block; got kind masked. Use --obj"),
        (
            ObjectiveConfig,
            {"kind": "block", "block_size": 4, "within": "causal"},
            "within causal needs a causal context",
        ),
        (ObjectiveConfig, {"grow_steps": 4}, "grow_steps needs a smallest_block to grow from; got none. Set it"),
        (ObjectiveConfig, {"ar_weight": 0.2}, "ar_weight needs a causal context; got block. Use --objective.context"),
        (ObjectiveConfig, {"kind": "uniform", "plain": True}, "plain is for kinds masked and block, without cart; got"),
        (ObjectiveConfig, {"cart": 0.1, "plain": True}, "plain is for kinds masked and block, without cart; got"),
        (ObjectiveConfig, {"t_min": 0.5, "t_max": 0.4}, "must satisfy 0 <= t_min <= t_max <= 1 and 0 < t_max; got"),
        (ObjectiveConfig, {"block_size": 4}, "block_size goes with kind block; got 4, masked. Use --objective.kind"),
        (ObjectiveConfig, {"kind": "block", "block_size": 0}, r"block_size must lie in \[1, 1048576\]; got 0"),
        (ObjectiveConfig, {"kind": "uniform", "complementary": True}, "complementary needs masked noise.*got uniform"),
        (ObjectiveConfig, {"schedule": "cosine", "complementary": True}, "the linear schedule; got masked, cosine"),
        (ObjectiveConfig, {"kind": "ar", "cart": 0.1}, "cart is for kind masked; got kind ar"),
        (ObjectiveConfig, {"cart": 0.0}, r"cart must lie in \(0, 1\]; got 0.0"),
        (ObjectiveConfig, {"kind": "no_such_module:Own"}, "no_such_module:Own cannot be imported.*PYTHONPATH"),
        (ObjectiveConfig, {"kind": "redraft.layouts:Layout"}, "not an objective: it has no problem and no evaluation"),
        (
            RunConfig,
            {"objective": ObjectiveConfig(kind="ar"), "model": ModelConfig(architecture="modernbert")},
            "objective.kind ar needs a decoder; got model.architecture modernbert",
        ),
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


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "seq_len", "many"), ("train", "max_steps", 1.5), ("train", "warmup", True), ("train", "epochs", "2"),
        ("train", "decay", "cos"), ("train", "seed", [1]), ("data", "source", None),
    ],
)  # fmt: skip
def test_a_recipe_file_with_a_value_of_another_type_is_told(tmp_path, section, name, value):
    (tmp_path / "recipe.json").write_text(json.dumps({section: {name: value}}))
    with pytest.raises(ValueError, match=f"recipe.json: {section}: {name} must be .*; got"):
        RunConfig.read(tmp_path / "recipe.json")


def test_every_recipe_is_read_back_as_it_was_written(tmp_path):
    for make in RECIPES.values():
        recipe = make()
        recipe.save(tmp_path)
        assert type(recipe).read(tmp_path / "recipe.json") == recipe


def test_a_mixture_of_experts_resumes_bitwise_though_its_file_names_experts_one_by_one(config, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from redraft.models.settings import DiffusionSettings

    tokenizer = prepare(config.data).tokenizer
    shape = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16, head_dim=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    shape.is_causal = False
    DiffusionSettings(mask_token_id=tokenizer.mask_token_id).save_to(shape)
    Qwen3MoeForCausalLM(shape).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = replace(with_train(config, max_steps=4), model=ModelConfig(start=str(tmp_path / "start")))
    whole = run(config, console=QUIET)
    expected = weights(whole.folder)
    assert any(".experts.3." in name for name in expected)
    resumed = replace(config, out=str(tmp_path / "resumed"))
    shutil.copytree(whole.folder, resumed.out)
    (tmp_path / "resumed" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run(resumed, resume=True, console=QUIET)
    assert_close(weights(resumed.out), expected, 0.0)


def test_a_checkpoint_without_all_weights_is_refused(config):
    out = run(with_train(config, max_steps=2), console=QUIET).folder
    checkpoint = out / "checkpoint-2"
    kept = weights(checkpoint)
    kept.pop("model.norm.weight")
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_hashes(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-2: 1 missing weights: model.norm.weight"):
        run(with_train(config, max_steps=2), resume=True, console=QUIET)
