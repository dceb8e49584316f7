"""Token models of thoughts, from their recipe to their solve rate on held-out prompts."""

import json

import pytest

from redraft.cli import _dispatch


@pytest.fixture(scope="module")
def swaps(tmp_path_factory):
    """Swap two words, by way of naming them: what a tiny model learns in seconds."""
    path = tmp_path_factory.mktemp("swaps") / "swaps.jsonl"
    words = ["red", "blue", "green", "black", "white", "pink", "grey", "brown", "gold", "rose"]
    rows = [
        {"prompt": f"{a} {b}", "blocks": [f"last {b}", f"first {a}"], "answer": f"{b} {a}"}
        for a in words
        for b in words
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "form", "steps"),
    [
        ("thought-ar", "", 150),
        ("thought-ar", ":pause:padded", 200),
        ("thought-masked", ":direct", 400),
    ],
)
def test_a_model_learns_a_task_and_is_judged_on_held_out_prompts(swaps, tmp_path, capsys, recipe, form, steps):
    out, source = tmp_path / "run", f"{swaps}{form}"
    size = "--model.size 1m,heads=4,intermediate=512,hidden=64,layers=2"
    train = "--train.batch-size 32 --train.learning-rate 5e-3 --train.ema-decay 0.9"
    train = f"--data.source {source} {size} {train} --train.max-steps {steps}"
    assert _dispatch(["train", recipe, "--out", str(out), *train.split()]) == 0
    said = "".join(capsys.readouterr().out.split())
    command = f"redraft eval {out} --tasks thought:{source} --batch-size 100 --out {out}/eval"
    assert "".join(command.split()) in said
    assert _dispatch([*command.split()[1:], "--device", "cpu"]) == 0
    results = json.loads((out / "eval/results.json").read_text())
    assert results["tasks"][0]["scores"]["solved"]["mean"] >= 0.8


def test_a_run_goes_on_with_the_examples_it_was_begun_on_alone(swaps, tmp_path, capsys):
    own, out = tmp_path / "own.jsonl", tmp_path / "run"
    own.write_text(swaps.read_text())
    size = "--model.size 1m,heads=4,intermediate=512,hidden=64,layers=1 --train.batch-size 32 --train.max-steps 2"
    command = ["train", "thought-ar", "--out", str(out), "--data.source", str(own), *size.split()]
    assert _dispatch(command) == 0
    own.write_text(swaps.read_text().replace("pink", "plum"))
    capsys.readouterr()
    assert _dispatch([*command, "--resume"]) == 2
    assert "was trained with hash of the examples" in " ".join(capsys.readouterr().err.split())


def test_too_few_rows_for_a_step_advise_a_smaller_batch_or_more_examples(swaps, tmp_path, capsys):
    command = f"train thought-ar --out {tmp_path / 'run'} --data.source {swaps} --train.batch-size 200"
    assert _dispatch(command.split()) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "rows, fewer than the 200 of one step (batch_size x accumulation). Lower --train.batch-size" in told


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("thought:countdow", "unknown task 'countdow'"),
        ("thought:countdown:pauses", "unknown task 'countdown:pauses'"),
        ("thought:gone.jsonl", "there is no file gone.jsonl"),
    ],
)
def test_names_that_mean_no_task_are_one_line(task, message, tmp_path, capsys):
    assert _dispatch(["eval", "nowhere", "--tasks", task, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
