"""What does one model for reading and for drafting cost? AR, block diffusion, and both at once, of one shape.

    python benchmarks/joining.py --size 1m --seeds 0 1 2

Each method gets the same windows, batches, optimizer steps, learning rate and seed. Two numbers on the same held-out
windows: the exact autoregressive NLL of all tokens but each window's first, and the NELBO in blocks, one fixed noise.
A clean copy that attends in blocks (BD3LM) has no autoregressive NLL; an autoregressive model has no blocks.
Seconds are of CPU, for the training alone. Runs are kept in a folder; what is finished is not repeated.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from machine import describe
from outcome import whole
from rich.console import Console

import redraft
from redraft.data.collate import collate
from redraft.data.config import DataConfig
from redraft.data.prepare import PreparedData, prepare
from redraft.data.tokenizer import token_byte_lengths
from redraft.likelihood.config import ObjectiveConfig
from redraft.models.config import ModelConfig
from redraft.training.callbacks import LOG_FILE, read_log
from redraft.training.config import RunConfig, TrainConfig
from redraft.training.run import run

BLOCK = 4
CAUSAL = {"kind": "block", "block_size": BLOCK, "context": "causal"}
METHODS = {
    "AR": ObjectiveConfig(kind="ar"),
    "BD3LM": ObjectiveConfig(kind="block", block_size=BLOCK),
    "causal context": ObjectiveConfig(**CAUSAL),
    "joint, 0.2 AR": ObjectiveConfig(**CAUSAL, ar_weight=0.2),
    "joint, 1 AR": ObjectiveConfig(**CAUSAL, ar_weight=1.0),
    "joint, 3.3 AR": ObjectiveConfig(**CAUSAL, ar_weight=3.3),
    "joint, 1 AR, blocks grow": ObjectiveConfig(**CAUSAL, ar_weight=1.0, smallest_block=1, grow_steps=200),
}
RESULT = "joining.json"


def config_of(method: str, args: argparse.Namespace, *, seed: int) -> RunConfig:
    """Make the run of a method and a seed."""
    name = "".join(character if character.isalnum() else "-" for character in f"{args.size}-{method}-{seed}")
    return RunConfig(
        out=str(args.runs / name),
        data=DataConfig(seq_len=args.seq_len, vocab_size=args.vocab_size),
        model=ModelConfig(size=args.size),
        objective=METHODS[method],
        train=TrainConfig(
            optimizer="muon", learning_rate=args.rate, batch_size=args.batch_size, max_steps=args.steps, seed=seed,
            save_every=args.save_every, max_validation_windows=args.windows, compile=args.compile,
        ),
    )  # fmt: skip


@torch.no_grad()
def autoregressive_nats(folder: str, data: PreparedData, *, windows: int) -> tuple[float, float]:
    """Score all tokens but the first of each window by a plain causal forward; nats per token, bits per byte."""
    lm = redraft.load(folder, device="cpu")
    lengths, nats, num_tokens, num_bytes = token_byte_lengths(data.tokenizer), 0.0, 0, 0
    step = len(data.validation) / windows
    for index in torch.arange(windows).split(16):
        batch = collate([data.validation[int(int(i) * step)] for i in index], pad_token_id=0)["input_ids"].long()
        logits = lm.model(batch).logits[:, :-1].float()
        logits[..., lm.denoiser.settings.mask_token_id] = -torch.inf
        nats += float(-logits.log_softmax(dim=-1).gather(2, batch[:, 1:, None]).double().sum())
        num_tokens += batch[:, 1:].numel()
        num_bytes += int(lengths[batch[:, 1:]].sum())
    return nats / num_tokens, nats / num_bytes / math.log(2)


def measure(method: str, args: argparse.Namespace, data: PreparedData, *, seed: int) -> dict[str, float]:
    """Train and score, or return what was measured before."""
    config = config_of(method, args, seed=seed)
    path = Path(config.out) / RESULT
    if not path.exists():
        begun = time.process_time()
        whole(run(config, resume=Path(config.out).exists(), console=Console(quiet=True)))
        found = {"cpu_seconds": time.process_time() - begun}
        objective = config.objective
        if objective.kind == "block":
            last = [line for line in read_log(Path(config.out) / LOG_FILE) if "eval_bits_per_byte" in line][-1]
            found |= {"block_nats": last["eval_nats_per_token"], "block_bits": last["eval_bits_per_byte"]}
        if objective.kind == "ar" or objective.ar_weight:
            windows = min(args.windows, len(data.validation))
            found["ar_nats"], found["ar_bits"] = autoregressive_nats(config.out, data, windows=windows)
        path.write_text(json.dumps(found) + "\n")
        print(f"{method}, seed {seed}: {found}", file=sys.stderr)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def spread(values: list[float]) -> str:
    """Format a mean, and the standard deviation of several."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--size", default="1m", help="named shape of the model")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32, help="windows of a step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--windows", type=int, default=256, help="held-out windows")
    parser.add_argument("--rate", type=float, default=2e-3, help="Muon's peak learning rate")
    parser.add_argument("--compile", choices=("off", "auto"), default="off")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/joining"))
    args = parser.parse_args()
    first = config_of(args.methods[0], args, seed=0)
    data = prepare(first.data)
    print(describe(f"joining.py {' '.join(sys.argv[1:])}", []))
    print(f"{len(data.train) * args.seq_len:,} training tokens, {args.steps * args.batch_size * args.seq_len:,} seen\n")
    print("| | AR NLL, nats/token | bits/byte | blocks' NELBO, nats/token | bits/byte | CPU s |")
    print("|---|---|---|---|---|---|")
    for method in args.methods:
        found = [measure(method, args, data, seed=seed) for seed in args.seeds]
        columns = ("ar_nats", "ar_bits", "block_nats", "block_bits")
        cells = [spread([f[name] for f in found]) if name in found[0] else "" for name in columns]
        seconds = statistics.mean(f["cpu_seconds"] for f in found)
        print(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
