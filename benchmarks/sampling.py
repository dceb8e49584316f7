"""Sampling against its limits: the bare forwards, the minimal plan, LLaDA's published loop, autoregression.

    python benchmarks/sampling.py [--parts overhead queries published autoregressive scaling] [--rounds 3] [--quick]

Random weights: only the work counts. Ours and the other take turns in one process; ratios are per pair, medians are
printed. `--clock cpu` counts the seconds that the process ran: with one thread, what the wall clock would show on a
machine that runs nothing else. `--quick` runs everything on tiny models, to see that it runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe

from redraft.language_model import LanguageModel
from redraft.models.build import ModelConfig, build_model
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings

MASK = 2
TIMED_FORWARDS = 2  # of the published loop


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and the length of its task."""

    shape: ModelConfig
    vocab_size: int
    dtype: torch.dtype = torch.float32
    prompt: int = 64
    new: int = 64
    block: int = 16


LARGE = Setup(shape=ModelConfig(size="30m"), vocab_size=151936, dtype=torch.bfloat16)  # 103 M parameters
DEMO = Setup(shape=ModelConfig(size="5m"), vocab_size=4096)
TINY = Setup(
    shape=ModelConfig(size="1m", hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64),
    vocab_size=600,
    prompt=8,
    new=8,
    block=4,
)


class Tokens:
    """Special ids of a model that is never asked for text."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = None, 1, 0, MASK

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def load(setup: Setup, *, is_block_causal: bool) -> LanguageModel:
    """Build a random model."""
    torch.manual_seed(0)
    settings = DiffusionSettings(mask_token_id=MASK, block_size=setup.block if is_block_causal else None)
    shape = replace(setup.shape, max_positions=4096)
    model = build_model(shape, settings, tokenizer=Tokens(setup.vocab_size)).to(setup.dtype).eval()
    return LanguageModel(denoiser=Denoiser(model, settings))


def prompts(setup: Setup, batch: int = 1) -> list[list[int]]:
    """Make random prompts."""
    rows = torch.randint(3, setup.vocab_size, (batch, setup.prompt), generator=torch.Generator().manual_seed(0))
    return rows.tolist()


def settings_of(setup: Setup, *, tokens_per_forward: int = 1, temperature: float = 0.0, **more: Any) -> dict[str, Any]:
    """Settings of block decoding."""
    return {
        "max_new_tokens": setup.new,
        "block_size": setup.block,
        "steps_per_block": setup.block // tokens_per_forward,
        "temperature": temperature,
        "stop": None,
    } | more


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward of a generation."""

    inputs: dict[str, Any]
    spans: Any
    where: Any
    num_logits: int


@contextmanager
def recorded(model: Any) -> Iterator[list[Call]]:
    """Record the forwards of a model."""
    calls: list[Call] = []

    def record(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        slots = inputs.get("past_key_values")
        spans, where = (slots.spans, slots._where) if slots else (None, None)
        calls.append(Call(inputs=inputs, spans=spans, where=where, num_logits=len(output.logits)))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def replay(model: Any, calls: list[Call]) -> None:
    """Run the same forwards without a sampler: the body, then the head at as many positions."""
    for call in calls:
        if call.spans is not None:
            slots = call.inputs["past_key_values"]
            slots.spans, slots._where = call.spans, call.where
        hidden = model.base_model(**call.inputs).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[: call.num_logits])


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start = clock()
    action()
    return clock() - start


