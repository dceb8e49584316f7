"""Two processes evaluate what one does; one that dies ends the job with a line, and its work is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_harness import TASKS, numbers
from test_harness import task_folder as task_folder

from redraft.cli.eval import main as run_eval

COSTS = ("items", "tokens", "continuations", "likelihood_forwards", "generation_forwards", "standard_errors")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """Offline tasks of an odd number of items."""
    folder = tmp_path_factory.mktemp("own")
    choices = [{"prompt": f"is it {i} ", "choices": ["yes and", "no but", "so"], "answer": 1} for i in range(2)]
    items = [*choices, *({"prompt": f"say {i}", "answer": "x"} for i in range(5))]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "text.md").write_text("some words of a text\n" * 3)
    return [str(folder / "mixed.jsonl"), f"perplexity:{folder / 'text.md'}"]


def arguments(model, tasks, out, *more):
    settings = ["--likelihood.num-samples", "8", "--steps", "3", "--max-new-tokens", "6", "--batch-size", "2"]
    return [str(model), "--tasks", *tasks, "--out", str(out), *settings, *map(str, more)]


def launch(*command):
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for dying_eval
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": here}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


def records(out, task="mixed"):
    """All records of a task by id; one that was computed twice is an error."""
    lines = [line for path in sorted(Path(out).glob(f"{task}.*.jsonl")) for line in path.read_text().splitlines()]
    found = {record["id"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def assert_same(found, expected):
    """Equal texts, scores and costs; likelihoods within the rounding of other batches."""
    assert found.keys() == expected.keys()
    for key, record in found.items():
        other = expected[key]
        assert record.keys() == other.keys()
        for name in record.keys() - {"seconds", "nats", "standard_error", "standard_errors", "scores"}:
            assert record[name] == other[name]
        assert record["scores"] == pytest.approx(other["scores"], abs=1e-5)
        if "nats" in record:
            assert record["nats"] == pytest.approx(other["nats"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_scores_records_and_costs_of_one(model_folder, task_folder, own_tasks, tmp_path):
    more = ("--include-path", task_folder)
    assert run_eval(arguments(model_folder, [*own_tasks, *TASKS], tmp_path / "one", *more)) == 0
    command = arguments(model_folder, [*own_tasks, *TASKS], tmp_path / "two", *more, "--processes", 2)
    done = launch("-m", "redraft.cli", "eval", *command)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "two").glob("mixed.*.jsonl"))) == 2
    assert_same(records(tmp_path / "two"), records(tmp_path / "one"))
    one, two = (json.loads((tmp_path / name / "harness.json").read_text()) for name in ("one", "two"))
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-5)
    for task in TASKS:
        spent = [{name: run["redraft"][task].get(name, 0) for name in COSTS} for run in (one, two)]
        assert spent[1] == pytest.approx(spent[0], rel=1e-4)
        assert records(tmp_path / "two", task).keys() == records(tmp_path / "one", task).keys()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_with_a_line_and_a_rerun_repeats_nothing(
    model_folder, own_tasks, tmp_path, capsys
):
    command = arguments(model_folder, own_tasks[:1], tmp_path / "out")
    done = launch(Path(__file__).with_name("dying_eval.py"), *command)
    assert done.returncode == 128 + 9
    (line,) = done.stderr.splitlines()
    assert "process 1 of 2" in line
    assert "was killed by SIGKILL" in line
    assert f"The same command continues from the items in {tmp_path / 'out'}" in line
    before = {path: path.read_text() for path in (tmp_path / "out").glob("mixed.*.jsonl")}
    finished = records(tmp_path / "out")
    assert 0 < len(finished) < 7
    assert run_eval(command) == 0
    assert all(path.read_text().startswith(text) for path, text in before.items())
    assert run_eval(arguments(model_folder, own_tasks[:1], tmp_path / "whole")) == 0
    assert_same(records(tmp_path / "out"), records(tmp_path / "whole"))
    capsys.readouterr()


def test_an_interrupted_harness_task_computes_no_answer_twice(model_folder, task_folder, tmp_path, monkeypatch):
    from redraft.language_model import LanguageModel

    generate, prompts, dies_after = LanguageModel.generate, [], 1

    def counted(self, rows, **settings):
        if len(prompts) // 2 == dies_after:
            raise KeyboardInterrupt
        prompts.extend(self.decode(row) for row in rows)
        return generate(self, rows, **settings)

    monkeypatch.setattr(LanguageModel, "generate", counted)
    command = arguments(model_folder, ["toy_generate"], tmp_path / "out", "--include-path", task_folder)
    with pytest.raises(KeyboardInterrupt):
        run_eval(command)
    dies_after = None
    assert run_eval(command) == 0
    assert len(prompts) == len(set(prompts)) == 5


def test_a_number_of_processes_that_is_none_is_refused(model_folder):
    with pytest.raises(ValueError, match="processes must lie in .*; got 0"):
        run_eval([str(model_folder), "--tasks", "countdown", "--processes", "0"])
