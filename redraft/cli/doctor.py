"""`redraft doctor`: what is installed, what the machine can do, and whether a tiny model runs."""

import http.client
import importlib.metadata
import os
import platform
import threading
import time
import urllib.request
from dataclasses import dataclass

from redraft.cli import EXTRAS
from redraft.cli.parsing import parse

PACKAGES = ("redraft", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "tyro")
HUB_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Report versions, devices and settings, and try a tiny model."""


def main(arguments: list[str]) -> int:
    """Print the report; 1 if the tiny model fails."""
    parse(Arguments, arguments, command="doctor")

    import torch

    from redraft.cli.common import plain_console
    from redraft.models.device import can_compile, choose_device
    from redraft.training.machine import bfloat16_is_faster

    console = plain_console()

    def row(name: str, value: str) -> None:
        console.print(f"{name:<15}{value}")

    row("python", platform.python_version())
    row("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for name in PACKAGES:
        row(name, _version(name) or "missing")
    for name, extra in EXTRAS.items():
        row(name, _version(name) or f"not installed (pip install 'redraft[{extra}]')")
    row("device", str(choose_device(None)))
    row("threads", str(torch.get_num_threads()))
    row("bfloat16", "faster than float32" if bfloat16_is_faster("auto") else "not faster than float32")
    row("torch.compile", "a compiler is there" if can_compile() else "no compiler found")
    row("hub", _hub())
    try:
        console.print(_try_tiny_model())
    except Exception as error:  # whatever it is, the report is about it
        console.print(f"a tiny model does not run: {type(error).__name__}: {error}", style="red")
        return 1
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub(seconds: float = HUB_SECONDS) -> str:
    """Ask the hub for an answer, and tell what came of it. A name that no server resolves can take longer: a thread."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "not asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    found = [f"{constants.ENDPOINT} did not answer in {seconds:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
                found.append(f"{constants.ENDPOINT} answers")
        except (OSError, ValueError, http.client.HTTPException) as error:
            found.append(f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[-1]


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
    start = time.perf_counter()
    out = lm.generate("def ", max_new_tokens=8, stop=None)
    return f"a tiny model runs: {out.forwards[0]} forwards in {1e3 * (time.perf_counter() - start):.0f} ms"
