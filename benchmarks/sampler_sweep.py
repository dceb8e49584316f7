"""Which sampler suits a checkpoint? Texts of each, judged by an autoregressive model of another make.

    redraft convert SmolLM2-135M-Instruct.Q4_1.gguf judge --autoregressive
    python benchmarks/sampler_sweep.py redraft/austen --judge judge --source austen

Prompts are the beginnings of held-out windows. Bits per byte are the judge's, of what is written given the prompt; of
the true continuation they stand in the first row. The nearer to it the better: less is a text that repeats itself.
Repeats: the share of its runs of four words that stood before in the same text.
"""

import argparse
import itertools
import math
import statistics
import sys
from typing import Any

import torch
from machine import describe

import redraft
from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.language_model import LanguageModel


@torch.no_grad()
def bits_per_byte(judge: LanguageModel, prompt: str, text: str) -> float:
    """Judge a text after its prompt."""
    whole = judge.encode(prompt + text)
    shared = len(judge.encode(prompt))
    logits = judge.model(whole[None, :-1]).logits[0].float()
    nats = -logits.log_softmax(dim=-1).gather(1, whole[1:, None])[max(shared - 1, 0) :].sum()
    return float(nats) / math.log(2) / max(1, len(text.encode()))


def repeats(text: str) -> float:
    """Return the share of runs of four words that stood before."""
    words = text.split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def row(name: str, judge: LanguageModel, prompts: list[str], texts: list[str]) -> None:
    """Print a row of the table."""
    bits = [bits_per_byte(judge, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    error = statistics.stdev(bits) / len(bits) ** 0.5
    again = statistics.mean(map(repeats, texts))
    print(f"| {name} | {statistics.mean(bits):.2f} ± {error:.2f} | {100 * again:.1f} % |", flush=True)


def main() -> None:
    """Sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--judge", required=True, help="an autoregressive model, as redraft reads it")
    parser.add_argument("--source", default="stdlib", help="what the model was trained on")
    parser.add_argument("--presets", nargs="+", default=["llada", "llada-random"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 0.85, 1.0])
    parser.add_argument("--top-p", nargs="+", type=float, default=[0.9])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--given", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    args = parser.parse_args()
    lm, judge = redraft.load(args.model), redraft.load(args.judge)
    windows = prepare(DataConfig(source=args.source, seq_len=256, vocab_size=len(lm.tokenizer))).validation
    step = len(windows) // args.prompts
    ids = [torch.as_tensor(windows[i * step]["input_ids"]).long() for i in range(args.prompts)]
    prompts = [lm.decode(one[: args.given]) for one in ids]
    print(describe(f"sampler_sweep.py {' '.join(sys.argv[1:])}", []))
    print("| sampler | bits per byte | repeats |\n|---|---|---|")
    row("the true text", judge, prompts, [lm.decode(one[args.given :][: args.new]) for one in ids])
    for preset, block, temperature, top_p in itertools.product(
        args.presets, args.blocks, args.temperatures, args.top_p
    ):
        settings: dict[str, Any] = {"preset": preset, "block_size": block, "temperature": temperature, "top_p": top_p}
        out = lm.generate(prompts, max_new_tokens=args.new, stop=None, seed=0, **settings)
        assert out.texts is not None
        row(f"{preset}, blocks of {block}, T {temperature:g}, top-p {top_p:g}", judge, prompts, out.texts)


if __name__ == "__main__":
    main()
