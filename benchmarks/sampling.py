"""Sampling against its limits: the bare forwards, the minimal plan, LLaDA's published loop, autoregression.

    python benchmarks/sampling.py [--parts overhead queries] [--models 100m demo] [--rounds 3] [--clock cpu] [--quick]
    git worktree add ../before HEAD~1 && python benchmarks/sampling.py --against ../before --models demo --clock cpu

Random weights: only the work counts. Ours and the other take turns in one process; ratios are per pair, medians are
printed. `--clock cpu` counts the seconds that the process ran: with one thread, what the wall clock would show on a
machine that runs nothing else. `--quick` runs everything on tiny models, to see that it runs. `--against` runs the part
"against" alone where no parts are named: there each checkout has a process of its own.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe
from paired import Worker, in_turns, with_interval

import redraft
from redraft.language_model import LanguageModel
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.sampling.propose import propose

MASK = 2
TIMED_FORWARDS = 2  # of the published loop
PAIRS_PER_PROCESS = 3


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
    shape=ModelConfig(size="hidden=32,layers=1,heads=2,intermediate=64"),
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
    aim: dict[str, Any]
    """What the slots must be told again, where the cache is the same object in all forwards."""
    num_logits: int


@contextmanager
def recorded(model: Any) -> Iterator[list[Call]]:
    """Record the forwards of a model."""
    calls: list[Call] = []

    def record(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        slots: Any = inputs.get("past_key_values")
        aim = {"spans": slots.spans, "_where": slots._where} if hasattr(slots, "aim") else {}
        calls.append(Call(inputs=inputs, aim=aim, num_logits=len(output.logits)))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def replay(model: Any, calls: list[Call]) -> None:
    """Run the same forwards without a sampler: the body, then the head at as many positions."""
    for call in calls:
        for name, value in call.aim.items():
            setattr(call.inputs["past_key_values"], name, value)
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
    shape = replace(setup.shape, size=f"{setup.shape.size},layers={min(2, setup.shape.dimensions.layers)}")
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


def plain_proposal(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose as one writes it down: whole tensors in float32."""
    logits = logits.float()
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    if temperature == 0:
        return log_p.max(dim=-1)
    ends = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    x_0 = torch.searchsorted(ends, u[:, None].float() * ends[:, -1:]).clamp(max=logits.shape[1] - 1)
    return log_p.gather(-1, x_0)[:, 0], x_0[:, 0]


