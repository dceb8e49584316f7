"""The server under load, against offline generation, other ways to batch, and the autoregressive sibling.

    python benchmarks/serving.py [--parts equal closed open cpu causal] [--ways continuous static-50]
                                 [--seconds 90] [--rounds 3] [--threads 1] [--dtype auto] [--runs runs/serving.jsonl]
                                 [--quick]

Random weights of the shape of SmolLM2-135M, converted to block-causal attention with blocks of 8. Every block takes
the same number of steps, so the work does not depend on what the weights say; prompts and new tokens come in whole
blocks, so that rows which join together stay in step. The server (`redraft serve`), the load
generator and the offline generation are processes of their own; the server and the offline generation have `--threads`
threads each, and never work at the same time. Mixed requests have prompts of 16 to 512 tokens and 16 to 128 new ones.

Times are the clients': to the first decided text, between texts by tokens (a text of n tokens counts n times, with the
n-th part of the time since the last one), and from end to end. In the open loop they begin at the scheduled arrival,
so a late server does not slow down its own measurement. Rows: how many run at once, on average. Padding: of the
positions that the model is fed. RSS: of the server, at the end of the run. `--quick` runs everything on a tiny model.

Finished points are kept in the file `--runs` and not measured again; delete it to begin anew. All parts and ways take
about an hour with `--seconds 90`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from inspect import getdoc
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from machine import describe
from paired import Worker, with_interval
from serving_load import Load, Outcome, Work
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import redraft

HERE = Path(__file__).parent
SPECIAL = ("<|pad|>", "<|end|>", "<|mask|>")
WAYS = ("continuous", "static-16", "static-50", "blocks")
RAMP = 0.2
"""First part of a run that does not count in tokens/s and rows."""
BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and its load."""

    shape: dict[str, int]
    vocab_size: int
    mixed: Work
    equal: Work
    rows: int = 16
    clients: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rates: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.1)
    """Arrivals, as parts of the capacity: the requests per second at the most clients."""
    max_model_len: int = 640
    waves: int = 3
    """Times that every client of the equal requests asks."""


