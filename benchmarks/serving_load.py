"""The clients of `benchmarks/serving.py`: a process of its own, without torch and without redraft.

It reads one JSON object from standard input (`Load`), and writes one line of JSON per request.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

FIRST_TOKEN_ID = 300  # behind the special tokens and single bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """Requests: random prompts and lengths."""

    vocab_size: int
    prompt: tuple[int, int]
    """Tokens, from and to; uniform, in multiples of the block."""
    new: tuple[int, int]
    """Likewise."""
    block: int
    steps_per_block: int
    seed: int = 0

    def requests(self) -> Iterator[tuple[list[int], int]]:
        """Draw (prompt, number of new tokens) without end. No two prompts are equal, so nothing is cached."""
        draw = random.Random(self.seed)

        def length(of: tuple[int, int]) -> int:
            return self.block * draw.randint(of[0] // self.block, of[1] // self.block)

        while True:
            yield draw.choices(range(FIRST_TOKEN_ID, self.vocab_size), k=length(self.prompt)), length(self.new)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests arrive: each of `clients` sends the next when it has its answer, or `rate` come per second."""

    port: int
    work: Work
    seconds: float = 0.0
    """Requests begin until then; those that run are waited for. 0: until `count` have begun."""
    count: int = 0
    clients: int = 0
    rate: float = 0.0
    """Of a Poisson process with a fixed seed: the same arrivals at every rate but for their scale."""


@dataclass(kw_only=True)
class Outcome:
    """What a client saw of its request, in seconds since the beginning of the run."""

    scheduled: float
    """When it should have been sent, whatever the server or this process was doing then."""
    status: int = 0
    end: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    """When text came, and how many tokens were decided by then."""
    usage: dict = field(default_factory=dict)


async def ask(load: Load, prompt: list[int], new: int, outcome: Outcome, begun: float) -> None:
    """Send a request, and note what comes back, chunk by chunk."""
    body = {
        "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "redraft": {"steps_per_block": load.work.steps_per_block},
    }  # fmt: skip
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port, limit=1 << 20)
    writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    outcome.status = int((await reader.readline()).split()[1])
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk, now = json.loads(line[6:]), time.perf_counter() - begun
        if "error" in chunk:
            outcome.status = 500
            break
        outcome.usage = chunk["usage"] or outcome.usage
        if chunk["choices"]:
            outcome.chunks.append((now, outcome.usage["completion_tokens"]))
    outcome.end = time.perf_counter() - begun
    writer.close()


async def closed(load: Load) -> list[Outcome]:
    """Let each client send its next request when it has the answer to its last one."""
    begun, outcomes, requests = time.perf_counter(), list[Outcome](), load.work.requests()
    requests = requests if load.seconds else islice(requests, load.count)

    async def client() -> None:
        for prompt, new in requests:
            now = time.perf_counter() - begun
            if load.seconds and now > load.seconds:
                return
            outcomes.append(outcome := Outcome(scheduled=now))
            await ask(load, prompt, new, outcome, begun)

    await asyncio.gather(*(client() for _ in range(load.clients)))
    return outcomes


async def open_loop(load: Load) -> list[Outcome]:
    """Send requests when they are due, however many run already."""
    begun, outcomes, running = time.perf_counter(), list[Outcome](), list[asyncio.Task[None]]()
    draw, due, requests = random.Random(load.work.seed + 1), 0.0, load.work.requests()
    while (due := due + draw.expovariate(1) / load.rate) < load.seconds:
        prompt, new = next(requests)
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - begun)))
        outcomes.append(outcome := Outcome(scheduled=due))
        running.append(asyncio.create_task(ask(load, prompt, new, outcome, begun)))
    await asyncio.gather(*running)
    return outcomes


def main() -> None:
    """Run one load."""
    given = json.load(sys.stdin)
    load = Load(**given | {"work": Work(**given["work"])})
    for outcome in asyncio.run(open_loop(load) if load.rate else closed(load)):
        print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
