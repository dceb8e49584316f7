"""What thinking costs by blocks and by denoising steps: seconds and forwards per sample, beside autoregression.

    python benchmarks/latent_cost.py [--rows 64] [--rounds 5]

Random weights of the shape of the recipe `latent-denoiser`, blocks of four tokens in two latents, all blocks thought.
"AR" is a Llama of the same width and depth that writes as many tokens as the blocks hold, with its cache. Medians of
rounds in turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.encode import word_tokenizer
from redraft.latent.tasks import WorkedExample
from redraft.latent.thinking import Thinker

BLOCKS, STEPS = (1, 2, 4, 8), (1, 4, 16)
BLOCK_TOKENS = 4
PROMPT = "1 2 3 4"


def make_thinker() -> Thinker:
    """Build a thinker that knows nothing."""
    tokenizer = word_tokenizer([WorkedExample(prompt=PROMPT, blocks=("1 + 2 3",), answer="")])
    size = len(tokenizer)
    denoiser = LatentDenoiserConfig(vocab_size=size, prompt_tokens=len(PROMPT.split()), max_blocks=max(BLOCKS))
    autoencoder = AutoencoderConfig(vocab_size=size, block_tokens=BLOCK_TOKENS, num_layers=0)
    thinker = Thinker(LatentDenoiser(denoiser).eval(), TextAutoencoder(autoencoder).eval(), tokenizer)
    thinker.autoencoder.scale.fill_(1.0)  # as if fitted
    return thinker


def make_writer(size: int) -> LlamaForCausalLM:
    """Build the autoregressive model of the same width and depth."""
    config = LlamaConfig(
        vocab_size=size, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time all of them in turns, once more than is counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="samples in one batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    thinker = make_thinker()
    writer, prompt = make_writer(len(thinker.tokenizer)), torch.ones(args.rows, len(PROMPT.split()), dtype=torch.int64)

    def think(blocks: int, steps: int) -> Callable[[], list]:
        settings = {"blocks": blocks, "steps": steps, "num_samples": args.rows, "solver": "ddim"}
        return lambda: thinker.think(PROMPT, **settings)

    def write(blocks: int) -> Callable[[], object]:
        tokens = blocks * BLOCK_TOKENS
        return lambda: writer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
        )

    runs: dict[str, Callable[[], object]] = {}
    for blocks in BLOCKS:
        runs |= {f"{blocks} {steps}": think(blocks, steps) for steps in STEPS}
        runs[f"{blocks} AR"] = write(blocks)
    seconds = medians(runs, args.rounds)
    print(describe(Path(__file__).name, sys.argv[1:]))
    print("Milliseconds per sample (forwards); the last column: 16 steps against AR.\n")
    print(f"| blocks | {' | '.join(f'{steps} steps' for steps in STEPS)} | AR | ratio |")
    print("|---" * (len(STEPS) + 3) + "|")
    for blocks in BLOCKS:
        cells = [f"{1000 * seconds[f'{blocks} {s}'] / args.rows:.2f} ({blocks * (s + 1)})" for s in STEPS]
        written, slowest = seconds[f"{blocks} AR"], seconds[f"{blocks} {STEPS[-1]}"]
        cells.append(f"{1000 * written / args.rows:.2f} ({blocks * BLOCK_TOKENS})")
        print(f"| {blocks} | {' | '.join(cells)} | {slowest / written:.2f} |")


if __name__ == "__main__":
    main()
