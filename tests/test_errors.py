"""Settings of a wrong type are told by name."""

import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from redraft.errors import check_types


@dataclass
class Settings:
    count: int = 1
    share: float = 0.5
    most: int | None = None
    is_on: bool = False
    part: float | None = None
    kind: Literal["a", "b"] = "a"
    other: Literal["a", "b"] | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        check_types(self)


def test_a_whole_number_may_stand_for_a_float_and_nothing_for_what_may_be_absent():
    Settings(share=1, most=3, is_on=True, kind="b", names=("x", "y"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2.0}, "count must be of type int; got 2.0"),
        ({"count": True}, "count must be of type int; got True"),
        ({"share": "1"}, "share must be of type float; got '1'"),
        ({"most": "2"}, "most must be one of int, NoneType; got '2'"),
        ({"is_on": "no"}, "is_on must be of type bool; got 'no'"),
        ({"kind": "c"}, "kind must be one of 'a', 'b'; got 'c'"),
        ({"other": "c"}, "other must be one of 'a', 'b', NoneType; got 'c'"),
        ({"share": math.nan}, "share must be a finite number; got nan"),
        ({"share": -math.inf}, "share must be a finite number; got -inf"),
        ({"part": np.float32("inf")}, "part must be a finite number; got inf"),
        ({"names": ("x", 1)}, "names must be of type"),
    ],
)
def test_other_types_are_told(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_settings_of_thinking_and_of_sampling_are_checked():
    """In a process of their own: here every annotation of the package is checked already."""
    code = """
from redraft.latent.config import ThinkingConfig
from redraft.sampling.config import SamplingConfig
from redraft.sampling.sampler import Sampler
from redraft.sampling.policies import Remasking, Threshold
for kind, given in ((ThinkingConfig, {"steps": 2.5}), (ThinkingConfig, {"solver": "euler"}),
                    (SamplingConfig, {"steps": 2.5}), (SamplingConfig, {"max_new_tokens": "8"}),
                    (Sampler, {"noise": "gauss"}), (Sampler, {"cache": "full"}), (Remasking, {"kind": "x"}),
                    (Threshold, {"threshold": 0.5, "at_least": "all"})):
    try:
        kind(**given)
    except ValueError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "steps must be of type int; got 2.5.",
        "solver must be one of 'dpm++2m', 'ddim'; got 'euler'.",
        "steps must be one of int, NoneType; got 2.5.",
        "max_new_tokens must be of type int; got '8'.",
        "noise must be one of 'mask', 'uniform'; got 'gauss'.",
        "cache must be one of 'none', 'exact', 'prefix', 'dual'; got 'full'.",
        "kind must be one of 'cap', 'rescale', 'conf', 'loop'; got 'x'.",
        "at_least must be one of 'one', 'quota'; got 'all'.",
    ]
