"""`redraft doctor`: what is installed, what the machine can do, and whether a tiny model runs."""

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from redraft.cli.parsing import parse

PACKAGES = ("redraft", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "tyro")
EXTRAS = {"matplotlib": "plots", "tensorboard": "plots", "lm-eval": "eval", "fastapi": "serve"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Report versions, devices and settings, and try a tiny model."""


def main(arguments: list[str]) -> int:
    """Print the report; 1 if the tiny model fails."""
    parse(Arguments, arguments, command="doctor")

    import torch

    from redraft.models.device import can_compile, choose_device
    from redraft.training.machine import bfloat16_is_faster

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("python", platform.python_version())
    table.add_row("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for name in PACKAGES:
        table.add_row(name, _version(name) or "missing")
    for name, extra in EXTRAS.items():
        table.add_row(name, _version(name) or escape(f"not installed (pip install 'redraft[{extra}]')"))
    table.add_row("device", str(choose_device(None)))
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("bfloat16", "faster than float32" if bfloat16_is_faster("auto") else "not faster than float32")
    table.add_row("torch.compile", "a compiler is there" if can_compile() else "no compiler found")
    table.add_row("hub", "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online")
    console.print(table)
    try:
        console.print(_try_tiny_model())
    except Exception as error:  # whatever it is, the report is about it
        console.print(f"a tiny model does not run: {type(error).__name__}: {error}", style="red", markup=False)
        return 1
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_tiny_model() -> str:
    """Build a random model, denoise a few tokens and time it."""
    from redraft.data.tokenizer import train_tokenizer
    from redraft.language_model import LanguageModel
    from redraft.models.build import ModelConfig, build_model
    from redraft.models.denoiser import Denoiser
    from redraft.models.settings import DiffusionSettings

    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 20], vocab_size=260)
    settings = DiffusionSettings(mask_token_id=tokenizer.mask_token_id)
    model = build_model(ModelConfig(size="1m"), settings, tokenizer=tokenizer).eval()
    lm = LanguageModel(denoiser=Denoiser(model, settings), tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,))
    start = time.perf_counter()
    out = lm.generate("def ", max_new_tokens=8, stop=None)
    return f"a tiny model runs: {out.forwards[0]} forwards in {1e3 * (time.perf_counter() - start):.0f} ms"
