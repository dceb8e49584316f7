"""Preferences in the loop of all trainings: the start is the reference, and the split of a batch changes nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import QUIET, assert_close, gradient_norms, losses, weights, with_train
from test_trainer import cache as cache
from test_trainer import config as config
from test_trainer import corpus as corpus

import redraft
from redraft.cli.train import main
from redraft.data.prepare import build_data, prepare
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.training.callbacks import read_log
from redraft.training.config import ObjectiveConfig
from redraft.training.run import run

KINDS = {
    "masked": ObjectiveConfig(num_samples=2),
    "block": ObjectiveConfig(kind="block", block_size=8, num_samples=2),
    "uniform": ObjectiveConfig(kind="uniform", num_samples=2),
    "ar": ObjectiveConfig(kind="ar", num_samples=1),
}


@pytest.fixture
def pairs(config, tmp_path):
    """A run on pairs in which the better answer is always the loud one."""
    rows = [{"prompt": f"{i}?", "chosen": f"YES {i % 7} !", "rejected": f"no {i % 5}"} for i in range(60)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(config.data, kind="preference", source=str(source), seq_len=64, vocab_size=270)
    return with_train(replace(config, data=data, objective=KINDS["masked"]), batch_size=4)


def lines(folder, name):
    return [line[name] for line in read_log(Path(folder) / "log.jsonl") if name in line]


@pytest.mark.parametrize(
    "objective", [pytest.param(KINDS[k], id=k, marks=[] if k == "masked" else pytest.mark.slow) for k in KINDS]
)
def test_a_run_starts_at_its_reference_and_four_pairs_at_once_equal_one_pair_four_times(pairs, objective):
    pairs = with_train(replace(pairs, objective=objective), max_steps=3)
    whole = run(pairs, console=QUIET)
    assert losses(whole.folder)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert lines(whole.folder, "margin")[0] == pytest.approx(0, abs=1e-3)
    split = run(with_train(replace(pairs, out=pairs.out + "-split"), batch_size=1, accumulation=4), console=QUIET)
    assert losses(whole.folder) == pytest.approx(losses(split.folder), abs=1e-4)
    assert gradient_norms(whole.folder) == pytest.approx(gradient_norms(split.folder), rel=1e-3)
    assert_close(weights(whole.folder), weights(split.folder), 1e-4)


@pytest.mark.slow
def test_preferences_are_learnt_and_hold_for_prompts_not_seen(pairs):
    out = run(with_train(pairs, max_steps=40, learning_rate=3e-3), console=QUIET).folder
    assert lines(out, "accuracy")[-1] == 1.0
    assert lines(out, "eval_accuracy")[-1] > 0.9
    assert lines(out, "eval_loss")[-1] < 0.5
    assert lines(out, "eval_margin")[-1] > 3
    assert (out / "loss.png").exists()
    redraft.load(out, device="cpu").generate("1?", max_new_tokens=4, steps=2)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_reference_it_began_with(pairs, tmp_path):
    start = run(with_train(replace(pairs, out=str(tmp_path / "start")), max_steps=2), console=QUIET).folder
    pairs = replace(pairs, model=ModelConfig(start=str(start)))
    pairs = replace(pairs, out=str(tmp_path / "whole"))
    whole = run(with_train(pairs, max_steps=4), console=QUIET).folder
    assert losses(whole)[0] == pytest.approx(math.log(2), abs=1e-5)  # the start is the reference, not random weights
    assert losses(whole)[-1] != pytest.approx(math.log(2), abs=1e-3)
    for name in ("model.safetensors", "config.json"):
        (whole / name).rename(whole / f"{name}.done")
    for folder in whole.glob("checkpoint-4"):
        folder.rename(tmp_path / "last")
    run(with_train(pairs, max_steps=4), resume=True, console=QUIET)
    done = torch.load(tmp_path / "last/optimizer.pt")["state"]
    again = torch.load(whole / "checkpoint-4/optimizer.pt")["state"]
    assert all(torch.equal(done[i]["exp_avg"], again[i]["exp_avg"]) for i in done)


@pytest.mark.slow
def test_an_adapter_is_its_own_reference_while_it_is_switched_off(pairs, tmp_path):
    start = run(with_train(replace(pairs, out=str(tmp_path / "start")), max_steps=1), console=QUIET).folder
    model, adapter = ModelConfig(start=str(start)), AdapterConfig(rank=4, targets="all-linear")
    tuned = with_train(replace(pairs, model=model, adapter=adapter), max_steps=30, learning_rate=1e-2)
    out = run(tuned, console=QUIET).folder
    assert losses(out)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert lines(out, "eval_accuracy")[-1] > 0.9
    assert losses(out)[-1] < 0.67


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective.beta", "0"], "objective.beta must be positive and finite; got 0.0"),
        (["--objective.num-samples", "0"], r"objective.num_samples must lie in \[1, 1048576\]; got 0"),
        (["--data.streaming"], "preference pairs are not streamed"),
        (["--data.source", "same"], "line 2.*chosen and rejected are the same answer"),
        (["--train.batch-size", "200"], "the corpus fills .* rows, fewer than the 200 of one step"),
        (["--data.seq-len", "4"], "fills no window of seq_len=4: .* conversations too long"),
    ],
)
def test_bad_preferences_are_one_clear_line(pairs, flags, message, tmp_path):
    same = tmp_path / "same.jsonl"
    same.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    )
    flags = [str(same) if flag == "same" else flag for flag in flags]
    own = ["--data.kind", "preference", "--data.source", pairs.data.source]
    with pytest.raises(ValueError, match=message):
        main(["stdlib-tiny", *own, "--data.vocab-size", "270", "--out", str(tmp_path / "bad"), *flags])
    assert not (tmp_path / "bad").exists()


def test_pairs_can_be_built(pairs, tmp_path):
    build_data(pairs.data, tmp_path / "built")
    built, read = prepare(replace(pairs.data, source=str(tmp_path / "built"))), prepare(pairs.data)
    for name in ("chosen", "rejected"):
        assert torch.equal(built.train[3][name]["input_ids"], read.train[3][name]["input_ids"])
