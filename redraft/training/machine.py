"""Facts about this machine that training depends on."""

import ctypes
import platform
import time

import torch

from redraft.models.device import choose_device

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def runs_on_cpu() -> bool:
    """Whether training runs on the CPU, as there is no accelerator that it can use."""
    return choose_device(None).type == "cpu"


def bfloat16_is_faster() -> bool:
    """Whether matrices multiply at least a fifth faster in bfloat16 than in float32; measured on a CPU."""
    if not runs_on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return _multiply_seconds(torch.bfloat16) * 1.2 < _multiply_seconds(torch.float32)


def _multiply_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step; a CPU step otherwise faults in every page again.

    Measured: benchmarks/results/training.md. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
