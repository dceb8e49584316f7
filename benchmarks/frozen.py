"""Tokens, forwards and losses of two checkouts on one machine: what a redesign must not move.

    git worktree add ../before HEAD~1
    python benchmarks/frozen.py ../before [--settings 50] [--recipes stdlib-tiny llada-sft] [--steps 20]

Runs this file once with each checkout's package: random settings of `generate` on tiny random models, and the first
losses of every recipe's smoke run. Floats do not travel between processors, so nothing is stored: both run here.
Prints what differs, and exits with 1 where something does.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

PRESETS = (
    "llada", "llada-random", "dream-confidence", "dream-margin", "dream-entropy", "fast-dllm", "bd3lm", "sdar",
    "llada2", "llada2.1", "mdlm", "remdm", "p2", "eb", "duo",
)  # fmt: skip
"""Presets that every checkout has: a list that grew would draw other settings."""


class Ids:
    """Special ids of a model that is never asked for text."""

    bos_token_id = None
    eos_token_id = pad_token_id = 1
    mask_token_id = 2

    def __len__(self) -> int:
        return 40


def model(*, block_size: int | None, shift_logits: bool, process: str) -> Any:
    """Build a random model in float64 whose predictions differ clearly."""
    from redraft.language_model import LanguageModel
    from redraft.models.build import build_model
    from redraft.models.config import ModelConfig
    from redraft.models.denoiser import Denoiser
    from redraft.models.settings import DiffusionSettings

    torch.manual_seed(0)
    settings = DiffusionSettings(mask_token_id=2, shift_logits=shift_logits, block_size=block_size, process=process)
    shape = ModelConfig(size="hidden=32,layers=2,heads=2,intermediate=64", max_positions=128)
    network = build_model(shape, settings, tokenizer=Ids()).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return LanguageModel(denoiser=Denoiser(network, settings), tokenizer=None)


def draw(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any], list[list[int]]]:
    """Draw a model, settings of `generate` and prompts."""
    process = rng.choice(["masked"] * 4 + ["uniform"])
    names = [name for name in PRESETS if (name == "duo") == (process == "uniform")]
    of_model = {"block_size": rng.choice([None, None, 4]), "shift_logits": rng.random() < 0.3, "process": process}
    if process == "uniform":
        of_model |= {"block_size": None, "shift_logits": False}
    settings = {
        "preset": rng.choice(names),
        "max_new_tokens": rng.choice([8, 16, 24]),
        "temperature": rng.choice([None, 0.0, 0.7]),
        "seed": rng.randrange(5),
        "stop": None,
    }
    cost = rng.choice([{}, {"steps": rng.choice([3, 8])}, {"budget": 0.5}, {"forwards": 6}])
    extra = rng.choice([{}, {"top_k": 5}, {"top_p": 0.9}, {"cfg_scale": 1.0}, {"num_samples": 2}, {"block_size": 8}])
    if process == "uniform" or of_model["block_size"]:
        extra = {} if {"cfg_scale", "block_size"} & set(extra) else extra
    prompts = [[rng.randrange(3, 40) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 4))]
    return of_model, settings | cost | extra, prompts


def record(*, num_settings: int, recipes: list[str] | None, steps: int) -> dict[str, Any]:
    """Run everything with the package that is imported; settings that are refused are recorded as refused."""
    return _tokens(num_settings) | _losses(recipes, steps)


def _tokens(num_settings: int) -> dict[str, Any]:
    rng, found = random.Random(0), dict[str, Any]()
    while len(found) < num_settings:
        of_model, settings, prompts = draw(rng)
        name = f"{len(found)} {of_model} {settings}"
        try:
            out = model(**of_model).generate(prompts, **settings)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        found[name] = {"tokens": [row.tolist() for row in out.tokens], "forwards": out.forwards}
    return found


def _losses(recipes: list[str] | None, steps: int) -> dict[str, Any]:
    from redraft.recipes import RECIPES
    from redraft.recipes.smoke import smoke

    found = {}
    for name in RECIPES if recipes is None else recipes:
        config = smoke(RECIPES[name]())
        train = replace(config.train, max_steps=steps, save_every=steps)
        config = replace(config, train=train)
        if hasattr(config, "stage"):
            try:
                from redraft.latent.stages import run_stage as run
            except ImportError:  # a checkout of before latent thinking was one folder
                from redraft.training.latent import run_stage as run
        else:
            from redraft.training.run import run
        run(config)
        log = [json.loads(line) for line in Path(config.out, "log.jsonl").read_text().splitlines()]
        found[f"losses of {name}"] = [entry["loss"] for entry in log if "loss" in entry]
    return found


def record_of(checkout: Path, flags: list[str]) -> dict[str, Any]:
    """Record with the package of a checkout, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "record.json")
        environment = os.environ | {"PYTHONPATH": str(checkout.absolute()), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).absolute()), "--record", str(out), *flags]
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        return dict(json.loads(out.read_text()))


def main() -> int:
    """Record here and there, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--settings", type=int, default=50, help="random settings of generate (default: 50)")
    parser.add_argument("--recipes", nargs="*", default=None, help="recipes to train (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="losses of each recipe (default: 20)")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record is not None:
        found = record(num_settings=args.settings, recipes=args.recipes, steps=args.steps)
        args.record.write_text(json.dumps(found))
        return 0
    if args.before is None or not Path(args.before, "redraft").is_dir():
        parser.error(f"the other checkout must be a folder that holds redraft/; got {args.before}.")
    flags = ["--settings", str(args.settings), "--steps", str(args.steps)]
    flags += [] if args.recipes is None else ["--recipes", *args.recipes]
    before, now = record_of(args.before, flags), record_of(Path(__file__).parents[1], flags)
    different = [name for name in before | now if before.get(name) != now.get(name)]
    for name in different:
        print(f"{name}\n  before {before.get(name)}\n  now    {now.get(name)}")
    refused = sum("refused" in entry for entry in before.values() if isinstance(entry, dict))
    print(f"{len(now)} records ({refused} settings refused by both or one), {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
