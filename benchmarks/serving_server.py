"""`redraft serve` with another way to fill its batch, or with clocks: the servers of `benchmarks/serving.py`.

    python benchmarks/serving_server.py WAY MODEL [flags of `redraft serve`]

WAY is static-MILLISECONDS (collect rows for so long, then run them to the end), blocks (rows join only when every
running row is at the beginning of a block) or clocks (as `redraft serve`, with CPU times among its metrics). In the
first two, the prompts of rows that join together are fed in one tick, so that the rows begin together.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from redraft.cli.serve import main
from redraft.language_model import LanguageModel
from redraft.serving import engine
from redraft.serving.engine import Engine


class Static(Engine):
    """Collects rows while none runs, then runs them until all have ended."""

    collect_seconds: float

    def __init__(self, lm: LanguageModel, **settings: Any) -> None:
        super().__init__(lm, **settings | {"chunk": None})

    def _admit(self) -> None:
        if self._num_running():
            return
        with self._wake:
            waiting = [row for queue in self._queues.values() for row in queue]
        left = min((row.arrived for row in waiting), default=0.0) + self.collect_seconds - time.monotonic()
        if waiting and len(waiting) < self.max_rows and left > 0:
            time.sleep(min(left, 0.001))
        else:
            super()._admit()


class BlockSynchronous(Engine):
    """Lets rows join when all that run are at the beginning of a block."""

    def __init__(self, lm: LanguageModel, **settings: Any) -> None:
        super().__init__(lm, **settings | {"chunk": None})

    def _admit(self) -> None:
        places = [row.place for rows in self._running.values() for row in rows.values()]
        if all(place is None or place.is_finished for place in places):
            super()._admit()


class Clocked(Engine):
    """Tells the CPU seconds of its thread, of the steps in it, and of the process."""

    def __init__(self, lm: LanguageModel, **settings: Any) -> None:
        super().__init__(lm, **settings)
        self.step_seconds = 0.0
        for batch in self._batches.values():
            setattr(batch, "tick", self._timed(batch.tick))  # noqa: B010

    def stats(self) -> dict[str, float]:
        """Add the clocks; with one thread of torch, the rest of the process is the HTTP side."""
        clock = time.pthread_getcpuclockid(self._thread.ident or 0)
        seconds = {"engine": time.clock_gettime(clock), "step": self.step_seconds, "process": time.process_time()}
        return super().stats() | {f"{name}_cpu_seconds": value for name, value in seconds.items()}

    def _timed(self, tick: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = time.thread_time()
            try:
                return tick(*args)
            finally:
                self.step_seconds += time.thread_time() - begun

        return timed


if __name__ == "__main__":
    way, _, milliseconds = sys.argv[1].partition("-")
    Static.collect_seconds = float(milliseconds or 0) / 1000
    setattr(engine, "Engine", {"static": Static, "blocks": BlockSynchronous, "clocks": Clocked}[way])  # noqa: B010
    sys.exit(main(sys.argv[2:]))
