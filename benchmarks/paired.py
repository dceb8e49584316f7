"""Two ways in turns: the median of their ratios with an interval, and processes that run other checkouts."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from math import comb
from pathlib import Path
from typing import Any


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its interval of at least 95 %, whatever the values' distribution.

    The ends are the k-th value from below and from above: the number of values below the true median is
    binomial (n, 1/2), and k is the greatest with 2 P(number < k) <= .05. Fewer than 6 values have no such k; then these
    are the lowest and the highest, which is less than 95 %.
    """
    ordered, n = sorted(values), len(values)
    misses = [2 * sum(comb(n, number) for number in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = max(1, sum(miss <= 0.05 for miss in misses))
    return statistics.median(ordered), ordered[k - 1], ordered[-k]


def with_interval(values: list[float], spec: str = ".3f") -> str:
    """Write the median with its interval."""
    median, low, high = median_interval(values)
    return f"{median:{spec}} [{low:{spec}}, {high:{spec}}]"


class Worker:
    """A process that runs a script with the package of a checkout, and answers line by line in JSON.

    The first line that the script prints must be the folder of the package it imported. Raises ValueError where that
    is not the checkout's.
    """

    def __init__(self, checkout: Path, script: Path, flags: list[str], *, threads: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment = os.environ | limits | {"PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script.resolve()), *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder.name, env=environment,
        )  # fmt: skip
        package = Path(self._read())
        if package != checkout.resolve() / "redraft":
            self.__exit__()
            raise ValueError(f"the checkout must hold redraft/; got {checkout}, and {package} was imported.")

    def ask(self, question: Any) -> Any:
        """Send a question, and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._read()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.process.communicate()  # the end of its input ends it
        self.folder.cleanup()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}")
        return json.loads(line)


def in_turns(now: Worker, before: Worker, case: Any, rounds: int) -> list[tuple[float, float]]:
    """Time both workers in pairs now-before, before-now, ..., after one pair that does not count."""
    times = []
    for i in range(rounds + 1):
        turns = (now, before) if i % 2 == 0 else (before, now)
        took = {worker: worker.ask(case) for worker in turns}
        times.append((took[now], took[before]))
    return times[1:]
