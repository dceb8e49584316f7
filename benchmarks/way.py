"""Count the files that a prompt passes before the first forward, and a training row between the source and the loss.

    python benchmarks/way.py [--training]

Runs a generation of a tiny model, with full and with block-causal attention, and notes each function of redraft that
is entered with the prompt's tokens in an argument (in a tensor, a list, or a field of an object) before the model's
first forward begins. Counted are the modules of these functions. Generated methods (a dataclass' `__init__`) do not
count: nobody reads them.

With --training: trains one step of a tiny model on a small text file, with an empty cache, and notes each function of
redraft that has the row in a local variable (its text, its tokens in a list, an array or a tensor, or the batch that
it is in) before the loss is returned. A whole dataset, a model and a trainer do not count as a row.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import getargs
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from machine import describe
from rich.console import Console

from redraft.data.prepare import prepare
from redraft.language_model import LanguageModel
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.recipes import RECIPES
from redraft.recipes.smoke import smoke
from redraft.training.run import run

PROMPT = [11, 17, 13, 19, 12, 16, 18, 14]
WORD = "xyloquartz"
DEPTH = 4  # of lists and objects inside of an argument
NO_ROWS = (torch.nn.Module, torch.utils.data.Dataset)


class Tokens:
    """Special ids of a model that is never asked for text."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = None, 1, 0, 2

    def __len__(self) -> int:
        return 40


def holds(value: Any, tokens: list[int], *, text: str | None = None, depth: int = DEPTH) -> bool:
    """Look for the tokens, or the text, in a value, and in what it holds."""
    if isinstance(value, str):
        return text is not None and text in value
    if isinstance(value, torch.Tensor):
        value = np.empty(0) if value.is_floating_point() or value.is_meta else value.numpy(force=True)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or value.size < len(tokens):
            return False
        return bool((np.lib.stride_tricks.sliding_window_view(value.reshape(-1), len(tokens)) == tokens).all(1).any())
    if depth == 0 or isinstance(value, NO_ROWS):
        return False
    inside: list[Any] = []
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, int) for item in value):
            return len(value) >= len(tokens) and holds(np.array(value), tokens)
        inside = list(value[:4])
    elif isinstance(value, dict):
        inside = list(value.values())
    elif type(value).__module__.startswith("redraft.") and not hasattr(value, "training_step"):
        inside = list(getattr(value, "__dict__", {}).values())
    return any(holds(part, tokens, text=text, depth=depth - 1) for part in inside)


@contextmanager
def noted(values_of: Callable[[FrameType, str, Any], list[Any]], **wanted: Any) -> Iterator[dict[str, list[str]]]:
    """Note the functions of redraft whose values hold what is wanted, by module, in the order of their first time."""
    passed: dict[str, list[str]] = {}

    def look(frame: FrameType, event: str, result: Any) -> None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if not module.startswith("redraft.") or code.co_filename == "<string>":
            return
        functions = passed.get(module, [])
        is_new = code.co_qualname not in functions
        if is_new and any(holds(value, **wanted) for value in values_of(frame, event, result)):
            passed[module] = [*functions, code.co_qualname]
        if event == "return" and code.co_name == "compute_loss":
            sys.setprofile(None)

    sys.setprofile(look)
    try:
        yield passed
    finally:
        sys.setprofile(None)


def arguments(frame: FrameType, event: str, _: Any) -> list[Any]:
    """Return the arguments of a function when it is entered."""
    names = getargs(frame.f_code)
    return [frame.f_locals.get(name) for name in (*names.args, names.varargs, names.varkw) if name and event == "call"]


def variables(frame: FrameType, event: str, result: Any) -> list[Any]:
    """Return the local variables of a function, and its result, when it returns or yields."""
    return [*frame.f_locals.values(), result] if event == "return" else []


def way_of_prompt(lm: LanguageModel, **settings: Any) -> dict[str, list[str]]:
    """Return the modules that a prompt passes up to the first forward, with their functions."""
    handle = lm.model.register_forward_pre_hook(lambda *_: sys.setprofile(None))
    with noted(arguments, tokens=PROMPT) as passed:
        lm.generate(PROMPT, max_new_tokens=8, **settings)
    handle.remove()
    return passed


def way_of_row(folder: Path) -> dict[str, list[str]]:
    """Return the modules that a row of a text file passes up to the loss of the first step, with their functions."""
    paragraph = " ".join([WORD] * 500)
    (folder / "text.txt").write_text("\n\n".join(f"{number} {paragraph}" for number in range(20)))
    config = smoke(RECIPES["stdlib-tiny"]())
    data = replace(config.data, source=str(folder / "text.txt"), max_documents=None, vocab_size=259)
    config = replace(config, data=data, out=str(folder / "run"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "first")
    tokens = prepare(data).tokenizer(WORD, add_special_tokens=False)["input_ids"]
    os.environ["XDG_CACHE_HOME"] = str(folder / "second")
    with noted(variables, tokens=tokens, text=WORD) as passed:
        run(config, console=Console(quiet=True))
    return passed


def show(name: str, passed: dict[str, list[str]]) -> None:
    """Print the way as a table."""
    print("| module | functions |")
    print("|---|---|")
    for module, functions in passed.items():
        print(f"| {module} | {', '.join(functions)} |")
    print(f"\n{name}, modules: {len(passed)}, functions: {sum(map(len, passed.values()))}\n")


def main() -> None:
    """Print both ways of a prompt, or that of a training row."""
    print(describe(Path(__file__).name, sys.argv[1:]))
    if "--training" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            show("training", way_of_row(Path(folder)))
        return
    shape = ModelConfig(size="hidden=32,layers=1,heads=2,intermediate=64")
    for name, block_size, preset in (("full", None, {}), ("block-causal", 4, {"preset": "sdar"})):
        settings = DiffusionSettings(mask_token_id=2, block_size=block_size)
        model = build_model(shape, settings, tokenizer=Tokens()).eval()
        print(f"## {name} attention\n")
        show(f"attention: {name}", way_of_prompt(LanguageModel(denoiser=Denoiser(model, settings)), **preset))


if __name__ == "__main__":
    main()
