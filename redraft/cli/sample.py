"""`redraft sample MODEL PROMPT ...`: generate text."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from redraft.cli.constraint import ConstraintArguments
from redraft.cli.parsing import SamplingFlags, parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Generate text from prompts by denoising."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; a dash reads one from standard input."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    constraint: Annotated[ConstraintArguments, tyro.conf.arg(name="")] = field(default_factory=ConstraintArguments)
    """What every text must be."""
    chat: bool = False
    """Put each prompt into the model's chat template as a user's message."""
    trace: Path | None = None
    """Write a page that replays the denoising (.html), or its data (.json)."""
    json: bool = False
    """Print one JSON object per prompt."""
    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""
    quantization: str | None = None
    """Hold the linear layers in int8 or int4 (needs the extra `quant`)."""


def main(arguments: list[str]) -> int:
    """Parse, generate, print."""
    args = parse(Arguments, arguments, command="sample")

    from redraft.cli.common import check_writable, load_quietly, read_prompts, say, write_trace

    prompts = read_prompts(args.prompts)
    constraint = args.constraint.constraint()
    check_writable(args.trace)
    settings = args.sampling.given(arguments)
    lm = load_quietly(args.model, device=args.device, quantization=args.quantization)
    console = Console()
    inputs = [[{"role": "user", "content": p}] for p in prompts] if args.chat else prompts
    out = lm.generate(inputs, trace=args.trace is not None, constraint=constraint, **settings)
    for i, prompt in enumerate(prompts):
        new = out.texts[i] if out.texts else " ".join(map(str, out.tokens[i].tolist()))
        if args.json:
            row = {"prompt": prompt, "text": new, "tokens": out.tokens[i].tolist(), "forwards": out.forwards[i]}
            print(json.dumps(row))
            continue
        say(console, prompt, style="dim", end="")
        say(console, new)
    if not args.json:
        num_new = sum(len(tokens) for tokens in out.tokens)
        console.print(
            f"{num_new} tokens in {out.seconds:.2f} s, {max(out.forwards)} forwards", style="dim", highlight=False
        )
    if args.trace and out.trace:
        write_trace(
            args.trace,
            out.trace,
            lm,
            title=f"redraft sample {args.model}",
            settings=asdict(lm.sampling_config(**settings)),
        )
        if not args.json:
            say(console, f"trace: {args.trace}")
    return 0
