"""Count the modules that a prompt passes between `generate` and the model's first forward.

    python benchmarks/way.py

Runs a generation of a tiny model, with full and with block-causal attention, and notes each function of redraft that
is entered with the prompt's tokens in an argument (in a tensor, a list, or a field of an object) before the model's
first forward begins. Counted are the modules of these functions. Generated methods (a dataclass' `__init__`) do not
count: nobody reads them.
"""

import sys
from inspect import getargs
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from machine import describe

from redraft.language_model import LanguageModel
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings

PROMPT = [11, 17, 13, 19, 12, 16, 18, 14]
DEPTH = 4  # of lists and objects inside of an argument


class Tokens:
    """Special ids of a model that is never asked for text."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = None, 1, 0, 2

    def __len__(self) -> int:
        return 40


def has_prompt(value: Any, depth: int = DEPTH) -> bool:
    """Look for the prompt's tokens in a value, and in what it holds."""
    if isinstance(value, torch.Tensor):
        flat = value.flatten()
        if value.dtype != torch.int64 or len(flat) < len(PROMPT):
            return False
        return bool((flat.unfold(0, len(PROMPT), 1) == torch.tensor(PROMPT)).all(dim=1).any())
    if depth == 0 or isinstance(value, torch.nn.Module):
        return False
    inside: list[Any] = []
    if isinstance(value, list | tuple):
        if list(value) == PROMPT:
            return True
        inside = list(value[:4])
    elif isinstance(value, dict):
        inside = list(value.values())
    elif type(value).__module__.startswith("redraft."):
        inside = list(getattr(value, "__dict__", {}).values())
    return any(has_prompt(part, depth - 1) for part in inside)


def way_of(lm: LanguageModel, **settings: Any) -> dict[str, list[str]]:
    """Return the modules, in the order in which the prompt first reaches them, with their functions."""
    passed: dict[str, list[str]] = {}

    def stop(*_: Any) -> None:
        sys.setprofile(None)

    def look(frame: FrameType, event: str, _: Any) -> None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if event != "call" or not module.startswith("redraft.") or code.co_filename == "<string>":
            return
        names = getargs(code)
        arguments = [frame.f_locals.get(name) for name in (*names.args, names.varargs, names.varkw) if name]
        functions = passed.get(module, [])
        if code.co_qualname not in functions and any(has_prompt(value) for value in arguments):
            passed[module] = [*functions, code.co_qualname]

    handle = lm.model.register_forward_pre_hook(stop)
    sys.setprofile(look)
    try:
        lm.generate(PROMPT, max_new_tokens=8, **settings)
    finally:
        sys.setprofile(None)
        handle.remove()
    return passed


def main() -> None:
    """Print both ways."""
    print(describe(Path(__file__).name, sys.argv[1:]))
    shape = ModelConfig(size="hidden=32,layers=1,heads=2,intermediate=64")
    for name, block_size, preset in (("full", None, {}), ("block-causal", 4, {"preset": "sdar"})):
        settings = DiffusionSettings(mask_token_id=2, block_size=block_size)
        model = build_model(shape, settings, tokenizer=Tokens()).eval()
        passed = way_of(LanguageModel(denoiser=Denoiser(model, settings)), **preset)
        print(f"## {name} attention\n")
        print("| module | functions |")
        print("|---|---|")
        for module, functions in passed.items():
            print(f"| {module} | {', '.join(functions)} |")
        print(f"\nattention: {name}, modules: {len(passed)}, functions: {sum(map(len, passed.values()))}\n")


if __name__ == "__main__":
    main()
