"""A pretrained decoder finetuned as block diffusion in some minutes on a CPU: loss curve, samples, cost of a step.

    make test-real && python benchmarks/a2d_bd3lm.py --minutes 6 [--gguf FILE] [--block-size 8]

SmolLM2-135M-Instruct (4-bit GGUF, unpacked by `make test-real`) is converted with shifted logits and trained by the
recipe `a2d-bd3lm` on the running Python's standard library: its objective and learning rate, with blocks, windows and
batches that a CPU can take. Held-out numbers are the block-diffusion NELBO on the same windows under one fixed noise.
The minutes bound the training alone. A step is compared, in process time, with the bare forward and backward of
transformers' model on the same (batch, 2 x window) tokens, without noise, masks or optimizer: once the body alone, once
with the head at every position and the cross-entropy.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe
from pretrained_start import CASES
from rich.console import Console

import redraft
from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.problem import CleanRows, NoiseKey, problem_loss
from redraft.models.config import ModelConfig
from redraft.processes.masked import MaskedDiffusion
from redraft.recipes import RECIPES
from redraft.training.config import RunConfig
from redraft.training.run import run

SEQ_LEN, BATCH_SIZE = 128, 8
PROMPTS = ("import os\n\ndef ", "class Counter(dict):\n    def ", "The capital of France is")


def recipe(start: Path, out: Path, *, block_size: int, steps: int, minutes: float | None) -> RunConfig:
    """Return the recipe at the size of a CPU."""
    published = RECIPES["a2d-bd3lm"]()
    assert isinstance(published, RunConfig)
    train = replace(
        published.train, batch_size=BATCH_SIZE, accumulation=1, epochs=None, max_steps=steps, max_minutes=minutes,
        max_validation_windows=64, save_every=10_000, precision="bfloat16", compile="off",
    )  # fmt: skip
    return RunConfig(
        out=str(out), data=DataConfig(seq_len=SEQ_LEN), model=ModelConfig(start=str(start)),
        objective=replace(published.objective, block_size=block_size), train=train,
    )  # fmt: skip


def held_out_before(start: Path, out: Path, *, block_size: int) -> str:
    """Evaluate the converted model: a run of one step that moves nothing that float32 can hold."""
    config = recipe(start, out, block_size=block_size, steps=1, minutes=None)
    config = replace(config, train=replace(config.train, learning_rate=1e-20, weight_decay=0.0))
    return str(run(config, console=Console(quiet=True)).validation)


def curve(folder: Path) -> list[str]:
    """Return rows of step, loss and seconds per step, about ten of them."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = [line for line in lines if "loss" in line and "tokens_per_second" in line]
    chosen = points[:: max(1, len(points) // 10)]
    return [
        f"| {p['step']} | {p['loss']:.3f} | {BATCH_SIZE * SEQ_LEN / max(p['tokens_per_second'], 1):.2f} |"
        for p in chosen
    ]  # fmt: skip


def cpu_seconds(steps: dict[str, Callable[[], torch.Tensor]], model: torch.nn.Module) -> dict[str, list[float]]:
    """Take forward and backward of each in turns, in bfloat16: process time, less the first round of four."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(4):
        for name, step in steps.items():
            begun = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = step()
            loss.backward()
            times[name].append(time.process_time() - begun)
            model.zero_grad()
    return {name: each[1:] for name, each in times.items()}


def step_costs(folder: Path, *, block_size: int) -> list[str]:
    """Return rows of ours and of the bare forward and backward on the same tokens."""
    lm = redraft.load(folder, dtype=torch.float32, device="cpu")
    model, settings = lm.model.train(), lm.denoiser.settings
    windows = prepare(DataConfig(seq_len=SEQ_LEN), tokenizer=lm.tokenizer).train
    x_0 = torch.stack([windows[i]["input_ids"] for i in range(BATCH_SIZE)]).long()
    everywhere = torch.ones_like(x_0)
    rows = CleanRows(x_0=x_0, segment_ids=everywhere, is_target=everywhere.bool(), has_padding=False)
    objective = Diffusion(process=MaskedDiffusion(mask_token_id=settings.mask_token_id), block_size=block_size)
    key = NoiseKey(seed=0, step=0, rows=torch.arange(BATCH_SIZE), total_rows=BATCH_SIZE)
    twice = torch.cat([x_0, x_0], dim=1)

    def with_head() -> torch.Tensor:
        return F.cross_entropy(model(input_ids=twice, use_cache=False).logits.flatten(0, 1).float(), twice.flatten())

    def body() -> torch.Tensor:
        return model.base_model(input_ids=twice, use_cache=False).last_hidden_state.float().square().mean()

    def ours() -> torch.Tensor:
        return problem_loss(lm.denoiser, objective.problem(rows, key), num_rows=BATCH_SIZE)[0] / x_0.numel()

    ways = {"bare, body alone": body, "bare, head at every position": with_head}
    ours_name = "ours: noise, two-copy mask, head at noised positions"
    found = cpu_seconds({ours_name: ours, **ways}, model)
    rows = [f"| {ours_name} | {statistics.median(found[ours_name]):.2f} | |"]
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(found[ours_name], found[name], strict=True))
        rows.append(f"| {name} | {statistics.median(found[name]):.2f} | {ratio:.2f} |")
    return rows


def main() -> None:
    """Convert, evaluate, train, evaluate, sample, time; print all of it as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--gguf", type=Path, default=CASES["smollm2"].source)
    parser.add_argument("--block-size", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        start, out = Path(work) / "start", Path(work) / "run"
        redraft.convert(args.gguf, start, shift_logits=True, block_size=args.block_size)
        before = held_out_before(start, Path(work) / "before", block_size=args.block_size)
        print(f"held out before: {before}", file=sys.stderr, flush=True)
        config = recipe(start, out, block_size=args.block_size, steps=100_000, minutes=args.minutes)
        outcome = run(config, console=Console(stderr=True))
        print(describe(Path(__file__).name, sys.argv[1:]))
        print(f"Held out before: {before}; after {outcome.steps} steps: {outcome.validation}.")
        print(f"Unigram entropy: {outcome.unigram_nats:.3f} nats per token.\n")
        print("| step | training loss | seconds per step, AdamW included |\n|---|---|---|")
        print("\n".join(curve(out)), flush=True)
        print("\n| forward and backward | CPU seconds | ours / this |\n|---|---|---|")
        print("\n".join(step_costs(out, block_size=args.block_size)), flush=True)
        for name, folder in (("before", start), ("after", out)):
            lm = redraft.load(folder, dtype=torch.float32, device="cpu")
            texts = lm.generate(list(PROMPTS), max_new_tokens=32, steps=32, block_size=args.block_size).texts
            print(f"\nSamples {name}, 32 tokens, one per step:\n")
            print(
                "\n".join(f"- {prompt!r} -> {text!r}" for prompt, text in zip(PROMPTS, texts, strict=True)), flush=True
            )


if __name__ == "__main__":
    main()
