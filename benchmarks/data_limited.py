"""When does diffusion beat autoregression? Few data, many epochs: held-out loss of models of one shape.

    python benchmarks/data_limited.py --plot docs/data-limited.svg

Every method has the same model, windows, batches, constant learning rate after a warm-up, and steps. Each tries the
same learning rates in short runs with seed 0, scored on the held-out windows. Diffusion trains with t in (0.02, 0.7],
as the short runs of docs/lab-notes.md do, or, where the name says so, with all t. Held-out numbers are the NLL of AR
and the NELBO over t in (0.001, 1] of the others. A seed changes weights, order and training noise; corpus, held-out
windows and evaluation noise stay.

Finished runs are kept in a file and not repeated; the head of the table says at which commits they were made.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from machine import describe
from outcome import whole
from rich.console import Console

from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.sources import read_documents
from redraft.models.config import ModelConfig
from redraft.training.callbacks import LOG_FILE, read_log
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

CLIPPED = {"t_min": 0.02, "t_max": 0.7}
METHODS = {
    "AR": ObjectiveConfig(kind="ar"),
    "BD3LM(4)": ObjectiveConfig(kind="block", block_size=4, **CLIPPED),
    "BD3LM(16)": ObjectiveConfig(kind="block", block_size=16, **CLIPPED),
    "MDLM": ObjectiveConfig(**CLIPPED),
    "BD3LM(16), all t": ObjectiveConfig(kind="block", block_size=16),
    "MDLM, all t": ObjectiveConfig(),
}
Curve = dict[int, tuple[float, float]]
"""Optimizer steps to held-out nats per token and bits per byte."""


def data_config(args: argparse.Namespace) -> DataConfig:
    """Take the first documents of a source, or every n-th of the standard library: its tables stand side by side."""
    source = args.source
    if args.every:
        source = str(args.runs.with_name(f"every-{args.every}.jsonl"))
        documents = islice(read_documents("stdlib"), args.every - 1, None, args.every)
        Path(source).write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return DataConfig(
        source=source, seq_len=args.seq_len, vocab_size=args.vocab_size, validation_fraction=args.held_out,
        max_documents=None if args.every else args.documents or None,
    )  # fmt: skip


def train(method: str, args: argparse.Namespace, *, rate: float, steps: int, seed: int) -> Curve:
    """Train once in a folder that is removed; return the held-out curve."""
    with tempfile.TemporaryDirectory() as work:
        config = RunConfig(
            out=f"{work}/run",
            data=data_config(args),
            model=ModelConfig(size=args.size, max_positions=2 * args.seq_len),
            objective=METHODS[method],
            train=TrainConfig(
                learning_rate=rate, batch_size=args.batch_size, max_steps=steps, warmup=20 / max(steps, 40),
                decay="constant", seed=seed, save_every=min(args.eval_every, steps), precision=args.precision,
                max_validation_windows=args.windows, compile=args.compile,
            ),
        )  # fmt: skip
        whole(run(config, console=Console(quiet=True)))
        lines = [line for line in read_log(Path(config.out) / LOG_FILE) if "eval_nats_per_token" in line]
    return {line["step"]: (line["eval_nats_per_token"], line["eval_bits_per_byte"]) for line in lines}


def remembered(method: str, args: argparse.Namespace, *, rate: float, steps: int, seed: int) -> Curve:
    """Train, or return the run of these settings from the file."""
    shape = f"{args.size} {args.documents} {args.windows} {args.eval_every}"
    rows = (args.seq_len, args.batch_size, args.vocab_size, args.every, args.held_out)
    if rows != (64, 16, 1024, None, 0.2):
        shape += f" {rows}"
    if args.source != "stdlib":
        shape += f" {args.source}"
    key = f"{method} {shape} {rate:g} {steps} {seed}"
    lines = map(json.loads, args.runs.read_text().splitlines()) if args.runs.exists() else ()
    known = {line["key"]: line for line in lines}
    if key not in known:
        begun = time.process_time()
        curve = train(method, args, rate=rate, steps=steps, seed=seed)
        made = describe(Path(__file__).name, sys.argv[1:]).strip()
        known[key] = {"key": key, "curve": curve, "cpu_seconds": round(time.process_time() - begun), "made": made}
        args.runs.parent.mkdir(parents=True, exist_ok=True)
        with args.runs.open("a") as file:
            file.write(json.dumps(known[key]) + "\n")
        print(known[key], file=sys.stderr)
    args.made.setdefault(known[key]["made"])
    return {int(step): tuple(pair) for step, pair in known[key]["curve"].items()}


def chosen_rate(method: str, args: argparse.Namespace) -> float:
    """Return the learning rate of the lowest held-out loss at the end of the short runs; a single one is taken."""
    if len(args.rates) == 1:
        return args.rates[0]
    steps = args.tuning_steps
    tried = {
        rate: remembered(method, args, rate=rate, steps=steps, seed=0)[steps][0] for rate in args.rates
    }  # fmt: skip
    rate = min(tried, key=tried.__getitem__)
    shown = ", ".join(f"{nats:.3f}" for nats in tried.values())
    print(f"{method}: {shown} nats at {', '.join(f'{r:g}' for r in tried)} after {steps} steps; chosen {rate:g}")
    return rate


def spread(values: list[float]) -> str:
    """Format mean ± standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def mean_nats(curves: list[Curve]) -> dict[int, float]:
    """Average over seeds, step by step."""
    return {step: statistics.mean(curve[step][0] for curve in curves) for step in curves[0]}


