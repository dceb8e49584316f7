"""The benchmark scripts run."""

import subprocess
import sys
import sysconfig
from importlib import import_module
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
