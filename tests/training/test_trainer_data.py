"""What training does with conversations, rows of unequal length and endless streams."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from redraft.data.config import ChatConfig, DataConfig
from redraft.data.prepare import prepare
from redraft.data.tokenizer import train_tokenizer
from redraft.likelihood.problem import NoiseKey
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.training.callbacks import read_log
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run
from redraft.training.trainer import DiffusionTrainer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    records = [{"prompt": f"count to {i}", "response": " ".join(map(str, range(i % 17 + 1)))} for i in range(150)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def config(conversations, tmp_path):
    return RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(
            source=str(conversations), kind="chat", seq_len=64, vocab_size=270, validation_fraction=0.2,
        ),
        model=ModelConfig(size="hidden=32,layers=2,heads=2,intermediate=64"),
        train=TrainConfig(
            batch_size=4, max_steps=12, save_every=4, max_validation_windows=8, precision="float32", compile="off",
            learning_rate=1e-2, max_checkpoints=10,
        ),
    )  # fmt: skip


def build(config):
    data = prepare(config.data)
    torch.manual_seed(0)
    settings = config.objective.settings(data.tokenizer.mask_token_id)
    model = build_model(config.model, settings, tokenizer=data.tokenizer)
    return DiffusionTrainer(config, data, Denoiser(model, settings))


def first_batch(trainer):
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))


def loss_of(trainer, batch, **changes):
    """The loss of a batch in nats, changed or not, under one fixed noise."""
    key = NoiseKey(seed=0, step=0, rows=batch["row"], total_rows=len(batch["row"]))
    return trainer.score(trainer.objective, batch | changes, key)[0]


KINDS = {"masked": None, "uniform": None, "block": 4, "ar": None}
every_kind = pytest.mark.parametrize(
    "objective", [ObjectiveConfig(kind=kind, block_size=size) for kind, size in KINDS.items()], ids=KINDS
)


@every_kind
def test_only_targets_are_noised_counted_and_learnt(config, objective):
    trainer = build(replace(config, objective=objective))
    [batch], count = first_batch(trainer)
    assert count == batch["is_target"].sum() < (batch["segment_ids"] > 0).sum()
    assert loss_of(trainer, batch) > 0
    assert loss_of(trainer, batch, is_target=torch.zeros_like(batch["is_target"])) == 0


@every_kind
def test_packed_conversations_are_blind_to_each_other(config, objective):
    trainer = build(replace(config, objective=objective))
    [batch], _ = first_batch(trainer)
    assert batch["segment_ids"].max() > 1
    alone = batch["is_target"] & (batch["segment_ids"] == 1)
    changed = (batch["input_ids"] + (batch["segment_ids"] == 2)) % 270
    before = loss_of(trainer, batch, is_target=alone)
    assert loss_of(trainer, batch, is_target=alone, input_ids=changed) == before > 0
    changed = (batch["input_ids"] + (batch["segment_ids"] == 1)) % 270
    assert loss_of(trainer, batch, is_target=alone, input_ids=changed) != before


@every_kind
def test_documents_of_a_window_see_each_other_unless_they_are_kept_apart(config, objective, tmp_path):
    texts = [{"text": f"{i} ba lo mi"} for i in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    data = replace(config.data, source=str(tmp_path / "text.jsonl"), kind="text", vocab_size=262)
    for is_apart in (True, False):
        trainer = build(replace(config, objective=objective, data=replace(data, isolate_documents=is_apart)))
        [batch], _ = first_batch(trainer)
        second = batch["segment_ids"] == 2
        assert second.any()
        before = loss_of(trainer, batch, is_target=second)
        changed = batch["input_ids"].where(batch["segment_ids"] != 1, (batch["input_ids"] + 1) % 262)
        assert (loss_of(trainer, batch, is_target=second, input_ids=changed) == before) == is_apart
        if is_apart:  # positions begin anew in each
            alone = torch.where(second, batch["segment_ids"], 0)
            assert torch.isclose(loss_of(trainer, batch, is_target=second, segment_ids=alone), before, rtol=1e-5)


def resumed_equals_whole(config, *, at):
    """Run whole; then again from the checkpoint of step `at`, as if killed right after it."""
    torch.set_num_threads(1)
    whole = run(config, console=QUIET)
    again = Path(config.out + "-again")
    shutil.copytree(whole.folder, again)
    for path in again.iterdir():
        if path.name in ("model.safetensors", "loss.png") or (
            path.name.startswith("checkpoint-") and int(path.name.partition("-")[2]) > at
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(replace(config, out=str(again)), resume=True, console=QUIET)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole.folder, again))
    logs = [[line["loss"] for line in read_log(f / "log.jsonl") if "loss" in line] for f in (whole.folder, again)]
    return all(torch.equal(expected[name], found[name]) for name in expected) and logs[0] == logs[1]


@pytest.mark.parametrize("batching", [pytest.param("packed", marks=pytest.mark.slow), "grouped"])
def test_a_chat_run_learns_logs_its_efficiency_and_resumes_exactly_in_a_later_pass(config, batching):
    steps = 36 if batching == "packed" else 48
    data = replace(config.data, chat=ChatConfig(batching=batching, loss_on="all"))
    train = replace(config.train, max_steps=steps, save_every=steps // 3)
    config = replace(config, data=data, train=train)
    rows = len(prepare(data).train)
    assert rows // 4 < steps * 2 // 3, "the checkpoint is in the second pass or later"
    assert resumed_equals_whole(config, at=steps * 2 // 3)
    log = [line for line in read_log(Path(config.out) / "log.jsonl") if "loss" in line]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(0.6 < line["efficiency"] <= 1 for line in log)
    saved = (Path(config.out) / "chat_template.jinja").read_text()
    assert "Assistant:" in saved


def test_a_stream_is_resumed_exactly_in_a_later_pass(config, tmp_path):
    corpus = tmp_path / "text.jsonl"
    texts = [f"{i} " * (i % 9 + 3) for i in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=262).save_pretrained(tmp_path / "tokenizer")
    data = DataConfig(
        source=str(corpus), seq_len=32, streaming=True, tokenizer=str(tmp_path / "tokenizer"),
        validation_fraction=0.2,
    )  # fmt: skip
    assert len(list(prepare(data).train)) < 4 * 8, "the checkpoint of step 8 is in the second pass or later"
    assert resumed_equals_whole(replace(config, data=data), at=8)


def test_windows_of_random_length_are_padding_to_the_model(config, tmp_path):
    data = replace(config.data, source="stdlib", kind="text", max_documents=8, random_length=0.5, vocab_size=300)
    trainer = build(replace(config, data=data))
    [batch], count = first_batch(trainer)
    assert count == (batch["segment_ids"] > 0).sum() < batch["input_ids"].numel()
    assert trainer.speed()["efficiency"] == pytest.approx(int(count) / batch["input_ids"].numel(), abs=1e-4)
    changed = batch["input_ids"].where(batch["segment_ids"] > 0, 7)
    assert loss_of(trainer, batch, input_ids=changed) == loss_of(trainer, batch) > 0
