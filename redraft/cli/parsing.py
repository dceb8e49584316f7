"""Flags from dataclasses through tyro, errors in one line, and the flags that several commands share. No torch."""

import contextlib
import io
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from redraft.cli.constraint import ConstraintArguments
from redraft.sampling.config import SamplingConfig
from redraft.settings import Settings

T = TypeVar("T")
CONFIG = (tyro.conf.PositionalMetavarFromFieldName,)


def parse(kind: type[T], arguments: list[str], *, command: str, default: Any = None) -> T:
    """Parse flags into a dataclass. `--help` prints and exits; a mistake is a ValueError of one line."""
    options = {} if default is None else {"default": default}
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(kind, args=arguments, prog=f"redraft {command}", config=CONFIG, **options)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise ValueError(_in_one_line(message.getvalue()))


def _in_one_line(box: str) -> str:
    """Take the message and the first suggestion out of the frame that tyro draws around them."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    lines = [re.sub("^-+$", "─", line) for line in lines if line and not line.startswith(("╭", "╰"))]
    if lines[1:2] == ["─"]:  # a terminal without box characters gets a title with a line below it
        lines = lines[2:]
    rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    message = " ".join(lines[:rule]).rstrip(".") or "these arguments cannot be read"
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", message)  # the message names the setting
    message = re.sub(
        r"^Error parsing (\S+): no type matching (\S+) could .* from (.+?)\. Got.*", r"\1 must be \2; got \3", message
    )
    if any(line.startswith("Perhaps you meant") for line in lines):
        suggestion = next((line.split()[0] for line in lines[rule:] if line.startswith("--")), None)
        if suggestion:
            return f"{message}. Did you mean {suggestion}?"
    return f"{message}. See --help."


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(Settings):
    """Where to run."""

    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default the best device of this machine."""


@dataclass(frozen=True, kw_only=True)
class LoadingFlags(DeviceFlags):
    """How to load a model."""

    quantization: str | None = None
    """Quantise the linear layers to int8, int4 or nf4 (needs the extra `quant`)."""


@dataclass(frozen=True, kw_only=True)
class JsonFlags(Settings):
    """What to print for programs."""

    json: bool = False
    """Print JSON: one object a line, for each text or entry."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags(JsonFlags):
    """What to write beside the text, or in place of it."""

    trace: Path | None = None
    """Write a page that replays the denoising step by step (.html), or its data (.json)."""


@dataclass(frozen=True, kw_only=True)
class TemplateFlags(Settings):
    """How prompts are read."""

    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(SamplingConfig):
    """Sampler settings as flags, parsed before the model and its saved settings are known."""

    def __post_init__(self) -> None:
        """Check each setting alone: which ones fit together depends on the settings saved with the model."""
        Settings.__post_init__(self)

    def given(self, arguments: list[str]) -> dict[str, Any]:
        """Return the settings that were given as flags. Raises ValueError if they do not fit their preset."""
        flags = {argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name in flags}
        if "preset" in chosen:
            SamplingConfig(**chosen)
        return chosen


@dataclass(frozen=True, kw_only=True)
class GenerationFlags(LoadingFlags, OutputFlags):
    """What `sample` and `infill` share."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model, or redraft/NAME (see `redraft models`)."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts; a dash reads one from standard input. '' is the empty prompt, for models trained on documents."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    constraint: Annotated[ConstraintArguments, tyro.conf.arg(name="")] = field(default_factory=ConstraintArguments)
    """What each new text must be."""
    vote: bool = False
    """Print only the most frequent of a prompt's --num-samples texts (self-consistency)."""
    explain: Path | None = None
    """Explain one text: print a summary; write a page (.html) with each step's entropies and alternatives."""
