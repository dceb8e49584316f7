"""Compile constraints in a worker process with limits, and keep the results in a cache of bounded size. No torch.

A pattern of a few characters can ask for minutes of work, and the interpreter lock would stop the whole server. The
worker is killed after `CPU_SECONDS` of its own time; the next constraint starts another one.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redraft.constraints.kinds import Constraint, TokenLimits, constraint_key
from redraft.constraints.token_bytes import LeadingSpace

if TYPE_CHECKING:
    from redraft.constraints.completion import CompiledConstraint

CPU_SECONDS = 2.0
WALL_SECONDS = 20.0
"""For a worker that waits for a core on a busy machine."""
MEMORY_BYTES = 512 << 20
MAX_STATES = 2000
CACHE_BYTES = 256 << 20
_TAIL_BYTES = 8 << 10
"""What a compiled constraint remembers for each of its states while texts are decoded, at 8 lengths of 1024 tokens."""
_COMMAND = "from redraft.serving.compiling import work; work()"


class Compiler:
    """A worker process and its results, by constraint and vocabulary. Safe to call from several threads."""

    def __init__(self, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes, self._lock = cache_bytes, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: set[Any] = set()
        self._results: OrderedDict[Any, tuple[int, CompiledConstraint]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self._results.values())

    def compile(
        self, constraint: Constraint, token_bytes: Sequence[bytes | None], end: int | None, space: LeadingSpace
    ) -> "CompiledConstraint":
        """Compile as `Constraint.compile` does. Raises ValueError also for what exceeds the limits."""
        from redraft.constraints.completion import CompiledConstraint

        vocabulary = hash(tuple(token_bytes))
        key = (constraint_key(constraint), vocabulary, end, space)
        with self._lock:
            if key not in self._results:
                automaton, size = self._ask(constraint, token_bytes, vocabulary, end, space)
                compiled = CompiledConstraint(automaton=automaton, limits=constraint.limits())
                self._results[key] = size + _TAIL_BYTES * automaton.num_states, compiled
                while self.num_bytes > self._cache_bytes and len(self._results) > 1:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
            return self._results[key][1]

    def _ask(self, constraint: Constraint, token_bytes: Any, vocabulary: int, end: Any, space: Any) -> tuple[Any, int]:
        """Have the worker compile, and return the automaton with its size in bytes."""
        process = self._started()
        pieces = None if vocabulary in self._sent else list(token_bytes)
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump((constraint, vocabulary, pieces, end, space), process.stdin)
            process.stdin.flush()
            answer, size = pickle.load(process.stdout), pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            raise ValueError(
                f"the constraint is too large: it takes more than {CPU_SECONDS:g} s or {MEMORY_BYTES >> 20} MB to "
                "prepare. Use a shorter one, or smaller repetitions."
            ) from error
        finally:
            timer.cancel()
        self._sent.add(vocabulary)
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer, size

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is for the server, which drains
            )  # fmt: skip
        return self._process

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._sent = None, set()


@dataclass(frozen=True, kw_only=True)
class LimitedConstraint(Constraint):
    """A constraint that a compiler's worker prepares."""

    constraint: Constraint
    compiler: Compiler

    def limits(self) -> TokenLimits:
        return self.constraint.limits()

    def compile(
        self, token_bytes: Sequence[bytes | None], *, eos_token_id: int | None, leading_space: LeadingSpace = "text"
    ) -> "CompiledConstraint":
        return self.compiler.compile(self.constraint, token_bytes, eos_token_id, leading_space)


def work() -> None:
    """Compile what comes on standard input, until it ends: the automaton, or the text of a ValueError; and its size."""
    from redraft.constraints.automaton import after_space, over_tokens

    source, target = sys.stdin.buffer, sys.stdout.buffer
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, whatever Python or numpy is doing
    vocabularies: dict[int, list[bytes | None]] = {}
    with suppress(EOFError):  # the server has ended
        while True:
            constraint, vocabulary, pieces, end, space = pickle.load(source)
            if pieces is not None:
                vocabularies[vocabulary] = pieces
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            answer: Any
            try:
                automaton = after_space(constraint.automaton(), space)
                if len(automaton.table) > MAX_STATES:
                    raise ValueError(
                        f"the constraint is too large: it has more than {MAX_STATES} states. Use a shorter one."
                    )
                answer = over_tokens(automaton, vocabularies[vocabulary], eos_token_id=end)
            except ValueError as error:
                answer = str(error)
            text = pickle.dumps(answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            target.write(text + pickle.dumps(len(text)))
            target.flush()


def _limit_memory() -> None:
    """Allow `MEMORY_BYTES` more than the process has; a process that asks for more ends."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
