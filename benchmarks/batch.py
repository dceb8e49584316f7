"""Rows that leave a running batch, and decisions beside the forward: what they cost.

    python benchmarks/batch.py [--parts leave decide] [--rounds 50] [--clock cpu] [--quick]

Random weights: only the work counts. Medians, with an interval of at least 95 % where one is given (order
statistics). `--clock cpu` counts the seconds that the process ran. `--quick` runs everything at tiny sizes, to see that
it runs. Numbers of one thread: set OMP_NUM_THREADS=1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Any

import torch
from machine import describe
from paired import with_interval
from sampling import CLOCKS, MASK, Tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import Canvas, build_canvas
from redraft.sampling.policies import Blocks
from redraft.sampling.sampler import Sampler

VOCAB_SIZE = 64
TICKS_PER_ROUND = 4  # of the part "leave", and its block size: a block begins when a row joins
LEAVING_SHAPE = ModelConfig(size="hidden=512,layers=8,heads=8,intermediate=1024", max_positions=4096)
DECIDING_SHAPE = ModelConfig(size="hidden=16,layers=1,heads=1,intermediate=16", max_positions=8192)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of both parts."""

    rows: int = 32
    cached: int = 2000
    """Tokens of each prompt in the part "leave"."""
    long: int = 4096
    """Positions of each row in the part "decide"."""
    short: int = 256
    block: int = 32
    num_blocks: int = 4


FULL = Setup()
TINY = Setup(rows=4, cached=16, long=64, short=32, block=4, num_blocks=2)


def network(shape: ModelConfig, block_size: int | None) -> tuple[Any, DiffusionSettings]:
    """Build a random model."""
    torch.manual_seed(0)
    settings = DiffusionSettings(mask_token_id=MASK, block_size=block_size)
    return build_model(shape, settings, tokenizer=Tokens(VOCAB_SIZE)).eval(), settings


def canvas_of(rows: int, *, prompt: int, new: int, seed: int = 0) -> Canvas:
    """Lay out random prompts with noise behind them."""
    tokens = torch.randint(3, VOCAB_SIZE, (rows, prompt + new), generator=torch.Generator().manual_seed(seed))
    is_noise = torch.arange(prompt + new) >= prompt
    return build_canvas(list(tokens), [is_noise] * rows, noise_token_id=MASK)