def work(vocab_size: int, prompt: tuple[int, int], new: tuple[int, int]) -> Work:
    """Describe requests."""
    return Work(vocab_size=vocab_size, prompt=prompt, new=new, block=BLOCK, steps_per_block=BLOCK // 2)


FULL = Setup(
    shape={"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3},
    vocab_size=49152,
    mixed=work(49152, (16, 512), (16, 128)),
    equal=work(49152, (128, 128), (64, 64)),
)  # fmt: skip
TINY = Setup(
    shape={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_key_value_heads": 1},
    vocab_size=700,
    mixed=work(700, (8, 24), (8, 32)),
    equal=work(700, (16, 16), (16, 16)),
    rows=4,
    clients=(1, 4, 8),
    rates=(0.5, 1.1),
    max_model_len=64,
    waves=2,
)  # fmt: skip


def build(setup: Setup, folder: Path) -> None:
    """Write an autoregressive model with random weights, and what `redraft convert` makes of it."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setup.vocab_size, max_position_embeddings=2 * setup.max_model_len, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, **setup.shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "causal")
    tokenizer_of(setup.vocab_size).save_pretrained(folder / "causal")
    redraft.convert(folder / "causal", folder / "diffusion", block_size=BLOCK)


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer without training: all bytes, then pairs and triples of printable characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [character for character in alphabet if "!" <= character <= "~" or character == "Ġ"]
    pairs = [(a, b) for a in printable for b in printable]
    merges = pairs + [(a + b, c) for a, b in pairs for c in printable]
    merges = merges[: size - len(SPECIAL) - len(alphabet)]
    names = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pad, end, mask = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end, mask_token=mask)


class Server:
    """A server in a process of its own."""

    def __init__(self, way: str, bench: "Bench", *, threads: int) -> None:
        start = ["-m", "redraft.cli", "serve"] if way == "continuous" else [str(HERE / "serving_server.py"), way]
        flags = {"--port": 0, "--max-rows": bench.setup.rows, "--max-model-len": bench.setup.max_model_len}
        flags |= {"--dtype": bench.dtype, "--device": "cpu"}
        given = [str(part) for pair in flags.items() for part in pair]
        self.log = bench.folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *start, str(bench.folder / "diffusion"), *given],
                stdout=log, stderr=subprocess.STDOUT, env=environment(threads),
            )  # fmt: skip
        while "http://" not in (said := self.log.read_text()):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {said}")
            time.sleep(0.1)
        self.port = int(said.split("http://127.0.0.1:")[1].split()[0])

    def run(self, work: Work, **how: Any) -> list[Outcome]:
        """Put a load on it, and return what the clients saw."""
        load = json.dumps(asdict(Load(port=self.port, work=work, **how)))
        command = [sys.executable, str(HERE / "serving_load.py")]
        told = subprocess.run(command, input=load, stdout=subprocess.PIPE, text=True, check=True).stdout
        return [Outcome(**json.loads(line)) for line in told.splitlines()]

    def counts(self) -> dict[str, float]:
        """Read its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as page:
            lines = (line.split() for line in page.read().decode().splitlines() if "{" not in line and line[0] != "#")
            return {name.removeprefix("redraft_").removesuffix("_total"): float(value) for name, value, *_ in lines}

    def resident_mib(self) -> float:
        """Read how much memory it has; 0 where /proc does not say."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)

    def end(self) -> None:
        """Drain it."""
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60):
            raise RuntimeError(f"the server ended with exit code {self.process.returncode}: {self.log.read_text()}")


def environment(threads: int) -> dict[str, str]:
    """Set the threads of torch in a process, and let it find this checkout."""
    numbers = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return os.environ | numbers | {"PYTHONPATH": str(HERE.parent)}


@dataclass(kw_only=True)
class Bench:
    """The processes that are measured, started when they are needed, and the points that were measured before."""

    setup: Setup
    seconds: float
    rounds: int
    threads: int
    dtype: str
    runs: Path
    folder: Path
    made: list[str] = field(default_factory=list)
    """Where the points of these tables were measured, without repetition."""
    closing: ExitStack = field(default_factory=ExitStack)
    _server: tuple[object, Server] | None = None
    _worker: Worker | None = None

    def point(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a point, measured now if the file does not have it."""
        size = "tiny" if self.setup is TINY else "135m"
        key = f"{name} | {size} | {self.seconds:g} s, {self.rounds} rounds | {self.threads} threads | {self.dtype}"
        points = map(json.loads, self.runs.read_text().splitlines()) if self.runs.exists() else ()
        known = {point["key"]: point for point in points}
        if key not in known:
            made = describe(Path(__file__).name, sys.argv[1:]).strip()
            known[key] = {"key": key, **measure(), "made": made}
            self.runs.parent.mkdir(parents=True, exist_ok=True)
            with self.runs.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(known[key], file=sys.stderr)
        if known[key]["made"] not in self.made:
            self.made.append(known[key]["made"])
        return known[key]

    def server(self, way: str, *, threads: int | None = None) -> Server:
        """Start a server, and end the one before."""
        wanted = (way, threads or self.threads)
        if self._server is None or self._server[0] != wanted:
            self.end_server()
            self._prepare()
            self._server = (wanted, Server(way, self, threads=wanted[1]))
        return self._server[1]

    def end_server(self) -> None:
        """End the server that runs, if one does."""
        if self._server is not None:
            self._server[1].end()
            self._server = None

    def offline(self, way: str, requests: list[tuple[list[int], int]]) -> float:
        """Generate without a server, and return the seconds."""
        if self._worker is None:
            self._prepare()
            flags = [str(self.folder), self.dtype, str(self.setup.equal.steps_per_block)]
            worker = Worker(HERE.parent, HERE / "serving_offline.py", flags, threads=self.threads)
            self._worker = self.closing.enter_context(worker)
        prompts, new = zip(*requests, strict=True)
        return float(self._worker.ask({"way": way, "prompts": prompts, "new": new}))

    def _prepare(self) -> None:
        if not (self.folder / "diffusion").exists():
            build(self.setup, self.folder)


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def token_seconds(outcome: Outcome) -> Iterator[float]:
    """Yield the time of each token behind the first text."""
    for (before, num_before), (now, num) in pairwise(outcome.chunks):
        yield from [(now - before) / max(1, num - num_before)] * (num - num_before)


def tokens_between(outcome: Outcome, begin: float, end: float) -> int:
    """Count the tokens that came in a span of time."""
    counts = [(0.0, 0), *outcome.chunks]
    return sum(num - before for (_, before), (at, num) in pairwise(counts) if begin <= at < end)


def under_load(server: Server, work: Work, *, seconds: float, **how: Any) -> dict[str, Any]:
    """Put a load on a server for some seconds, and sum up what the clients and the server say."""
    before = server.counts()
    outcomes = server.run(work, seconds=seconds, **how)
    after, begin = server.counts(), RAMP * seconds
    done = [one for one in outcomes if one.status == 200]
    failed = [one.status for one in outcomes if one.status not in (200, 429)]
    assert not failed, f"requests failed: {failed}"
    runs = [(one.scheduled + one.usage["redraft"]["queue_ms"] / 1000, one.end) for one in done]
    first = [1000 * (one.chunks[0][0] - one.scheduled) for one in done]
    each = [1000 * took for one in done for took in token_seconds(one)]
    whole = [one.end - one.scheduled for one in done]
    tokens = sum(one.usage["completion_tokens"] for one in done)
    fed = after["query_tokens"] - before["query_tokens"]
    return {
        "requests": len(outcomes),
        "requests_per_second": sum(begin <= one.end < seconds for one in done) / (seconds - begin),
        "tokens_per_second": sum(tokens_between(one, begin, seconds) for one in done) / (seconds - begin),
        "first_ms": [percentile(first, 50), percentile(first, 99)],
        "token_ms": [percentile(each, 50), percentile(each, 99)],
        "whole_s": [percentile(whole, 50), percentile(whole, 99)],
        "queue_ms": [percentile([one.usage["redraft"]["queue_ms"] for one in done], p) for p in (50, 99)],
        "rows": sum(max(0.0, min(end, seconds) - max(start, begin)) for start, end in runs) / (seconds - begin),
        "padding": (after["padding_tokens"] - before["padding_tokens"]) / fed,
        "forwards_per_token": sum(one.usage["redraft"]["forwards"] for one in done) / tokens,
        "refused": sum(one.status == 429 for one in outcomes) / len(outcomes),
        "rss_mib": server.resident_mib(),
        "ticks": after["ticks"] - before["ticks"],
        "clocks": {name: after[name] - before[name] for name in after if name.endswith("cpu_seconds")},
    }


HEAD = (
    "requests | tokens/s | first text ms p50 / p99 | token ms p50 / p99 | end to end s p50 / p99 | "
    "queue ms p50 / p99 | rows | padding | forwards per token | 429 | RSS MiB |"
)


def written(point: dict[str, Any]) -> str:
    """Write a point as a row of a table."""
    first, each, whole, queue = (point[name] for name in ("first_ms", "token_ms", "whole_s", "queue_ms"))
    return (
        f"{point['requests']} | {point['tokens_per_second']:.1f} | {first[0]:.0f} / {first[1]:.0f} | "
        f"{each[0]:.1f} / {each[1]:.1f} | {whole[0]:.2f} / {whole[1]:.2f} | {queue[0]:.0f} / {queue[1]:.0f} | "
        f"{point['rows']:.1f} | {100 * point['padding']:.1f} % | {point['forwards_per_token']:.3f} | "
        f"{100 * point['refused']:.1f} % | {point['rss_mib']:.0f} |"
    )


def print_head(*names: str) -> None:
    """Begin a table of points."""
    print(f"| {' | '.join(names)} | {HEAD}")
    print("|" + "---|" * (len(names) + HEAD.count("|")))


def burst(server: Server, work: Work, *, count: int, clients: int) -> float:
    """Serve some requests to so many clients, and return the tokens per second until the last one ends."""
    outcomes = server.run(work, count=count, clients=clients)
    tokens = sum(one.usage["completion_tokens"] for one in outcomes)
    assert tokens == sum(new for _, new in requests_of(work, count))
    return tokens / max(one.end for one in outcomes)


def requests_of(work: Work, count: int) -> list[tuple[list[int], int]]:
    """Draw the first requests."""
    return list(islice(work.requests(), count))


def equal(bench: Bench, ways: list[str]) -> None:
    """(a) Equal rows, served and by `lm.generate`, in turns: what serving costs, and what a full batch gains.

    As many clients as rows ask again and again; the time ends with the last answer.
    """
    rows = bench.setup.rows

    def measure() -> dict[str, Any]:
        rates: dict[str, list[float]] = {}
        for i in range(bench.rounds + 1):
            waves = bench.setup.waves if i else 1  # the first round does not count
            work = replace(bench.setup.equal, seed=i)
            for number in (rows, 1):
                requests = requests_of(work, number)
                seconds = [bench.offline("ours", requests) for _ in range(waves)]
                offline = waves * sum(new for _, new in requests) / sum(seconds)
                served = burst(bench.server("continuous"), work, count=waves * number, clients=number)
                if i:
                    rates.setdefault(f"generate {number}", []).append(offline)
                    rates.setdefault(f"served {number}", []).append(served)
        return {"rates": rates}

    rates = bench.point("equal", measure)["rates"]
    print(
        "| rows | tokens/s of generate | tokens/s served | served / generate | generate / one row | served / one row |"
    )
    print("|---|---|---|---|---|---|")
    one = rates["generate 1"]
    for number in (rows, 1):
        offline, served = rates[f"generate {number}"], rates[f"served {number}"]
        ratios = [
            with_interval([a / b for a, b in zip(*pair, strict=True)], ".2f")
            for pair in ((served, offline), (offline, one), (served, one))
        ]
        print(f"| {number} | {with_interval(offline, '.1f')} | {with_interval(served, '.1f')} | {' | '.join(ratios)} |")


def closed_point(bench: Bench, clients: int) -> dict[str, Any]:
    """Measure a number of clients."""
    seconds = bench.seconds / 2
    return bench.point(
        f"closed | {clients} clients",
        lambda: under_load(bench.server("continuous"), bench.setup.mixed, seconds=seconds, clients=clients),
    )


def closed(bench: Bench, ways: list[str]) -> None:
    """(b) Closed loop, mixed requests: each client sends the next one when it has its answer."""
    print_head("clients")
    for clients in bench.setup.clients:
        print(f"| {clients} | {written(closed_point(bench, clients))}", flush=True)


def open_point(bench: Bench, way: str, part: float) -> dict[str, Any]:
    """Measure a rate, with the arrivals and requests that every way gets."""
    capacity = closed_point(bench, bench.setup.clients[-1])["requests_per_second"]
    return bench.point(
        f"open | {way} | {part} of {capacity:.3f}",
        lambda: under_load(bench.server(way), bench.setup.mixed, seconds=bench.seconds, rate=part * capacity),
    )


def open_loop(bench: Bench, ways: list[str]) -> None:
    """(c) Open loop, mixed requests: Poisson arrivals at parts of the capacity, whatever the server does.

    The capacity is what the continuous server answers in the closed loop with the most clients. static-N collects rows
    for N ms and runs them to the end (rows that have ended leave); blocks lets rows join where all are at the beginning
    of a block.
    """
    print_head("batching", "part of capacity")
    for way in ways:
        for part in bench.setup.rates:
            print(f"| {way} | {part} | {written(open_point(bench, way, part))}", flush=True)


def cpu_point(bench: Bench) -> dict[str, Any]:
    """Measure the CPU time of a server with one thread of torch."""

    def measure() -> dict[str, Any]:
        server, setup = bench.server("clocks", threads=1), bench.setup
        return under_load(server, setup.equal, seconds=bench.seconds / 2, clients=setup.rows)

    return bench.point("cpu", measure)


def cpu(bench: Bench, ways: list[str]) -> None:
    """(d) CPU time of a tick with all rows busy and streaming, by thread clocks, with one thread of torch."""
    point = cpu_point(bench)
    clocks, ticks = point["clocks"], point["ticks"]
    engine, step, process = (clocks[f"{name}_cpu_seconds"] for name in ("engine", "step", "process"))
    print(f"{point['rows']:.1f} rows, {ticks:.0f} ticks.\n")
    print("| what | CPU ms per tick | of the engine's thread |")
    print("|---|---|---|")
    for name, seconds in (
        ("the engine's thread", engine),
        ("in it, outside of the batch's step", engine - step),
        ("everything but the engine's thread", process - engine),
    ):
        print(f"| {name} | {1000 * seconds / ticks:.2f} | {100 * seconds / engine:.2f} % |")


def causal(bench: Bench, ways: list[str]) -> None:
    """(e) The autoregressive sibling: the same weights with a causal mask, by transformers.

    `continuous` is its continuous batching. Equal rows are generated offline; the mixed requests come all at once, to
    the server for ours.
    """
    setup, rounds = bench.setup, bench.rounds
    num_mixed = 2 * setup.rows

    def measure() -> dict[str, Any]:
        cases = {
            "one row": requests_of(setup.equal, 1),
            f"{setup.rows} equal rows": requests_of(setup.equal, setup.rows),
            f"{num_mixed} mixed requests": requests_of(setup.mixed, num_mixed),
        }
        rates: dict[str, dict[str, float]] = {}
        for name, requests in cases.items():
            tokens, of_case = sum(new for _, new in requests), rates.setdefault(name, {})
            for way in ("generate", "continuous"):
                seconds = [bench.offline(way, requests) for _ in range(rounds)]
                of_case[f"autoregressive, {way}"] = tokens / statistics.median(seconds)
            if "mixed" not in name:
                seconds = [bench.offline("ours", requests) for _ in range(rounds)]
                of_case["ours, generate"] = tokens / statistics.median(seconds)
            else:
                server = bench.server("continuous")
                served = [burst(server, setup.mixed, count=num_mixed, clients=num_mixed) for _ in range(rounds)]
                of_case["ours, served"] = statistics.median(served)
        return {"rates": rates}

    print("| requests | way | tokens/s | x autoregressive generate |")
    print("|---|---|---|---|")
    for name, of_case in bench.point("causal", measure)["rates"].items():
        for way, rate in of_case.items():
            print(f"| {name} | {way} | {rate:.1f} | {rate / of_case['autoregressive, generate']:.2f} |", flush=True)


PARTS = {"equal": equal, "closed": closed, "open": open_loop, "cpu": cpu, "causal": causal}


def goals(bench: Bench, parts: list[str], ways: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield what should hold, what was measured, and whether it holds."""

    def never() -> dict[str, Any]:
        raise AssertionError("the parts have measured everything")

    rows = bench.setup.rows
    if "equal" in parts:
        rates = bench.point("equal", never)["rates"]
        ratio = statistics.median(
            a / b for a, b in zip(rates[f"served {rows}"], rates[f"generate {rows}"], strict=True)
        )
        yield f"{rows} rows served >= 0.9 of generate", f"{ratio:.2f}", ratio >= 0.9
        gain = statistics.median(a / b for a, b in zip(rates[f"served {rows}"], rates["generate 1"], strict=True))
        yield f"{rows} rows served >= 4 x one row", f"{gain:.2f}", gain >= 4
    if "cpu" in parts:
        clocks = cpu_point(bench)["clocks"]
        share = clocks["process_cpu_seconds"] / clocks["engine_cpu_seconds"] - 1
        yield "CPU beside the engine's thread <= 3 % of a tick", f"{100 * share:.2f} %", share <= 0.03
    if {"closed", "open"} <= set(parts) and "continuous" in ways:
        alone, half = closed_point(bench, 1)["first_ms"][0], open_point(bench, "continuous", 0.5)["first_ms"][0]
        yield "median first text at half load <= 1.5 x alone", f"{half / alone:.2f}", half <= 1.5 * alone
        for way in ways:
            if way != "continuous":
                slower = [
                    open_point(bench, way, part)["whole_s"][0] / open_point(bench, "continuous", part)["whole_s"][0]
                    for part in bench.setup.rates
                ]
                told = " ".join(f"{ratio:.2f}" for ratio in slower)
                yield f"median end to end, {way} / continuous > 1 at every rate", told, min(slower) > 1


def has_bfloat16() -> bool:
    """Tell whether the processor multiplies in bfloat16."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("amx_bf16", "avx512_bf16"))


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="to batch, in part open")
    parser.add_argument("--seconds", type=float, default=90.0, help="of a rate; clients get half of it (default: 90)")
    parser.add_argument("--rounds", type=int, help="of parts equal and causal (default: 3; with --quick, 1)")
    parser.add_argument("--threads", type=int, default=1, help="of the server and of offline generation (default: 1)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: by processor")
    parser.add_argument("--runs", type=Path, help="finished points (default: runs/serving.jsonl; with --quick, none)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and 1 second a rate unless it is given")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # `describe` tells it
    dtype = ("bfloat16" if has_bfloat16() else "float32") if args.dtype == "auto" else args.dtype
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(
            setup=TINY if args.quick else FULL, threads=args.threads, dtype=dtype, folder=folder,
            rounds=args.rounds or (1 if args.quick else 3),
            seconds=1.0 if args.quick and args.seconds == parser.get_default("seconds") else args.seconds,
            runs=args.runs or (folder / "runs.jsonl" if args.quick else Path("runs/serving.jsonl")),
        )  # fmt: skip
        with bench.closing:
            bench.closing.callback(bench.end_server)
            for part in args.parts:
                print(f"\n## {part}\n\n{getdoc(PARTS[part])}\n")
                PARTS[part](bench, args.ways)
            print("\n## goals\n\n| goal | measured | holds |\n|---|---|---|")
            for goal, measured, holds in goals(bench, args.parts, args.ways):
                print(f"| {goal} | {measured} | {'yes' if holds else 'no'} |")
        print("\n" + "\n".join([f"{dtype}, {args.threads} threads", *bench.made]))


if __name__ == "__main__":
    main()
