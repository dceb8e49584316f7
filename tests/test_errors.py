"""Settings are checked when they are made, and unknown names get a suggestion."""

import subprocess
import sys


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
        "steps must be one of int, None; got 2.5.",
        "max_new_tokens must be of type int; got '8'.",
        "noise must be one of 'mask', 'uniform'; got 'gauss'.",
        "cache must be one of 'none', 'exact', 'prefix', 'dual'; got 'full'.",
        "kind must be one of 'cap', 'rescale', 'conf', 'loop'; got 'x'.",
        "at_least must be one of 'one', 'quota'; got 'all'.",
    ]
