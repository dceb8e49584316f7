"""Run generated code in isolation: `jail` says how, docs/evaluation.md what it does not cover."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redraft.evaluation import jail

START_SECONDS = 60  # time that a busy machine may need to start the jail, which then counts the time itself
MEGABYTE = 2**20


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
    """All files together; its output too."""
    output_kb: int = 64
    """Output that is kept; a program that writes more does not pass."""


@dataclass(frozen=True, kw_only=True)
class CodeOutcome:
    """The result of running a program."""

    status: Literal["passed", "failed", "timeout", "memory", "output"]
    output: str
    """Standard output and error, at most `Limits.output_kb`."""
    seconds: float


def run_python(program: str, *, tests: str = "", function: str = "", limits: Limits | None = None) -> CodeOutcome:
    """Run a program to its end, then tests, which know one function of it as `candidate`.

    sys.exit(0), os._exit(0) or a swallowed error do not pass. The tests run in another process than the program, so
    that it can neither read nor change them. Arguments and results are sent as text: results must be plain data (None,
    bool, numbers, str, bytes, list, tuple, set, dict), and changes that the function makes to its arguments are lost.

    The program runs in processes of its own, without network and home folder; it can write only to a small /tmp. All
    processes that it started have ended when this returns. Raises ValueError where the machine does not permit the
    namespaces that this needs.
    """
    if not sys.platform.startswith("linux") or os.uname().machine not in jail.ARCHITECTURES:
        raise ValueError(
            f"generated code runs in a sandbox that needs Linux on {' or '.join(jail.ARCHITECTURES)}; got"
            f" {sys.platform} on {platform.machine()}."
        )
    limits = limits or Limits()
    start = time.monotonic()
    sources = json.dumps({"program": program, "tests": tests, "function": function})
    report, output = _run_jail(sources.encode(), limits)
    if report.get("reason") == "no isolation":
        raise ValueError(
            f"this machine does not permit the namespaces that isolate generated code ({report['error']}). Run as root,"
            " or permit unprivileged user namespaces."
        )
    seconds = time.monotonic() - start
    status: Any = report.get("reason") or ("timeout" if seconds >= limits.seconds else "failed")  # the jail was killed
    is_cut = len(output) > limits.output_kb * 1024
    text = output[: limits.output_kb * 1024].decode(errors="replace")
    return CodeOutcome(status="output" if is_cut else status, output=text, seconds=seconds)


def _settings(limits: Limits, *, report_fd: int) -> dict[str, Any]:
    return {
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_mb * MEGABYTE,
        "file_bytes": limits.file_mb * MEGABYTE,
        "report_fd": report_fd,
        "home": str(Path.home()),
        "python": _python(),
        "needed": [str(Path(sys.base_prefix).resolve())],
        "rlimits": {
            "AS": limits.memory_mb * MEGABYTE,
            "CPU": limits.cpu_seconds + 1,
            "NPROC": limits.processes + 1,  # the tests are one
            "FSIZE": limits.file_mb * MEGABYTE,
            "NOFILE": 64,
            "CORE": 0,
        },
    }


def _python() -> str:
    """Find the interpreter itself, not a virtual environment's link to it: generated code gets no packages."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _run_jail(sources: bytes, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """Start the jail and wait for its end; returns its report and the output, a byte more than the limit at most."""
    read_fd, write_fd = os.pipe()
    settings = json.dumps(_settings(limits, report_fd=write_fd))
    with os.fdopen(read_fd, "rb") as pipe, tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(sources)  # a pipe would break if the interpreter did not start
        stdin.seek(0)
        process = subprocess.Popen(
            [_python(), "-I", "-S", jail.__file__, settings],
            stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT,
            pass_fds=(write_fd,), start_new_session=True, env={}, cwd="/",
        )  # fmt: skip
        os.close(write_fd)
        try:
            process.wait(limits.seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()  # process 1 of the namespace dies with it, and all others with process 1
            process.wait()
        report = pipe.readline()
        stdout.seek(0)
        output = stdout.read(limits.output_kb * 1024 + 1)
    if process.returncode > 0:
        last = output.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise ValueError(f"the sandbox did not start with {_python()}: {last}. Repair this Python.")
    return (json.loads(report) if report else {}), output