def fused_passes(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """Read the logits as a compiled proposal has to, and no more: maximum, normaliser, mass by chunk."""
    logits = logits.float()
    best, x_0 = logits.max(dim=-1)
    z = logits - best[:, None]
    total = z.exp().sum(dim=-1)
    if temperature == 0:
        return best, x_0, total
    return best, total, F.pad((z / temperature).exp(), (0, -z.shape[1] % 512)).view(len(z), -1, 512).sum(dim=-1)


def proposals(setups: dict[str, Setup], rounds: int) -> None:
    """(f) One step's proposals: ours, whole tensors, and torch.compile's fusion of the passes alone."""
    print("| dtype | positions | vocabulary | temperature | ours ms | whole tensors ms | compiled ms |")
    print("|---|---|---|---|---|---|---|")
    is_tiny = next(iter(setups.values())) is TINY
    shapes = [(4, 600)] if is_tiny else [(16, 151936), (128, 151936), (16, 8192)]
    for dtype in (torch.float32, torch.bfloat16):
        for n, vocab_size in shapes:
            for temperature in (0.0, 0.7):
                logits = torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
                u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                torch.compiler.reset()
                fused = fused_passes if is_tiny else torch.compile(fused_passes, dynamic=False)
                ways = [
                    partial(propose, logits, never=MASK, u=u, temperature=temperature),
                    partial(plain_proposal, logits, u, temperature),
                    partial(fused, logits, u, temperature),
                ]
                times = [[seconds(way) for way in ways] for _ in range(3 * rounds + 1)][1:]
                row = " | ".join(f"{1000 * statistics.median(column):.2f}" for column in zip(*times, strict=True))
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {n} | {vocab_size} | {temperature} | {row} |", flush=True)


def compiled(setups: dict[str, Setup], rounds: int) -> None:
    """(g) Generation with the model's body compiled against without."""
    print("| model | decoding | first call s | eager s | compiled s | x |")
    print("|---|---|---|---|---|---|")
    for name, setup in setups.items():
        for cached, way in ((True, f"blocks of {setup.block}, exact cache"), (False, "whole canvas")):
            if setup is TINY:
                continue
            more: dict[str, Any] = (
                {} if cached else {"block_size": None, "steps_per_block": None, "steps": setup.new // 4}
            )
            chosen = settings_of(setup, **more)
            eager, other = (load(setup, is_block_causal=cached) for _ in range(2))
            faster = replace(other, denoiser=other.denoiser.compiled())
            start = time.perf_counter()  # always the wall clock: other processes compile
            faster.generate(prompts(setup), **chosen)
            first = time.perf_counter() - start
            ways = (
                partial(eager.generate, prompts(setup), **chosen),
                partial(faster.generate, prompts(setup), **chosen),
            )
            times = pairs(*ways, rounds)
            took = [statistics.median(column) for column in zip(*times, strict=True)]
            ratio = statistics.median(plain / ours for plain, ours in times)
            print(f"| {name} | {way} | {first:.0f} | {took[0]:.2f} | {took[1]:.2f} | {ratio:.2f} |", flush=True)


@cache
def loaded(name: str, is_cached: bool) -> LanguageModel:
    """Build a model once in a worker."""
    return load(MODELS[name], is_block_causal=is_cached)


def case_of(name: str, rows: int, is_cached: bool) -> Callable[[], object]:
    """Prepare a generation that takes about as long with many rows as with one."""
    setup = MODELS[name]
    if is_cached:
        chosen = settings_of(setup, tokens_per_forward=1 if rows == 1 and setup.vocab_size < LARGE.vocab_size else 4)
    else:
        steps = max(2, setup.new // (4 if rows == 1 else 16))
        chosen = settings_of(setup, block_size=None, steps_per_block=None, steps=steps)
    return partial(loaded(name, is_cached).generate, prompts(setup, rows), **chosen)


def work() -> None:
    """Run one generation for each line that comes in, and answer its seconds."""
    print(json.dumps(str(Path(redraft.__file__).resolve().parent)), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(case_of(*json.loads(line)))), flush=True)


def against(names: list[str], rounds: int, checkout: Path) -> None:
    """(h) Generation with this checkout against another one: pairs in turns, a process of one thread for each."""
    flags = ["--worker", "--clock", next(name for name, function in CLOCKS.items() if function is clock)]
    script = Path(__file__)
    other = checkout / "benchmarks" / script.name  # its own, in which the package has its own names
    print("| model | rows | decoding | now s | before s | now / before, 95 % interval of the median | pairs |")
    print("|---|---|---|---|---|---|---|")
    for name, rows, is_cached in product(names, (1, 32), (True, False)):
        setup = MODELS[name]
        if rows > 1 and setup.vocab_size == LARGE.vocab_size:
            continue  # minutes for each generation
        times: list[tuple[float, float]] = []
        while len(times) < rounds:  # processes differ too: in the memory that they give back and get again
            with Worker(script.parents[1], script, flags) as now, Worker(checkout, other, flags) as before:
                times += in_turns(now, before, (name, rows, is_cached), min(PAIRS_PER_PROCESS, rounds - len(times)))
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = with_interval([first / second for first, second in times])
        way = f"blocks of {setup.block}, exact cache" if is_cached else "whole canvas"
        print(f"| {name} | {rows} | {way} | {ours:.3f} | {theirs:.3f} | {ratio} | {rounds} |", flush=True)


MODELS = {"100m": LARGE, "100m-float32": replace(LARGE, dtype=torch.float32), "demo": DEMO, "tiny": TINY}
PARTS = {
    "overhead": overhead,
    "queries": queries,
    "published": published,
    "autoregressive": autoregressive,
    "scaling": scaling,
    "proposals": proposals,
    "compiled": compiled,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=None, choices=[*PARTS, "against"], help="default: all")
    parser.add_argument("--models", nargs="+", default=["100m", "demo"], choices=["100m", "100m-float32", "demo"])
    parser.add_argument("--rounds", type=int, default=None, help="pairs (default: 3; of --against 20)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other checkout of the part of this name")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    global clock
    clock = CLOCKS[args.clock]
    if args.worker:
        work()
        return
    parts = args.parts or (["against"] if args.against else list(PARTS))
    if "against" in parts and (args.against is None or not Path(args.against, "redraft").is_dir()):
        parser.error(f"--against must be a folder that holds redraft/; got {args.against}.")
    names = ["tiny"] if args.quick else args.models
    print(describe(Path(__file__).name, sys.argv[1:] if arguments is None else arguments))
    for part in parts:
        rounds = 1 if args.quick else args.rounds or (20 if part == "against" else 3)
        print(f"\n## {part}\n\n{(PARTS | {'against': against})[part].__doc__}\n")
        if part == "against":
            against(names, rounds, args.against)
        else:
            PARTS[part]({name: MODELS[name] for name in names}, rounds)


if __name__ == "__main__":
    main()
