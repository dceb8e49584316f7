"""The benchmark scripts run."""

import subprocess
import sys
import sysconfig
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_sampling_benchmark_runs_all_its_parts():
    command = [sys.executable, str(SCRIPTS / "sampling.py"), "--quick"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("| tiny |") == 17
    assert "break-even at" in printed
    assert "| vocabulary |" in printed


@pytest.mark.slow
def test_the_batch_benchmark_lets_rows_leave_and_times_what_is_beside_the_forwards():
    command = [sys.executable, str(SCRIPTS / "batch.py"), "--quick"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "4 rows with 16 cached tokens, 2 rows left." in printed
    assert printed.count("| exact |") == printed.count("| none |") == 2


@pytest.mark.slow
def test_the_way_of_a_prompt_begins_at_generate_and_ends_at_the_denoiser():
    command = [sys.executable, str(SCRIPTS / "way.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("full", "block-causal"):
        modules = printed.split(f"## {name} attention")[1].split("attention:")[0].strip().splitlines()[2:]
        assert modules[0].startswith("| redraft.language_model | LanguageModel.generate,")
        assert modules[-1].startswith("| redraft.models.denoiser | ")
        assert f"attention: {name}, modules: {len(modules)}," in printed


@pytest.mark.slow
def test_a_training_row_passes_at_most_14_files_between_the_source_and_the_loss():
    command = [sys.executable, str(SCRIPTS / "way.py"), "--training"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    modules = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| redraft.")]
    assert modules[0] == "redraft.data.files"
    assert "redraft.training.trainer" in modules
    assert len(modules) <= 14
    assert sum(module.startswith("redraft.data.") for module in modules) <= 6


@pytest.mark.slow
def test_a_checkout_is_timed_against_itself_in_processes_of_their_own():
    command = [sys.executable, str(SCRIPTS / "sampling.py"), "--against", str(SCRIPTS.parent), "--quick"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("| tiny | 1 |") == printed.count("| tiny | 32 |") == 2


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (10, 2), (20, 6), (25, 8), (50, 18), (100, 40)])
def test_the_95_percent_interval_of_a_median_has_the_ranks_of_the_published_tables(n, rank, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    values = [float(value) for value in reversed(range(1, n + 1))]
    assert import_module("paired").median_interval(values) == ((n + 1) / 2, rank, n + 1 - rank)


@pytest.mark.slow
def test_the_solver_benchmark_tells_every_solver_from_chance():
    command = [sys.executable, str(SCRIPTS / "solvers.py"), "--samples", "20000"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in printed.splitlines() if "| 0." in line}
    assert len(rows) == 3
    assert all(float(row[-1]) < 0.05 for row in rows.values())
    assert float(rows["| ddim"][0]) > 0.1


@pytest.mark.slow
def test_a_checkout_differs_in_nothing_from_itself():
    command = [sys.executable, str(SCRIPTS / "frozen.py"), str(SCRIPTS.parent), "--settings", "5", "--recipes"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("5 records")
    assert "0 differ" in printed


@pytest.mark.slow
def test_the_latent_benchmark_trains_its_baselines_and_remembers(tmp_path):
    runs = tmp_path / "runs.jsonl"
    flags = ["--task", "composition", "--layers", "1", "--samples", "2", "--prompts", "4", "--max-steps", "2"]
    names = [
        "AR, thoughts written behind a padded prompt",
        "AR, pause tokens",
        "AR, answer at once",
        "masked diffusion",
    ]
    command = [sys.executable, str(SCRIPTS / "latent_thinking.py"), *flags, "--runs", str(runs), "--models", *names]
    for _ in range(2):  # the second time from the file
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert table.count("| AR") == 2 * 6
        assert table.count("| masked diffusion") == 2 * 7
    assert len(runs.read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_planning_benchmark_trains_and_asks_all_its_methods_once(tmp_path):
    runs = tmp_path / "runs.jsonl"
    task = ["--puzzles", "4", "--seeds", "0", "--runs", str(runs)]
    small = ["--steps", "2", "--rates", "1e-3", "--batch-size", "4"]
    for _ in range(2):  # the second time from the file
        command = [sys.executable, str(SCRIPTS / "planning.py"), *task, *small]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert table.count("| AR") == 2
        assert table.count("| MDLM | 0.001 |") == 6
    assert len(runs.read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_data_limited_benchmark_tunes_compares_and_remembers(tmp_path):
    runs, plot = tmp_path / "runs.jsonl", tmp_path / "curves.svg"
    flags = "--methods AR MDLM --documents 6 --steps 4 --tuning-steps 2 --eval-every 2 --windows 4 --seeds 1"
    command = [sys.executable, str(SCRIPTS / "data_limited.py"), *flags.split(), "--rates", "1e-3", "2e-3"]
    command += ["--runs", str(runs)]
    printed = subprocess.run([*command, "--plot", str(plot)], check=True, capture_output=True, text=True).stdout
    assert len(runs.read_text().splitlines()) == 6  # of either a short run at each rate and a full one
    assert "| 4 | " in printed
    assert "\nMDLM: " in printed
    assert plot.exists()


def test_the_paragraphs_of_the_prose_benchmark_are_sentences_in_short_blocks_and_come_back(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    prose = import_module("prose")
    task = prose.Prose(vocab_size=400, root=Path(sysconfig.get_path("stdlib")) / "email")
    texts = [text for texts in task.documents.values() for text in texts]
    assert len(texts) > 50
    assert all(text[0].isupper() and text[-1] in ".!?" and ">>>" not in text for text in texts)
    examples = list(task.examples())
    assert {len(example.blocks) for example in examples} <= {2, 3, 4, 5}
    assert all(1 <= len(block.split()) <= 12 for example in examples for block in example.blocks)
    assert all(task.is_solved(example.prompt, task.answer(list(example.blocks))) for example in examples[:50])
    assert not prose.is_prose(">>> Return the sum of what is given to the function here.")
    assert not prose.is_prose("name          what it is in a table\nother         what the other is.")


@pytest.mark.slow
def test_the_serving_benchmark_measures_and_remembers(tmp_path):
    runs, parts = tmp_path / "serving.jsonl", ["equal", "closed", "open", "cpu"]
    command = [sys.executable, str(SCRIPTS / "serving.py"), "--quick", "--runs", str(runs), "--parts", *parts]
    for _ in range(2):  # the second time from the file
        printed = subprocess.run([*command, "--ways", "continuous"], check=True, capture_output=True, text=True).stdout
        assert printed.count("| continuous | ") == 2
        assert "| everything but the engine's thread | " in printed
        assert "| median first text at half load <= 1.5 x alone | " in printed
    assert len(runs.read_text().splitlines()) == 1 + 3 + 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["static-50", "blocks"])
def test_other_ways_to_batch_serve_all_requests(way):
    command = [sys.executable, str(SCRIPTS / "serving.py"), "--quick", "--parts", "open", "--ways", way]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count(f"| {way} | ") == 2


def test_the_load_of_the_serving_benchmark_is_the_same_each_time_and_of_whole_blocks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    work = import_module("serving_load").Work(vocab_size=400, prompt=(16, 64), new=(8, 32), block=8, steps_per_block=4)
    first, again = (list(islice(work.requests(), 200)) for _ in range(2))
    assert first == again
    assert {len(prompt) for prompt, _ in first} == set(range(16, 65, 8))
    assert {new for _, new in first} == {8, 16, 24, 32}
    assert all(300 <= token < 400 for prompt, _ in first for token in prompt)


def test_the_serving_benchmark_counts_by_tokens_and_not_by_chunks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    serving, load = import_module("serving"), import_module("serving_load")
    outcome = load.Outcome(scheduled=0.0, chunks=[(1.0, 2), (3.0, 6), (4.0, 7)])
    assert list(serving.token_seconds(outcome)) == [0.5] * 4 + [1.0]
    assert serving.tokens_between(outcome, 1.0, 4.0) == 6
    assert [serving.percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 99)] == [1.0, 2.0, 3.0]


def test_the_tokens_of_the_serving_benchmark_are_texts_of_their_own(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    tokenizer = import_module("serving").tokenizer_of(49152)
    assert len(tokenizer) == 49152
    assert tokenizer.mask_token_id == 2
    texts = tokenizer.batch_decode([[i] for i in range(300, 49152)])
    assert len(set(texts)) == len(texts)
    assert all(text.isascii() for text in texts)
