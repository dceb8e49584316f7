"""Flags from dataclasses through tyro, with mistakes told in one line."""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import tyro

from redraft.sampling.config import SamplingConfig

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


@dataclass(frozen=True, kw_only=True)
class LoadingFlags:
    """How to hold the model of a command."""

    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""
    quantization: str | None = None
    """Hold the linear layers in int8, int4 or nf4 (needs the extra `quant`)."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(SamplingConfig):
    """Settings of the sampler before a model is known, whose own settings decide what fits together."""

    def __post_init__(self) -> None:
        """Check nothing yet."""

    def given(self, arguments: list[str]) -> dict[str, Any]:
        """Tell the settings that were flags from those that are defaults. Raises ValueError if they cannot fit."""
        flags = {argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name in flags}
        if "preset" in chosen:
            SamplingConfig(**chosen)
        return chosen


def _in_one_line(box: str) -> str:
    """Take the message, and the first suggestion, out of the frame that tyro draws around them."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    lines = [re.sub("^-+$", "─", line) for line in lines if line and not line.startswith(("╭", "╰"))]
    if lines[1:2] == ["─"]:  # where boxes cannot be drawn: a title, and a line below it
        lines = lines[2:]
    rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    message = " ".join(lines[:rule]).rstrip(".") or "these arguments cannot be read"
    if any(line.startswith("Perhaps you meant") for line in lines):
        suggestion = next((line.split()[0] for line in lines[rule:] if line.startswith("--")), None)
        if suggestion:
            return f"{message}. Did you mean {suggestion}?"
    return f"{message}. See --help."
