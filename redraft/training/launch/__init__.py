"""Start a command again in many processes, under accelerate's launcher, and say in one line how it failed."""

import logging
import shutil
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redraft.errors import unknown_name

KINDS = ("ddp", "fsdp2", "deepspeed")
GO_ON = "--resume continues from the last checkpoint"


def config_file(kind: str) -> Path:
    """Find the accelerate configuration of a kind of parallelism. Raises ValueError for an unknown one."""
    if kind not in KINDS:
        raise unknown_name("--launch", kind, KINDS)
    return Path(__file__).with_name(f"{kind}.yaml")


def check_launch(kind: str, processes: int, *, batch_size: int) -> None:
    """Raise ValueError for what cannot be launched, before any process is started."""
    config_file(kind)
    if processes < 1:
        raise ValueError(f"--processes must be at least 1; got {processes}.")
    if kind == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError("--launch deepspeed needs DeepSpeed, which is not installed. pip install it, or use fsdp2.")
    check_division(batch_size, processes)


def check_division(batch_size: int, processes: int) -> None:
    """Raise ValueError where the windows of a forward pass cannot be divided evenly among the processes."""
    if batch_size % processes:
        raise ValueError(
            f"train.batch_size must be a multiple of the number of processes, which divide it; got {batch_size} and "
            f"{processes}. Use --train.batch-size {-(-batch_size // processes) * processes}."
        )


def launch(kind: str, processes: int, arguments: list[str], *, module: str = "redraft.cli", go_on: str = GO_ON) -> int:
    """Run `python -m MODULE ARGUMENTS` in every process; return the exit code, and print why it is not 0.

    `go_on` says what to do after the system killed a process. Each process writes its standard error to a file of its
    own; the files are kept if the printed reason names them.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--config_file", str(config_file(kind)), "--num_processes", str(processes), "--main_process_port", "0"]
    parsed = launch_command_parser().parse_args([*options, "--module", module, *arguments])
    logs = Path(tempfile.mkdtemp(prefix="redraft-launch-"))
    parsed.log_dir, parsed.redirects = str(logs), "2"
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the reason is printed
    code, reason = 0, None
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        code, reason = _describe_failure(error.failures, processes, logs, go_on=go_on)
    except SignalException as error:
        code, reason = 128 + error.sigval, f"stopped by {error.sigval.name}"
    if reason is None or str(logs) not in reason:
        shutil.rmtree(logs)
    if reason:
        print(f"redraft {arguments[0]}: {reason}", file=sys.stderr)
    return code


def _describe_failure(failures: dict[int, Any], processes: int, logs: Path, *, go_on: str = GO_ON) -> tuple[int, str]:
    """Choose the process that most likely failed first, and say what happened to it."""
    last_lines = {rank: _last_line(logs, failure.local_rank) for rank, failure in failures.items()}
    rank = min(failures, key=lambda rank: _is_consequence(failures[rank].exitcode, last_lines[rank]))
    failure, line = failures[rank], last_lines[rank]
    who = f"process {rank} of {processes} (pid {failure.pid})"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (probably because memory ran out)" if name == "SIGKILL" else ""
        return 128 - failure.exitcode, f"{who} was killed by {name}{hint}. {go_on}"
    if failure.exitcode == 2 and line.startswith("redraft "):
        return 2, line.split(": ", 1)[-1]
    return failure.exitcode, f"{who} ended with exit code {failure.exitcode}: {line} (the whole output is in {logs})"


def _is_consequence(code: int, last_line: str) -> int:
    """Rank failures by how likely they follow from another's: the launcher's signals do, a lost connection may."""
    if code < 0:
        return 3 if code in (-signal.SIGTERM, -signal.SIGABRT) else 0  # the launcher's; NCCL's watchdog
    return 2 if "onnection" in last_line or "NCCL" in last_line else 1


def _last_line(logs: Path, local_rank: int) -> str:
    """Read what a process wrote last on standard error."""
    paths = sorted(logs.glob(f"*/attempt_*/{local_rank}/stderr.log"))
    lines = [line for path in paths for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no error message"
