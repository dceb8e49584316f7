"""Run generated code so that it can harm nothing: see `jail` for how, docs/evaluation.md for what it does not cover."""

import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from redraft.evaluation import jail

Status = Literal["passed", "failed", "timeout", "memory", "output"]
Isolation = Literal["namespaces", "weak"]
START_SECONDS = 60  # what a busy machine may take to start the jail, which then counts the time itself


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What generated code may use."""

    seconds: float = 10.0
    """Wall-clock time."""
    cpu_seconds: int = 10
    """Processor time of one process."""
    memory_mb: int = 512
    """Memory of all its processes and its tests together; no one process may map more."""
    processes: int = 16
    """Processes and threads alive at once."""
    file_mb: int = 16
    """All files together (one file, in the weaker mode)."""
    output_kb: int = 64
    """What is kept of its output; more ends it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program."""

    status: Status
    output: str
    """Standard output and error, at most `Limits.output_kb`."""
    seconds: float
    isolation: Isolation


def run_python(
    program: str,
    *,
    tests: str = "",
    function: str = "",
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Run a program to its end, then tests, which know one function of it as `candidate`.

    sys.exit(0), os._exit(0) or a swallowed error do not pass. The tests run in another process than the program, so
    that it can neither read nor change them. Arguments and results travel as text: results must be plain data (None,
    bool, numbers, str, bytes, list, tuple, set, dict), and what the function does to its arguments is not seen.

    The program runs in processes of its own, without network, home or a place to write but a small /tmp, and everything
    it started is gone when this returns. Raises ValueError where the machine does not permit the namespaces that takes
    ("weak" does without: resource limits, and the killing of descendants at the end).
    """
    _check_machine(isolation)
    limits = limits or Limits()
    sources = json.dumps({"program": program, "tests": tests, "function": function})
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="redraft-sandbox-", ignore_cleanup_errors=True) as folder:
        report, output, is_cut = _run_jail(sources.encode(), limits, folder=folder, isolation=isolation)
    if report.get("reason") == "no isolation":
        raise ValueError(
            f"this machine does not permit what isolates generated code ({report['error']}). Run as root, permit"
            " unprivileged user namespaces, or accept --items.sandbox weak."
        )
    seconds = time.monotonic() - start
    unreported = "timeout" if seconds >= limits.seconds else "failed"  # the jail itself was killed
    return Outcome(
        status="output" if is_cut else report.get("reason", unreported),
        output=output.decode(errors="replace"),
        seconds=seconds,
        isolation=isolation,
    )


def _check_machine(isolation: Isolation) -> None:
    if not sys.platform.startswith("linux") or os.uname().machine not in jail.ARCHITECTURES:
        raise ValueError(
            f"generated code runs in a sandbox of Linux on {' or '.join(jail.ARCHITECTURES)}; got {sys.platform} on"
            f" {platform.machine()}. Evaluate it there."
        )
    if isolation == "weak" and os.geteuid() == 0 and not _is_open_to_all(_python()):
        raise ValueError(
            f"the weak sandbox runs code as another user than root, who cannot reach {_python()}. Run as that user."
        )


def _settings(limits: Limits, *, folder: str, report_fd: int, isolation: Isolation) -> dict:
    megabyte = 2**20
    return {
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_mb * megabyte,
        "file_bytes": limits.file_mb * megabyte,
        "folder": folder,
        "report_fd": report_fd,
        "isolation": isolation,
        "home": str(Path.home()),
        "python": _python(),
        "kept": [str(Path(sys.base_prefix).resolve())],
        "rlimits": {
            "AS": limits.memory_mb * megabyte,
            "CPU": limits.cpu_seconds + 1,
            "NPROC": limits.processes + 1,  # the tests are one
            "FSIZE": limits.file_mb * megabyte,
            "NOFILE": 64,
            "CORE": 0,
        },
    }


def _python() -> str:
    """Find the interpreter itself, not a virtual environment's link to it: generated code gets no packages."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _is_open_to_all(path: str) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (Path(path), *Path(path).parents))


def _run_jail(sources: bytes, limits: Limits, *, folder: str, isolation: Isolation) -> tuple[dict, bytes, bool]:
    """Start the jail, feed it, collect output up to the cap; returns report, output, whether it was cut."""
    read_fd, write_fd = os.pipe()
    settings = _settings(limits, folder=folder, report_fd=write_fd, isolation=isolation)
    with tempfile.TemporaryFile() as stdin:  # a pipe would break if the interpreter did not start
        stdin.write(sources)
        stdin.seek(0)
        process = subprocess.Popen(
            [_python(), "-I", "-S", jail.__file__, json.dumps(settings)],
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=(write_fd,), start_new_session=True, env={}, cwd="/",
        )  # fmt: skip
    os.close(write_fd)
    try:
        assert process.stdout is not None
        output, is_cut = _collect(
            process.stdout.fileno(), most=limits.output_kb * 1024, seconds=limits.seconds + START_SECONDS
        )
    finally:
        process.stdout.close() if process.stdout else None
        _end(process, isolation=isolation)
    with os.fdopen(read_fd, "rb") as pipe:
        first = pipe.readline()
    if process.returncode > 0:
        last = output.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise ValueError(f"the sandbox did not start with {_python()}: {last}. Repair this Python.")
    return (json.loads(first) if first else {}), output, is_cut


def _collect(fd: int, *, most: int, seconds: float) -> tuple[bytes, bool]:
    """Read until the writers are gone, the cap or the time is reached."""
    deadline, total = time.monotonic() + seconds, 0
    chunks: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and total <= most:
            if not selector.select(left):
                break
            chunk = os.read(fd, 65536)
            if not chunk:
                return b"".join(chunks), False
            chunks.append(chunk)
            total += len(chunk)
    return b"".join(chunks)[:most], total > most


def _end(process: subprocess.Popen, *, isolation: Isolation) -> None:
    """Make sure that the jail is gone: the end of its first process takes a whole namespace along."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        if isolation == "weak":
            jail.kill_descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