class Copies(TorchDispatchMode):
    """Count the bytes of new tensors that may hold keys or values: of a head's width, for half a row or more."""

    def __init__(self, *, width: int, at_least: int) -> None:
        super().__init__()
        self.width, self.at_least, self.num_bytes = width, at_least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look whether what it returns has memory of its own."""
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                memory = tensor.untyped_storage()
                if memory.data_ptr() not in given and memory.nbytes() >= self.at_least:
                    self.num_bytes += memory.nbytes()
        return out


class Running:
    """A batch whose rows leave and join."""

    def __init__(self, setup: Setup, *, new: int) -> None:
        block = TICKS_PER_ROUND
        self.setup, self.new = setup, new
        self.sampler = Sampler(frontier=Blocks(size=block), cache="exact", steps_per_block=block)
        self.batch = Batch(Denoiser(*network(LEAVING_SHAPE, block)))
        self.ids: list[int] = []
        self.num_joined = 0
        self.join(setup.rows)

    def join(self, rows: int = 1) -> None:
        """Let rows join, and feed their prompts."""
        canvas = canvas_of(rows, prompt=self.setup.cached, new=self.new, seed=self.num_joined)
        keys = torch.arange(rows) + self.num_joined
        self.ids += self.batch.join(canvas, self.sampler, row_keys=keys)
        self.num_joined += rows
        self.batch.tick()

    def leave(self) -> None:
        """Let the row leave that joined first."""
        self.batch.leave([self.ids.pop(0)])


def seconds(clock: Callable[[], float], action: Callable[[], object]) -> float:
    """Time one call."""
    start = clock()
    action()
    return clock() - start


def leave(setup: Setup, rounds: int, clock: Callable[[], float]) -> None:
    """(a) One of many rows leaves: time and memory, against copying keys and values.

    After each row that leaves another one joins. An ordinary tick is the second one after a row left: so both ticks
    have as many rows, and all rows are in the middle of a block.
    """
    shape = LEAVING_SHAPE.dimensions
    new = TICKS_PER_ROUND * (setup.rows + 4)  # no row ends before it leaves
    running = Running(setup, new=new)
    times = []
    for _ in range(rounds + 1):
        running.batch.tick()
        times.append([seconds(clock, action) for action in (running.leave, running.batch.tick, running.batch.tick)])
        assert len(running.batch) == setup.rows - 1
        running.join()
    del times[0]
    running.batch.tick()

    width, row_bytes = shape.hidden // shape.heads, 2 * shape.layers * shape.hidden * setup.cached * 4
    after, ordinary = (Copies(width=width, at_least=row_bytes // (4 * shape.layers)) for _ in range(2))
    with after:
        running.leave()
        running.batch.tick()
    with ordinary:
        running.batch.tick()

    kept = torch.arange(1, setup.rows)
    like = (setup.rows, shape.heads, setup.cached + new + 1, width)
    states = [torch.randn(like) for _ in range(2 * shape.layers)]
    one = [seconds(clock, lambda: [x[0].copy_(x[-1]) for x in states]) for _ in range(rounds + 1)][1:]
    others = [seconds(clock, lambda: [x[kept] for x in states]) for _ in range(rounds + 1)][1:]

    print(f"{setup.rows} rows with {setup.cached:,} cached tokens, {rounds} rows left.\n")
    print("| what | ms, 95 % interval |")
    print("|---|---|")
    for name, took in (
        ("leave", [first for first, _, _ in times]),
        ("leave and the tick after, less an ordinary tick", [first + tick - usual for first, tick, usual in times]),
        ("an ordinary tick", [usual for _, _, usual in times]),
        ("copying one row's keys and values", one),
        ("copying those of all rows but one", others),
    ):
        print(f"| {name} | {with_interval([1000 * value for value in took], '.2f')} |")
    print("\n| keys and values | MB |")
    print("|---|---|")
    for name, num_bytes in (
        ("new in leave and the tick after", after.num_bytes),
        ("new in an ordinary tick", ordinary.num_bytes),
        ("of one row", row_bytes),
        ("of all rows", setup.rows * row_bytes),
    ):
        print(f"| {name} | {num_bytes / 1e6:.1f} |")


@dataclass(frozen=True)
class Costless(Denoiser):
    """A denoiser whose forward costs nothing: the same logits in every step."""

    table: Any = None

    def __call__(self, query: Any, **_: Any) -> Tensor:
        """Answer a query."""
        return self.table[: len(query.where)]


def steps_of(setup: Setup, positions: int, *, is_cached: bool, temperature: float) -> Iterator[Any]:
    """Begin a generation whose forwards cost nothing."""
    block, new = setup.block, setup.num_blocks * setup.block
    table = torch.randn(setup.rows * block, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    denoiser = Costless(*network(DECIDING_SHAPE, block if is_cached else None), table=table)
    sampler = Sampler(
        frontier=Blocks(size=block),
        cache="exact" if is_cached else "none",
        steps_per_block=block,
        temperature=temperature,
    )
    canvas = canvas_of(setup.rows, prompt=positions - new, new=new)
    return iter(denoise(denoiser, canvas, sampler, row_keys=torch.arange(setup.rows)))


def decide(setup: Setup, rounds: int, clock: Callable[[], float]) -> None:
    """(b) A step's time beside its forward: long rows against short ones, in turns step by step."""
    print(f"{setup.rows} rows, the last {setup.num_blocks} blocks of {setup.block} are noise.\n")
    lengths = (setup.long, setup.short)
    columns = [f"ms at {length:,}" for length in lengths]
    print(f"| cache | temperature | {' | '.join(columns)} | long / short, 95 % interval | pairs |")
    print("|---|---|---|---|---|---|")
    for is_cached in (True, False):
        for temperature in (0.0, 0.7):
            ways = [steps_of(setup, length, is_cached=is_cached, temperature=temperature) for length in lengths]
            times = []
            for i in range(setup.num_blocks * setup.block):
                took = [0.0, 0.0]
                for which in (0, 1) if i % 2 == 0 else (1, 0):
                    took[which] = seconds(clock, partial(next, ways[which]))
                times.append(took)
            del times[0]  # it begins the generation
            long, short = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = with_interval([first / second for first, second in times], ".2f")
            cache = "exact" if is_cached else "none"
            print(f"| {cache} | {temperature} | {long:.2f} | {short:.2f} | {ratio} | {len(times)} |", flush=True)


PARTS = {"leave": leave, "decide": decide}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=50, help="rows that leave (default: 50)")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    args = parser.parse_args()
    print(describe(Path(__file__).name, sys.argv[1:]))
    for part in args.parts:
        print(f"\n## {part}\n\n{getdoc(PARTS[part])}\n")
        PARTS[part](TINY if args.quick else FULL, 2 if args.quick else args.rounds, CLOCKS[args.clock])


if __name__ == "__main__":
    main()