def report(results: dict[str, list[Curve]], steps_per_epoch: float) -> None:
    """Print the curves, their minima, the order at equal steps, and where a method passes AR."""
    print(f"\n| steps | epochs | {' | '.join(results)} |\n|---|---|{'---|' * len(results)}")
    steps = list(next(iter(results.values()))[0])
    for step in steps:
        cells = [spread([curve[step][0] for curve in curves]) for curves in results.values()]
        print(f"| {step} | {step / steps_per_epoch:.1f} | {' | '.join(cells)} |")
    print("\n| | lowest nats/token | at epoch | end, nats/token | above its lowest | bits/byte at the end |")
    print("|---|---|---|---|---|---|")
    for name, curves in results.items():
        nats, last = mean_nats(curves), steps[-1]
        best = min(nats, key=nats.__getitem__)
        bits = spread([curve[last][1] for curve in curves])
        print(f"| {name} | {nats[best]:.3f} | {best / steps_per_epoch:.1f} | {nats[last]:.3f} |", end="")
        print(f" {nats[last] - nats[best]:.3f} | {bits} |")
    if "AR" in results:
        report_crossings({name: mean_nats(curves) for name, curves in results.items()}, steps_per_epoch)


def report_crossings(means: dict[str, dict[int, float]], steps_per_epoch: float) -> None:
    """Say from which evaluation on a method stays below AR."""
    for name in [name for name in means if name != "AR"]:
        below = [means[name][step] < means["AR"][step] for step in means["AR"]]
        run_length = next((i for i, is_below in enumerate(reversed(below)) if not is_below), len(below))
        where = list(means["AR"])[-run_length] / steps_per_epoch if run_length else None
        print(f"\n{name}: " + (f"below AR from epoch {where:.1f} on." if where else "not below AR at the end."))


def draw(results: dict[str, list[Curve]], steps_per_epoch: float, path: Path) -> None:
    """Plot the mean over seeds with its standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epochs", ylabel="held-out NLL or NELBO, nats per token")
    for name, curves in results.items():
        epochs = [step / steps_per_epoch for step in curves[0]]
        nats = [[curve[step][0] for curve in curves] for step in curves[0]]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in nats]
        axes.errorbar(epochs, list(mean_nats(curves).values()), spreads, fmt=".-", capsize=2, label=name)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and print; every run is told on standard error as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:4], choices=list(METHODS))
    parser.add_argument("--source", default="stdlib", help="what redraft train reads")
    parser.add_argument("--documents", type=int, default=10, help="documents of the corpus, the first; 0: all")
    parser.add_argument("--every", type=int, help="every n-th document of the standard library instead")
    parser.add_argument("--held-out", type=float, default=0.2, help="fraction of the documents")
    parser.add_argument("--size", default="1m", help="named shape of the model")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of a step")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", choices=("off", "auto"), default="off")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tuning-steps", type=int, default=60)
    parser.add_argument("--eval-every", type=int, default=40)
    parser.add_argument("--windows", type=int, default=96, help="held-out windows")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/data-limited.jsonl"), help="finished runs")
    args = parser.parse_args(namespace=argparse.Namespace(made={}))
    data = prepare(data_config(args))
    steps_per_epoch = len(data.train) / args.batch_size
    print(
        f"{len(data.train) * args.seq_len:,} training tokens, {len(data.validation) * args.seq_len:,} held-out tokens"
    )
    rates = {method: chosen_rate(method, args) for method in args.methods}
    results: dict[str, list[Curve]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method, rate in rates.items():
            results[method].append(remembered(method, args, rate=rate, steps=args.steps, seed=seed))
    report(results, steps_per_epoch)
    print("\n" + "\n".join(args.made))
    if args.plot:
        draw(results, steps_per_epoch, args.plot)


if __name__ == "__main__":
    main()
