"""The settings of objectives and likelihoods: without torch, and equal to what they name."""

import subprocess
import sys
from typing import get_args, get_type_hints

from redraft.likelihood.config import ObjectiveConfig
from redraft.processes import PROCESSES
from redraft.schedules import SCHEDULES

WITHOUT_TORCH = """
import sys
from redraft.likelihood.config import ObjectiveConfig
try:
    ObjectiveConfig(schedule="cosin")
except ValueError as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_the_settings_import_no_torch_and_refuse_an_unknown_schedule():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("objective.schedule must be one of 'linear', ")
    assert done.stdout.endswith("; got 'cosin'.\n")


def test_the_schedules_that_can_be_named_are_those_there_are():
    assert set(get_args(get_type_hints(ObjectiveConfig)["schedule"])) == set(SCHEDULES)


def test_every_kind_trains_a_process_that_there_is():
    for kind, size in {"masked": None, "uniform": None, "block": 4, "ar": None}.items():
        config = ObjectiveConfig(kind=kind, block_size=size)
        assert config.process in PROCESSES
        assert config.settings(2).process == config.process
