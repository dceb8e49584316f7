"""A run that was cut short is no result."""

import sys

from redraft.training.run import RunResult


def whole(outcome: RunResult) -> RunResult:
    """Return what a finished run left; end the benchmark where a signal ended the run."""
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    return outcome
