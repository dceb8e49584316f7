"""The harness, offline, on tasks from local files: our entry and its own give the same numbers."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sentence_pieces import KINDS, Script, scripted, text_lm_of

TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_generate": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"the number {i} is", "choices": [" odd one", " even it"], "answer": i % 2, "gold": "x"}
        for i in range(5)
    ]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in TASKS.items():
        data = {"data_files": {"test": str(folder / "toy.jsonl")}}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **settings}))
    return folder


def run(*arguments, cwd):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cwd / "datasets"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture(scope="session")
def own_entry(model_folder, task_folder, tmp_path_factory):
    """Results of the harness' own command line."""
    folder = tmp_path_factory.mktemp("own")
    done = run(
        "redraft.evaluation.harness", "run", "--model", "redraft",
        "--model_args", f"pretrained={model_folder},num_samples=8,steps=3",
        "--include_path", task_folder, "--tasks", ",".join(TASKS), "--output_path", folder / "out", "--seed", "0",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(next(folder.glob("out/**/results_*.json")).read_text())


def numbers(results):
    return {
        (task, name): value
        for task, scores in results["results"].items()
        for name, value in scores.items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.mark.slow
def test_redraft_eval_and_the_harness_own_entry_give_the_same_numbers(own_entry, model_folder, task_folder, tmp_path):
    done = run(
        "redraft.cli", "eval", model_folder, "--tasks", *TASKS, "--include-path", task_folder,
        "--likelihood.num-samples", "8", "--steps", "3", "--out", tmp_path / "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert numbers(ours) == numbers(own_entry)
    assert len(numbers(ours)) >= 5
    spent = ours["redraft"]
    assert 0 < spent["toy_generate"]["generation_forwards"] <= spent["toy_generate"]["tokens"]
    assert spent["toy_choice"]["seconds"] > 0
    assert spent["toy_choice"]["standard_errors"] > 0
    assert "toy_choice" in (tmp_path / "out" / "report.md").read_text()


def test_an_unknown_task_is_refused_with_a_suggestion(monkeypatch, task_folder):
    from lm_eval.tasks import TaskManager

    from redraft.cli.eval import EvalFlags, _task_manager

    small = TaskManager(include_path=str(task_folder), include_defaults=False)  # the index of all takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: small)
    with pytest.raises(ValueError, match="unknown task 'toy_choise'. Did you mean 'toy_choice'"):
        _task_manager(EvalFlags(model="m", tasks=("toy_choise",)), ["toy_choise"])


def instance(context, second, number=0):
    return SimpleNamespace(args=(context, second), task_name="t", doc_id=number, repeats=2)


@pytest.fixture
def adapter(text_lm):
    from redraft.evaluation.harness import RedraftLM

    return RedraftLM(lm=text_lm, num_samples=8, steps=4)


def test_choices_share_their_noise_and_batches_change_nothing(adapter):
    requests = [instance("who", " me and you", 0), instance("who", " you and me", 0), instance("what", " is it", 1)]
    together = adapter.loglikelihood(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in together] == [False] * 3
    adapter.batch_size = 1
    alone = adapter.loglikelihood(requests[::-1], disable_tqdm=True)[::-1]
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in together], abs=1e-4)
    twice = adapter.loglikelihood([requests[0], requests[0]], disable_tqdm=True)
    assert twice[0] == twice[1]


def test_greedy_exact_match_is_what_greedy_decoding_gives(adapter, text_lm):
    adapter.exact_match = True
    text = text_lm.generate("who is", max_new_tokens=5, steps=5, stop=None)
    request = adapter._request(instance("who is", "xxxxx"))
    from dataclasses import replace

    assert adapter._is_greedy(replace(request, continuation=text.tokens[0]))
    assert not adapter._is_greedy(replace(request, continuation=text.tokens[0].flip(0) + 1))


def test_generation_settings_of_a_task_are_honoured_unless_the_user_says_otherwise(adapter):
    config = adapter._sampling_of({"max_gen_toks": 8, "temperature": 0.5}, ["\n"], times_before=2)
    assert config == {"max_new_tokens": 8, "temperature": 0.5, "steps": 4, "stop": ("\n",), "seed": 2}
    greedy = adapter._sampling_of({"temperature": 0.5, "do_sample": False}, [], times_before=0)
    assert greedy == {"max_new_tokens": 256, "steps": 4, "stop": "eos", "seed": 0}
    adapter.sampling["temperature"] = 1.0
    assert adapter._sampling_of({"temperature": 0.5}, [], times_before=0)["temperature"] == 1.0


def test_texts_end_before_the_stop_strings_and_repeats_differ(adapter):
    adapter.sampling |= {"temperature": 1.0}
    requests = [instance("a b", {"until": ["e"], "max_gen_toks": 12}, 0)] * 2
    first, second = adapter.generate_until(requests, disable_tqdm=True)
    assert first != second
    assert "e" not in first + second
    assert adapter.generate_until(requests, disable_tqdm=True) == [first, second]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_may_stop_at_a_special_token(kind):
    from redraft.evaluation.harness import RedraftLM

    lm = text_lm_of(kind)
    row = lm.tokenizer.convert_tokens_to_ids(["self", "<|im_end|>", "yes"])
    adapter = RedraftLM(lm=scripted(lm, Script(row)), block_size=1)
    requests = [
        instance("un", {"until": until, "max_gen_toks": 6}, i)
        for i, until in enumerate([["<|im_end|>", ""], ["s<|im_end|>", "yes"], "never"])
    ]
    texts = adapter.generate_until(requests, disable_tqdm=True)
    assert texts == ["self", "self", "selfyesyesyesyes"]
    assert adapter.costs["tokens"] == 2 + 3 + 6


def test_a_context_longer_than_the_model_is_cut_from_the_left_and_counted(adapter):
    request = adapter._request(instance("x" * 200 + "y", " z"))
    assert len(request.context) + len(request.continuation) == 128
    assert adapter.tokenizer.decode(request.context).endswith("y")
    assert adapter.get_model_info()["redraft"]["cut_tokens"] == 75
    with pytest.raises(ValueError, match="200 new or scored tokens do not fit into the model's context of 128"):
        adapter._request(instance("x", "z" * 200))


def test_misspelt_settings_and_models_without_tokenizers_are_refused(lm, text_lm):
    from redraft.evaluation.harness import RedraftLM

    with pytest.raises(ValueError, match="unknown setting 'step'.*Did you mean 'steps'"):
        RedraftLM(lm=text_lm, step=3)
    with pytest.raises(ValueError, match="has no tokenizer"):
        RedraftLM(lm=lm)
    with pytest.raises(ValueError, match="there is no model"):
        RedraftLM()
