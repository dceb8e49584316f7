"""Flags from dataclasses through tyro, with mistakes told in one line."""

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T] | Callable[..., T], arguments: list[str], *, command: str, default: Any = None) -> T:
    """Parse flags into a dataclass. `--help` prints and exits; a mistake is a ValueError of one line."""
    options = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=f"redraft {command}", **options)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise ValueError(_in_one_line(complaint.getvalue()))


def _in_one_line(box: str) -> str:
    """Take the message, and the first suggestion, out of the frame that tyro draws around them."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    message = " ".join(lines[:rule]).rstrip(".") or "these arguments cannot be read"
    if any(line.startswith("Perhaps you meant") for line in lines):
        suggestion = next((line.split()[0] for line in lines[rule:] if line.startswith("--")), None)
        if suggestion:
            return f"{message}. Did you mean {suggestion}?"
    return f"{message}. See --help."
