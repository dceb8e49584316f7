"""The benchmark scripts run."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def test_the_sampling_benchmark_runs_all_its_parts():
    command = [sys.executable, str(SCRIPTS / "sampling.py"), "--quick"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("| tiny |") == 17
    assert "break-even at" in printed
    assert "| vocabulary |" in printed


def test_the_planning_benchmark_trains_and_asks_all_its_methods_once(tmp_path):
    runs = tmp_path / "runs.jsonl"
    task = ["--tasks", "countdown", "--puzzles", "4", "--seeds", "0", "--runs", str(runs)]
    small = ["--steps", "2", "--rates", "1e-3", "--batch-size", "4"]
    for _ in range(2):  # the second time from the file
        command = [sys.executable, str(SCRIPTS / "planning.py"), *task, *small]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert table.count("| countdown | AR") == 2
        assert table.count("| countdown | MDLM | 0.001 |") == 5
    assert len(runs.read_text().splitlines()) == 3
