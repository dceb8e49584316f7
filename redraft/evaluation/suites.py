"""The settings that others published for their models, task by task, with their scores to compare with.

They are in suites.json. Settings and scores are those of the README and evaluation scripts of the dLLM repository,
whose tables also quote the models' official scores. The tasks' data come from the hub, so no suite runs offline.
Differences: tasks that exist only in dLLM's fork of the harness are left out, and so is its ban of end tokens at the
start.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of the harness with its settings."""

    name: str
    few_shot: int | None = None
    """Examples before each question; None leaves the task's own number."""
    chat: bool = False
    settings: dict[str, Any]
    """Of `SamplingConfig` and `LikelihoodConfig`."""
    note: str = ""
    """What was published for it."""


def find_suite(name: str) -> list[SuiteTask]:
    """Find published settings by name. Raises ValueError for an unknown one."""
    suites = json.loads(Path(__file__).with_suffix(".json").read_text())
    if name not in suites:
        raise unknown_name("suite", name, suites)
    suite = suites[name]
    return [
        SuiteTask(
            name=task["name"],
            few_shot=task["few_shot"],
            chat=suite["chat"],
            settings=task["settings"],
            note=f"{task['name']}: published {task['official'] or '-'} (official), {task['dllm']} (dLLM), in percent. "
            f"{suite['note']}",
        )
        for task in suite["tasks"]
    ]
