"""The demo's third part: a small model trains on Python's standard library for a minute and a half, and writes."""

from collections.abc import Callable
from pathlib import Path

import redraft
from redraft.cli.train import longer_command, next_steps
from redraft.recipes import stdlib_demo

config = stdlib_demo()


def train_and_sample(keep: Callable) -> Path:
    """Train, or go on where the last demo was stopped; `keep(name, lm, out)` a sample; return the run's folder."""
    from redraft.training.run import run  # imports transformers

    folder = Path(config.out)
    print(f"3. Training a small model on Python's standard library, at most {config.train.max_minutes} minutes:\n")
    outcome = run(config, resume=(folder / "recipe.json").exists())
    if outcome.signal:
        raise SystemExit(128 + outcome.signal)
    lm = redraft.load(folder)
    sampling = {"preset": "llada-random", "temperature": 0.8, "top_p": 0.9, "seed": 1}  # of a model so young
    out = lm.generate('"""Utilities for', max_new_tokens=64, trace=True, **sampling)
    print(f'\nWhat it writes so far. It has seen text for a minute:\n\n"""Utilities for{out.texts[0]}\n')
    keep("text of the small model", lm, out)
    print("Your own text: redraft train stdlib-demo --data.source FOLDER --out runs/mine")
    print("Longer:", longer_command(config, steps=outcome.steps))
    print("Serve it: redraft serve", folder)
    print("Try next:", *next_steps(config), sep="\n  ", end="\n\n")
    return folder
