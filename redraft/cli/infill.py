"""`redraft infill MODEL TEXT ...`: fill the holes in texts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from redraft.cli.constraint import ConstraintArguments
from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse


@dataclass(frozen=True, kw_only=True)
class Arguments(LoadingFlags):
    """Fill the holes of texts: [MASK:12] is a hole of 12 tokens."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts with holes; a dash reads one from standard input."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise; the length is that of the holes."""
    constraint: Annotated[ConstraintArguments, tyro.conf.arg(name="")] = field(default_factory=ConstraintArguments)
    """What the text of the hole must be."""
    trace: Path | None = None
    """Write a page that replays the denoising (.html), or its data (.json)."""


def main(arguments: list[str]) -> int:
    """Parse, fill, print with the filled parts highlighted."""
    args = parse(Arguments, arguments, command="infill")

    from redraft.cli.common import (
        check_writable,
        load_quietly,
        plain_console,
        read_prompts,
        styled,
        warn_of_repetition,
        write_trace,
    )

    texts = read_prompts(args.texts)
    constraint = args.constraint.constraint()
    check_writable(args.trace, ".html", ".json")
    settings = args.sampling.given(arguments)
    lm = load_quietly(args.model, device=args.device, quantization=args.quantization)
    console = plain_console()
    out = lm.infill(texts, trace=True, constraint=constraint, **settings)
    assert out.trace is not None
    for i, trace in enumerate(out.trace):
        if not console.is_terminal and out.texts:
            print(out.texts[i])
            continue
        styles = ["" if is_given else "bold green" for is_given in trace.is_given]
        console.print(styled(lm, trace.token_ids, styles))
    if constraint is None:
        warn_of_repetition(lm, out.tokens, lm.sampling_config(**settings))
    if args.trace:
        write_trace(
            args.trace,
            out.trace,
            lm,
            title=f"redraft infill {args.model}",
            settings=asdict(lm.sampling_config(**settings)),
        )
        console.print(f"trace: {args.trace}")
    return 0
