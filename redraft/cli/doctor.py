"""`redraft doctor`: what is installed, what the machine can do, and whether a tiny model runs."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from redraft.cli import EXTRAS
from redraft.cli.common import plain_console
from redraft.cli.parsing import parse

PACKAGES = ("redraft", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "tyro")


@dataclass(frozen=True, kw_only=True)
class DoctorFlags:
    """Report versions, devices and settings, and run a tiny model."""


def main(arguments: list[str]) -> int:
    """Print the report; a tiny model that fails is an unexpected error."""
    parse(DoctorFlags, arguments, command="doctor")
    import torch
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    from redraft.models.device import can_compile, choose_device
    from redraft.training.machine import bfloat16_is_faster

    console = plain_console()
    extras = {name: extra for extra, names in EXTRAS.items() for name in names}
    report = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        **{name: _version(name, "missing") for name in PACKAGES},
        **{name: _version(name, f"not installed (pip install 'redraft[{extra}]')") for name, extra in extras.items()},
        "device": str(choose_device(None)),
        "threads": str(torch.get_num_threads()),
        "bfloat16": "faster than float32" if bfloat16_is_faster() else "not faster than float32",
        "torch.compile": "a compiler is installed" if can_compile() else "no compiler found",
        "hub": "offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" if is_offline_mode() else ENDPOINT,
    }
    for name, value in report.items():
        console.print(f"{name:<15}{value}")
    console.print(_try_tiny_model())
    return 0


def _version(package: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _try_tiny_model() -> str:
    """Build a random model, denoise a few tokens and time it."""
    from redraft.data.tokenizer import train_tokenizer
    from redraft.language_model import LanguageModel
    from redraft.models.build import build_model
    from redraft.models.config import ModelConfig
    from redraft.models.denoiser import Denoiser
    from redraft.models.settings import DiffusionSettings

    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 20], vocab_size=260)
    settings = DiffusionSettings(mask_token_id=tokenizer.mask_token_id)
    model = build_model(ModelConfig(size="1m"), settings, tokenizer=tokenizer).eval()
    lm = LanguageModel(denoiser=Denoiser(model, settings), tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,))
    out = lm.generate("def ", max_new_tokens=8, stop=None)
    return f"a tiny model runs: {out.forwards[0]} forwards in {1e3 * out.seconds:.0f} ms"
