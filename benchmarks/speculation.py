"""What speculation saves: tokens per forward, drafts accepted, and time against token-by-token decoding.

    python benchmarks/speculation.py runs/a2d-speculate --prose austen --dtype bfloat16

Prompts are the beginnings of held-out windows (code: `stdlib`; prose: a folder of texts) and questions in the model's
chat template. Greedy, one row at a time. A text is cut before its first loop: eight tokens that stood in it before
(loops are easily foretold, and flatter). Each prompt is decoded in turns with preset `ar` and with each way; a ratio is
that of two times in one turn, and the median has an interval of at least 95 %. Rounds have one token more than drafts.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import describe
from paired import with_interval

import redraft
from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.language_model import LanguageModel

QUESTIONS = (
    "What is the capital of France, and what is it known for?", "Explain what a hash table is.",
    "Write a short story about a lost dog.", "How do I boil an egg?", "Name three uses of a magnet.",
    "What is the difference between a list and a tuple in Python?", "Give me tips for learning a language.",
    "Why is the sky blue?", "Summarise the plot of Romeo and Juliet.", "What should I pack for a hike?",
    "How does photosynthesis work?", "Write a polite email that declines an invitation.",
)  # fmt: skip
LOOP = 8


def prompts_of(lm: LanguageModel, args: argparse.Namespace) -> dict[str, list[Any]]:
    """Make the prompts of each domain."""
    found: dict[str, list[Any]] = {}
    for name, source in {"code": "stdlib", "prose": args.prose}.items():
        if source:
            windows = prepare(DataConfig(source=source, seq_len=256), tokenizer=lm.tokenizer).validation
            step = len(windows) // args.prompts
            ids = [torch.as_tensor(windows[i * step]["input_ids"]).long() for i in range(args.prompts)]
            found[name] = [one[: args.given] for one in ids]
    if lm.tokenizer.chat_template:
        found["chat"] = [[{"role": "user", "content": question}] for question in QUESTIONS[: args.prompts]]
    return found


def before_loop(ids: list[int]) -> int:
    """Count the tokens before the first run of `LOOP` that stood in the text before."""
    seen: set[tuple[int, ...]] = set()
    for end in range(LOOP, len(ids) + 1):
        run = tuple(ids[end - LOOP : end])
        if run in seen:
            return max(end - LOOP, 1)
        seen.add(run)
    return len(ids)


@dataclass
class Found:
    """What a way did over the prompts of a domain."""

    tokens: int = 0
    forwards: int = 0
    equal: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    ratios: list[float] = field(default_factory=list)


def timed(lm: LanguageModel, prompt: Any, **settings: Any) -> tuple[redraft.Generation, float]:
    """Generate, and take the time."""
    begun = time.perf_counter()
    out = lm.generate([prompt], temperature=0, stop=None, **settings)
    return out, time.perf_counter() - begun


def measure(lm: LanguageModel, prompts: list[Any], ways: dict[str, dict[str, Any]], new: int) -> dict[str, Found]:
    """Decode each prompt in turns."""
    found = {name: Found() for name in ways}
    for prompt in prompts:
        long, _ = timed(lm, prompt, preset="ar", max_new_tokens=new)
        length = before_loop(long.tokens[0].tolist())
        for name, settings in ways.items():
            timed(lm, prompt, max_new_tokens=4, **settings)
            plain, seconds = timed(lm, prompt, preset="ar", max_new_tokens=length)
            out, other = timed(lm, prompt, max_new_tokens=length, **settings)
            one = found[name]
            one.tokens, one.forwards = one.tokens + length, one.forwards + out.forwards[0]
            one.equal += torch.equal(out.tokens[0], plain.tokens[0])
            one.ratios.append(seconds / other)
            one.accepted.update(dict(enumerate(out.accepted[0])) if out.accepted else {})
    return found


def main() -> None:
    """Measure and print a table for each domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--prose", help="a folder of texts")
    parser.add_argument("--drafts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--presets", nargs="+", default=["speculate", "speculate-ahead"])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--given", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens to write, at most")
    args = parser.parse_args()
    lm = redraft.load(args.model, dtype=args.dtype, device="cpu")
    ways: dict[str, dict[str, Any]] = {"lookup, 8": {"preset": "lookup"}}
    ways |= {f"{name}, {k}": {"preset": name, "block_size": k} for name in args.presets for k in args.drafts}
    print(describe(f"speculation.py {' '.join(sys.argv[1:])}", []))
    for domain, prompts in prompts_of(lm, args).items():
        found = measure(lm, prompts, ways, args.new)
        tokens = statistics.mean([one.tokens for one in found.values()]) / len(prompts)
        print(f"{domain}: {len(prompts)} prompts, {tokens:.0f} tokens each before a loop\n")
        print("| way, drafts | tokens per forward | at least 1, 2, ... drafts accepted, % | ar / way, time | equal |")
        print("|---|---|---|---|---|")
        for name, one in found.items():
            rounds = sum(one.accepted.values())
            shares = [
                100 * sum(n for number, n in one.accepted.items() if number >= least) / max(rounds, 1)
                for least in range(1, max(one.accepted, default=0) + 1)
            ]
            cells = f"{one.tokens / one.forwards:.2f} | {', '.join(f'{share:.0f}' for share in shares)}"
            print(
                f"| {name} | {cells} | {with_interval(one.ratios, '.2f')} | {one.equal} of {len(prompts)} |", flush=True
            )
        print()


if __name__ == "__main__":
    main()
