"""Seconds of a training step in two checkouts, in turns: what a redesign may not slow down.

    git worktree add ../before HEAD~1
    python benchmarks/step.py ../before [--pairs 20] [--steps 20]

Each checkout trains in a process of one thread: a model of 1 M parameters on text, masked and block diffusion. Each
runs its own copy of the package; this file handles the names of both.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe
from paired import Worker, in_turns, with_interval
from rich.console import Console

import redraft

KINDS = ("masked", "block")


def seconds(kind: str, steps: int) -> float:
    """Train some steps, and return the processor time of one, without what comes before the first."""
    from transformers import TrainerCallback

    from redraft.recipes import RECIPES
    from redraft.training.run import run

    class Clock(TrainerCallback):
        started = ended = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = self.started or time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended = time.process_time()

    clock = Clock()
    recipe = RECIPES["stdlib-tiny"]()
    objective = replace(recipe.objective, kind="block", block_size=16) if kind == "block" else recipe.objective
    train = replace(recipe.train, max_steps=steps, save_every=steps, compile="off", precision="float32", batch_size=8)
    limit = "max_validation_windows" if hasattr(train, "max_validation_windows") else "final_eval_windows"
    config = replace(recipe, out=f"run-{time.time_ns()}", objective=objective, train=replace(train, **{limit: 1}))
    original = run.__globals__["drive"]
    run.__globals__["drive"] = lambda config, trainer, **more: (
        trainer.add_callback(clock),
        original(config, trainer, **more),
    )[1]
    try:
        run(config, console=Console(quiet=True))
    finally:
        run.__globals__["drive"] = original
    return (clock.ended - clock.started) / steps


def worker(steps: int) -> None:
    """Answer with the seconds of a step of each kind that is asked for."""
    import json

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # the run prints, too
    print(json.dumps(str(Path(redraft.__file__).parent)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(json.loads(line), steps)), file=answers, flush=True)


def main() -> None:
    """Time both checkouts in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of each measurement (default: 20)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.steps)
    if args.before is None or not Path(args.before, "redraft").is_dir():
        parser.error("name a folder that holds redraft/")
    print(describe("step.py", sys.argv[1:]), end="\n\n")
    print("| objective | now s | before s | now / before, 95 % interval of the median | pairs |")
    print("|---|---|---|---|---|")
    script, flags = Path(__file__), ["--worker", "--steps", str(args.steps)]
    for kind in KINDS:
        with Worker(script.parents[1], script, flags) as now, Worker(args.before, script, flags) as before:
            times = in_turns(now, before, kind, args.pairs)
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = with_interval([first / second for first, second in times])
        print(f"| {kind} | {ours:.4f} | {theirs:.4f} | {ratio} | {args.pairs} |", flush=True)
    return None


if __name__ == "__main__":
    main()
