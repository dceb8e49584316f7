import json

import pytest

from redraft.cli.eval import main as run_eval
from redraft.evaluation.report import compare, plot_frontier, provenance, to_markdown
from redraft.evaluation.run import Store, summarize
from redraft.evaluation.suites import find_suite
from redraft.likelihood.config import LikelihoodConfig
from redraft.sampling.config import SamplingConfig


def write_run(folder, scores):
    store = Store(folder=folder)
    store.open({})
    for i, score in enumerate(scores):
        store.add("puzzles", {"id": str(i), "scores": {"exact": score}, "forwards": 2, "seconds": 0.1})


def test_a_paired_test_finds_a_small_steady_gain_and_no_gain_in_noise(tmp_path):
    base = [i % 2 * 1.0 for i in range(40)]
    write_run(tmp_path / "a", base)
    write_run(tmp_path / "b", [score + 0.1 for score in base])
    write_run(tmp_path / "c", base[::-1])
    (gain,) = compare(tmp_path / "a", tmp_path / "b")
    assert gain.is_clear
    assert gain.difference.mean == pytest.approx(0.1)
    (noise,) = compare(tmp_path / "a", tmp_path / "c")
    assert not noise.is_clear
    assert str(noise).startswith("puzzles exact: 0.5 -> 0.5, +0 [")
    assert "over 40 items: no clear difference" in str(noise)


def test_runs_without_results_or_without_common_items_are_refused(tmp_path):
    write_run(tmp_path / "a", [1.0])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="holds no results"):
        compare(tmp_path / "a", tmp_path / "b")
    Store(folder=tmp_path / "b").add("other", {"id": "0", "scores": {}})
    with pytest.raises(ValueError, match="no item in common"):
        compare(tmp_path / "a", tmp_path / "b")


def test_an_evaluation_of_nothing_has_no_score():
    with pytest.raises(ValueError, match="no item was scored"):
        summarize("puzzles", [])


def test_redraft_eval_runs_reports_and_goes_on_where_it_stopped(model_folder, tmp_path, capsys):
    items = [{"prompt": f"say {i}", "answer": "x"} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "text.md").write_text("some words\n" * 5)
    out = tmp_path / "out"
    command = [str(model_folder), "--tasks", str(tmp_path / "own.jsonl"), f"perplexity:{tmp_path / 'text.md'}"]
    command += ["--max-new-tokens", "4", "--steps", "2", "--likelihood.num-samples", "8", "--out", str(out)]
    assert run_eval(command) == 0
    assert "own | exact" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    source = results["provenance"]
    assert {"command", "commit", "versions", "seeds"} <= source.keys()
    assert source["versions"]["torch"]
    for text in ((out / "report.md").read_text(), to_markdown([], source)):
        assert source["command"] in text
        assert f"torch {source['versions']['torch']}" in text
        assert "Seeds: sampling 0, masks 0" in text
    assert (out / "calibration.png").stat().st_size > 5000
    assert "own: calibration error of the model's confidence" in (out / "report.md").read_text()
    before = (out / "own.0.jsonl").read_text()
    assert run_eval(command) == 0
    assert (out / "own.0.jsonl").read_text() == before
    with pytest.raises(ValueError, match="results of other settings"):
        run_eval([*command, "--seed", "1"])
    plot_frontier(tmp_path / "frontier.png", [out], provenance({"bootstrap": 0}))
    assert (tmp_path / "frontier.png").exists()


def test_a_sweep_evaluates_each_number_of_steps_and_draws_them(model_folder, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "say", "answer": "x"}) + "\n")
    command = [str(model_folder), "--tasks", str(tmp_path / "own.jsonl"), "--max-new-tokens", "4"]
    command += ["--out", str(tmp_path / "out"), "--sweep-steps", "1", "4"]
    assert run_eval(command) == 0
    results = [json.loads((tmp_path / f"out/steps-{n}/results.json").read_text()) for n in (1, 4)]
    assert [one["tasks"][0]["forwards_per_item"] for one in results] == [1, 4]
    assert (tmp_path / "out/steps.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="--sweep-steps chooses the steps; got --steps"):
        run_eval([*command, "--steps", "2"])
    with pytest.raises(ValueError, match="sweep_steps must lie in .*; got 0"):
        run_eval([*command[:-1], "0"])
    with pytest.raises(ValueError, match="batch_size must lie in .*; got 0"):
        run_eval([*command, "--batch-size", "0"])


def test_eval_without_a_task_says_what_there_is(model_folder):
    with pytest.raises(ValueError, match="--tasks countdown"):
        run_eval([str(model_folder)])


SUITES = ["llada-instruct", "llada-base", "dream-instruct", "tiny-a2d-mdlm", "tiny-a2d-bd3lm", "bert-chat"]


@pytest.mark.parametrize("name", SUITES)
def test_the_settings_of_every_suite_are_settings_of_ours(name):
    for task in find_suite(name):
        assert "not reproducible offline" in task.note
        sampling = {k: v for k, v in task.settings.items() if k in SamplingConfig.setting_names()}
        likelihood = {k: v for k, v in task.settings.items() if k in LikelihoodConfig.setting_names()}
        assert {**sampling, **likelihood} == task.settings
        SamplingConfig(**sampling)
        LikelihoodConfig(**likelihood)


def test_an_unknown_suite_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown suite 'llada-instuct'.*Did you mean 'llada-instruct'"):
        find_suite("llada-instuct")
