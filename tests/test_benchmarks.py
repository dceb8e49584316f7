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