def pairs(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Time two ways in turns, after one round that does not count."""
    return [(seconds(first), seconds(second)) for _ in range(rounds + 1)][1:]


def eta_of(
    lm: LanguageModel, batch: list[list[int]], chosen: dict[str, Any], rounds: int
) -> tuple[float, float, list[Call]]:
    """Return bare forwards / generation, the seconds of a generation, and its forwards."""
    with recorded(lm.model) as calls:
        lm.generate(batch, **chosen)
    times = pairs(partial(lm.generate, batch, **chosen), partial(replay, lm.model, calls), rounds)
    return statistics.median(bare / ours for ours, bare in times), statistics.median(ours for ours, _ in times), calls


def overhead(setups: dict[str, Setup], rounds: int) -> None:
    """(a) Time of the bare forwards at the same shapes / time of generate."""
    print("| model | decoding | temperature | bare forwards / generate | ms beside each forward | tokens/s |")
    print("|---|---|---|---|---|---|")
    for name, setup in setups.items():
        for cached, way in ((True, f"blocks of {setup.block}, exact cache"), (False, "whole canvas")):
            lm = load(setup, is_block_causal=cached)
            more: dict[str, Any] = (
                {} if cached else {"block_size": None, "steps_per_block": None, "steps": setup.new // 4}
            )
            for drawing in ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.8, "top_p": 0.9}):
                eta, took, calls = eta_of(lm, prompts(setup), settings_of(setup, **drawing, **more), rounds)
                label = ", top_p ".join(str(value) for value in drawing.values())
                beside = 1000 * took * (1 - eta) / len(calls)
                print(f"| {name} | {way} | {label} | {eta:.3f} | {beside:.2f} | {setup.new / took:.1f} |", flush=True)


def queries(setups: dict[str, Setup], rounds: int) -> None:
    """(b) Query tokens forwarded / the fewest that the policy needs."""
    print("The fewest: the prompt once, the open block in every step, every finished block but the last once more.\n")
    print("| model | tokens per forward | forwards | query tokens | the fewest | ratio |")
    print("|---|---|---|---|---|---|")
    for name, setup in setups.items():
        lm = load(setup, is_block_causal=True)
        for per_forward in (1, 4):
            with recorded(lm.model) as calls:
                lm.generate(prompts(setup), **settings_of(setup, tokens_per_forward=per_forward))
            fed = sum(call.inputs["input_ids"].numel() for call in calls)
            fewest = setup.prompt + setup.block * len(calls) + setup.new - setup.block
            print(f"| {name} | {per_forward} | {len(calls)} | {fed} | {fewest} | {fed / fewest:.3f} |", flush=True)


@torch.no_grad()
def published_loop(
    model: Any, prompt: torch.Tensor, *, new: int, block: int, steps_per_block: int, temperature: float, most: int
) -> None:
    """LLaDA's sampler as published (Algorithm 5 of arXiv 2502.09992): full canvas, all logits, float64 noise.

    Stops after `most` forwards; all of them cost the same.
    """
    x = torch.cat([prompt, torch.full((1, new), MASK)], dim=1)
    done = 0
    for start in range(prompt.shape[1], x.shape[1], block):
        quota = torch.full((steps_per_block,), block // steps_per_block)
        quota[: block % steps_per_block] += 1
        for step in range(steps_per_block):
            if done == most:
                return
            is_mask = x == MASK
            logits = model(input_ids=x).logits
            noisy = logits
            if temperature > 0:
                noisy = logits.to(torch.float64)
                noisy = noisy.exp() / (-torch.log(torch.rand_like(noisy))) ** temperature
            x_0 = noisy.argmax(dim=-1)
            p = F.softmax(logits.to(torch.float64), dim=-1).gather(-1, x_0[..., None])[..., 0]
            p[:, start + block :] = -torch.inf
            confidence = torch.where(is_mask, p, -torch.inf)
            chosen = confidence[0].topk(int(quota[step])).indices
            x[0, chosen] = x_0[0, chosen]
            done += 1


def published(setups: dict[str, Setup], rounds: int) -> None:
    """(c) Wall time against LLaDA's published loop, at the same number of forwards."""
    print("The published loop is timed over its first forwards, all of one cost, and scaled to all of them.\n")
    print("| model | new tokens | decoding | temperature | forwards | ours s | published s | x |")
    print("|---|---|---|---|---|---|---|---|")
    for name, setup in setups.items():
        for cached in (True, False):
            new = setup.new * 4 if cached else setup.new
            forwards, size = new // 2, setup.block if cached else new
            lm, plain = load(setup, is_block_causal=cached), load(setup, is_block_causal=False)
            for temperature in (0.0, 0.7):
                chosen = settings_of(setup, temperature=temperature, max_new_tokens=new, block_size=size)
                chosen["steps_per_block"] = size // 2
                theirs = partial(
                    published_loop, plain.model, torch.tensor(prompts(setup)), new=new, block=size,
                    steps_per_block=size // 2, temperature=temperature, most=TIMED_FORWARDS,
                )  # fmt: skip
                times = pairs(partial(lm.generate, prompts(setup), **chosen), theirs, rounds)
                scale = forwards / TIMED_FORWARDS
                ours = statistics.median(first for first, _ in times)
                other = statistics.median(second for _, second in times) * scale
                faster = statistics.median(second / first for first, second in times) * scale
                way = f"blocks of {size}, exact cache" if cached else "whole canvas"
                print(
                    f"| {name} | {new} | {way} | {temperature} | {forwards} | {ours:.1f} | {other:.1f} | "
                    f"{faster:.1f} |", flush=True,
                )  # fmt: skip


def autoregressive(setups: dict[str, Setup], rounds: int) -> None:
    """(d) Tokens/s against transformers' generate of the same architecture with its KV cache."""
    print("| model | decoding | tokens/s | x autoregressive |")
    print("|---|---|---|---|")
    for name, setup in setups.items():
        lm = load(setup, is_block_causal=True)
        other = load(setup, is_block_causal=False).model
        other.config.is_causal = True
        for layer in other.base_model.layers:
            layer.self_attn.is_causal = True
        found = []
        theirs = partial(
            other.generate, torch.tensor(prompts(setup)), max_new_tokens=setup.new, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
        for per_forward in [n for n in (1, 2, 4, 8) if n <= setup.block]:
            chosen = settings_of(setup, tokens_per_forward=per_forward)
            times = pairs(partial(lm.generate, prompts(setup), **chosen), theirs, rounds)
            faster = statistics.median(second / first for first, second in times)
            rate = setup.new / statistics.median(first for first, _ in times)
            found.append((faster, setup.new / statistics.median(second for _, second in times)))
            way = f"blocks of {setup.block}, {per_forward} tokens per forward"
            print(f"| {name} | {way} | {rate:.1f} | {faster:.2f} |", flush=True)
        print(f"| {name} | autoregressive | {statistics.median(rate for _, rate in found):.1f} | 1 |")
        print(f"| {name} | break-even at {1 / found[0][0]:.1f} tokens per forward | | |")


def scaling(setups: dict[str, Setup], rounds: int) -> None:
    """(e) Scaling with batch, canvas and vocabulary, on two layers."""
    setup = next(iter(setups.values()))
    shape = replace(setup.shape, num_layers=min(2, setup.shape.shape.num_layers))
    is_tiny = setup is TINY
    base = replace(setup, shape=shape, vocab_size=min(8192, setup.vocab_size), new=2 * setup.block)
    points = [("batch", 1), ("batch", 8), ("batch", 32), ("canvas", 64), ("canvas", 512), ("canvas", 2048)]
    points += [("vocabulary", 8192), ("vocabulary", 32768), ("vocabulary", 151936)]
    print("| what | value | decoding | forwards | ms per forward | bare forwards / generate | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for what, value in [("batch", 2), ("canvas", 24), ("vocabulary", 700)] if is_tiny else points:
        at = base
        if what == "canvas":
            at = replace(base, prompt=value - base.new)
        if what == "vocabulary":
            at = replace(base, vocab_size=value)
        for cached in (True, False):
            lm = load(at, is_block_causal=cached)
            chosen = settings_of(at, tokens_per_forward=4)
            chosen |= {} if cached else {"block_size": None, "steps_per_block": None, "steps": at.new // 4}
            batch = prompts(at, value if what == "batch" else 1)
            eta, took, calls = eta_of(lm, batch, chosen, rounds)
            way = f"blocks of {at.block}, exact cache" if cached else "whole canvas"
            per_forward, rate = 1000 * took / len(calls), len(batch) * at.new / took
            print(
                f"| {what} | {value} | {way} | {len(calls)} | {per_forward:.1f} | {eta:.3f} | {rate:,.0f} |", flush=True
            )


PARTS = {
    "overhead": overhead,
    "queries": queries,
    "published": published,
    "autoregressive": autoregressive,
    "scaling": scaling,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["100m", "demo"], choices=["100m", "100m-float32", "demo"])
    parser.add_argument("--rounds", type=int, default=3, help="pairs")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    args = parser.parse_args(arguments)
    global clock
    clock = CLOCKS[args.clock]
    known = {"100m": LARGE, "100m-float32": replace(LARGE, dtype=torch.float32), "demo": DEMO}
    setups = {"tiny": TINY} if args.quick else {name: known[name] for name in args.models}
    print(describe(Path(__file__).name, sys.argv[1:] if arguments is None else arguments))
    for part in args.parts:
        print(f"\n## {part}\n\n{PARTS[part].__doc__}\n")
        PARTS[part](setups, 1 if args.quick else args.rounds)


if __name__ == "__main__":
    main()
