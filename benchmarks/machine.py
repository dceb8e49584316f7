"""One line that says where a number was measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe(script: str, arguments: list[str]) -> str:
    """Name command, commit, processor, threads and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (
        f"`python benchmarks/{' '.join([script, *arguments])}` at {commit or 'no commit'}; {_processor()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}\n"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    amx = " with AMX" if "amx_bf16" in info.read_text() else ""
    return (names[0] if names else platform.machine()) + amx
