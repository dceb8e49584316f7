"""Where a model runs."""

import shutil

import torch

USABLE = ("cuda", "xpu")  # MPS has no float64, which noise and quotas are computed in


def choose_device(name: str | torch.device | None) -> torch.device:
    """Resolve a device: the one named, or the best available. Raises ValueError for one that is not available."""
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None or name == "auto":
        return present if present is not None and present.type in USABLE else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown. Use cpu, cuda or auto.") from error
    if device.type not in ("cpu", "meta") and (present is None or present.type != device.type):
        raise ValueError(f"device {name} is not available: torch finds no such device here. Use cpu or auto.")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or that the host can free; None where nobody tells."""
    if device.type == "cpu":
        import psutil  # of the extra `serve`; accelerate brings it anyway

        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def can_compile() -> bool:
    """Tell whether torch.compile finds what it needs: Triton on a GPU, a C++ compiler otherwise."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "cl"))
