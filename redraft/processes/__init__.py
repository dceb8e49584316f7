"""The noising processes by name. A new one is a file with a class that implements `noised.Process`, and a line here.

This module imports no torch: a class is imported when it is asked for.
"""

from importlib import import_module
from typing import Any

from redraft.errors import unknown_name

PROCESSES = {
    "masked": "redraft.processes.masked:MaskedDiffusion",
    "uniform": "redraft.processes.uniform:UniformDiffusion",
    "autoregressive": "redraft.processes.masked:MaskedDiffusion",  # each block is one masked token
}
"""Name in a checkpoint's `diffusion.process` -> MODULE:CLASS."""


def process_class(name: str) -> Any:
    """Import the class of a process. Raises ValueError for an unknown name, listing the valid ones."""
    if name not in PROCESSES:
        raise unknown_name("diffusion.process in config.json", name, PROCESSES)
    module, _, attribute = PROCESSES[name].partition(":")
    return getattr(import_module(module), attribute)
