"""`redraft sample MODEL PROMPT ...`: generate text."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from redraft.cli.constraint import ConstraintArguments
from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse
from redraft.sampling.presets import PRESETS

if TYPE_CHECKING:
    from redraft.language_model import Generation


@dataclass(frozen=True, kw_only=True)
class Arguments(LoadingFlags):
    """Generate text from prompts by denoising."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; a dash reads one from standard input. '' samples without a prompt, for models trained on documents."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    constraint: Annotated[ConstraintArguments, tyro.conf.arg(name="")] = field(default_factory=ConstraintArguments)
    """What every text must be."""
    chat: bool = False
    """Put each prompt into the model's chat template as a user's message."""
    vote: bool = False
    """Print the most frequent of a prompt's --num-samples texts (self-consistency)."""
    sweep: Literal["steps"] | None = None
    """Generate with fewer and fewer steps, and print quality against speed."""
    plot: Path | None = None
    """With --sweep: write the same as a picture."""
    trace: Path | None = None
    """Write a page that replays the denoising (.html), or its data (.json)."""
    json: bool = False
    """Print one JSON object per prompt."""


def main(arguments: list[str]) -> int:
    """Parse, generate, print."""
    if _asks_for_presets(arguments):
        _print_presets()
        return 0
    args = parse(Arguments, arguments, command="sample")

    from redraft.cli.common import (
        check_prompts,
        check_writable,
        load_quietly,
        plain_console,
        read_prompts,
        warn_of_repetition,
        write_trace,
    )

    if args.plot and not args.sweep:
        raise ValueError(f"--plot draws what --sweep steps measures; got {args.plot} alone.")
    prompts = read_prompts(args.prompts)
    constraint = args.constraint.constraint()
    check_prompts(prompts, chat=args.chat)
    check_writable(args.trace, ".html", ".json")
    check_writable(args.plot, ".png", ".svg", ".pdf")
    settings = args.sampling.given(arguments)
    lm = load_quietly(args.model, device=args.device, quantization=args.quantization)
    console = plain_console()
    inputs = [[{"role": "user", "content": p}] for p in prompts] if args.chat else prompts
    if args.sweep:
        from redraft.cli.sweep import sweep_steps

        sweep_steps(lm, inputs, settings, constraint=constraint, console=console, plot=args.plot)
        return 0
    out = lm.generate(inputs, trace=args.trace is not None, constraint=constraint, **settings)
    per_prompt = len(out.tokens) // len(prompts)
    for i, prompt in enumerate(prompts):
        _print_samples(prompt, out, range(i * per_prompt, (i + 1) * per_prompt), args, console)
    if constraint is None:
        warn_of_repetition(lm, out.tokens, lm.sampling_config(**settings))
    if not args.json:
        num_new = sum(len(tokens) for tokens in out.tokens)
        console.print(f"{num_new} tokens in {out.seconds:.2f} s, {max(out.forwards)} forwards", style="dim")
    if args.trace and out.trace:
        shown = asdict(lm.sampling_config(**settings))
        write_trace(args.trace, out.trace, lm, title=f"redraft sample {args.model}", settings=shown)
        if not args.json:
            console.print(f"trace: {args.trace}")
    return 0


def _print_samples(prompt: str, out: "Generation", rows: range, args: Arguments, console: Console) -> None:
    """Print a prompt's texts, or the one they agree on; several with a line on how different they are."""
    from redraft.cli.common import say
    from redraft.evaluation.metrics import distinct_n, self_bleu, vote

    texts = [out.texts[row] if out.texts else " ".join(map(str, out.tokens[row].tolist())) for row in rows]
    chosen = vote(texts) if args.vote else None
    if args.json:
        for row, text in zip(rows, texts, strict=True):
            found: dict[str, Any] = {
                "prompt": prompt,
                "text": text,
                "tokens": out.tokens[row].tolist(),
                "forwards": out.forwards[row],
            }
            if chosen is None or text == chosen:
                print(json.dumps(found if chosen is None else found | {"votes": texts.count(chosen)}))
                if chosen is not None:
                    return
        return
    for text in texts if chosen is None else [chosen]:
        say(console, prompt, style="dim", end="")
        say(console, text)
    if chosen is not None:
        console.print(f"{texts.count(chosen)} of {len(texts)} samples agree", style="dim")
    if len(rows) > 1:
        tokens = [out.tokens[row].tolist() for row in rows]
        console.print(
            f"distinct-1 {distinct_n(tokens, 1):.2f}, distinct-2 {distinct_n(tokens, 2):.2f}, "
            f"self-BLEU {self_bleu(tokens):.2f}",
            style="dim",
        )


def _asks_for_presets(arguments: list[str]) -> bool:
    return "--preset=?" in arguments or any(flag == "--preset" and value == "?" for flag, value in pairwise(arguments))


def _print_presets() -> None:
    width = max(map(len, PRESETS))
    for name, preset in PRESETS.items():
        defaults = ", ".join(f"{key}={value}" for key, value in preset.defaults.items() if value is not None)
        print(f"{name:<{width}}  {preset.source}{f' [{defaults}]' if defaults else ''}")
