"""The settings of objectives and likelihoods: without torch, and equal to what they name."""

import subprocess
import sys
from typing import get_args, get_type_hints

from redraft.likelihood.config import ObjectiveConfig
from redraft.processes import PROCESSES
from redraft.schedules import SCHEDULES


def test_the_settings_import_no_torch():
    code = "import sys, redraft.likelihood.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_schedules_that_can_be_named_are_those_there_are():
    assert set(get_args(get_type_hints(ObjectiveConfig)["schedule"])) == set(SCHEDULES)


def test_every_kind_trains_a_process_that_there_is():
    for kind, size in {"masked": None, "uniform": None, "block": 4, "ar": None}.items():
        config = ObjectiveConfig(kind=kind, block_size=size)
        assert config.process in PROCESSES
        assert config.settings(2).process == config.process
