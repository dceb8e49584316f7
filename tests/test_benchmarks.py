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
    task = ["--puzzles", "4", "--seeds", "0", "--runs", str(runs)]
    small = ["--steps", "2", "--rates", "1e-3", "--batch-size", "4"]
    for _ in range(2):  # the second time from the file
        command = [sys.executable, str(SCRIPTS / "planning.py"), *task, *small]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert table.count("| AR") == 2
        assert table.count("| MDLM | 0.001 |") == 6
    assert len(runs.read_text().splitlines()) == 3


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
