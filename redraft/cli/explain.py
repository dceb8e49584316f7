"""`redraft explain MODEL PROMPT`: in which order tokens were decided, how sure the model was, and what else it had."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse

if TYPE_CHECKING:
    from redraft.sampling.explain import Explanation


@dataclass(frozen=True, kw_only=True)
class Arguments(LoadingFlags):
    """Generate one text, or fill the holes of one, and explain how it came about."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """One prompt, or a text with holes such as [MASK:8]; a dash reads it from standard input; '' is no prompt."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    chat: bool = False
    """Put the prompt into the model's chat template as a user's message."""
    out: Path = Path("explain.html")
    """The page: scrubber, heat map of entropy over steps and positions, alternatives of each token over time."""
    alternatives: int = 5
    """Alternatives kept for each open position at each step."""


def main(arguments: list[str]) -> int:
    """Parse, generate, write the page, sum up."""
    args = parse(Arguments, arguments, command="explain")

    from redraft.cli.common import (
        check_prompts,
        check_writable,
        load_quietly,
        plain_console,
        print_text,
        read_prompts,
        text_of,
    )
    from redraft.prompts import HOLE
    from redraft.sampling.explain import Watcher, explain
    from redraft.sampling.trace import to_page
    from redraft.sampling.trace_page import render_page

    prompts = read_prompts(args.prompts)
    if len(prompts) > 1:
        raise ValueError(f"one prompt at a time can be explained; got {len(prompts)}. Quote it, or choose one.")
    if args.alternatives < 1:
        raise ValueError(f"--alternatives must be at least 1; got {args.alternatives}.")
    check_prompts(prompts, chat=args.chat)
    check_writable(args.out, ".html")
    settings = args.sampling.given(arguments)
    if settings.get("num_samples", 1) > 1:
        raise ValueError(f"one sample at a time can be explained; got --num-samples {settings['num_samples']}.")
    lm = load_quietly(args.model, device=args.device, quantization=args.quantization)
    is_masked = lm.denoiser.settings.process != "uniform"
    watcher = Watcher(mask_token_id=lm.denoiser.settings.mask_token_id if is_masked else -1, top_k=args.alternatives)
    inputs: Any = [{"role": "user", "content": prompts[0]}] if args.chat else prompts[0]
    work = lm.infill if not args.chat and HOLE.search(prompts[0]) else lm.generate
    out = work(inputs, trace=True, guides=[watcher], **settings)
    assert out.trace is not None
    (trace,) = out.trace

    def text(token: int) -> str:
        return text_of(lm, token)

    found = explain(trace, watcher)
    shown = asdict(lm.sampling_config(**settings))
    page = to_page(out.trace, title=f"redraft explain {args.model}", settings=shown, text_of=text)
    row = page["rows"][0]
    row["watched"] = watcher.page(num_positions=len(row["positions"]), text_of=text)
    args.out.write_text(render_page(page), encoding="utf-8")
    console = plain_console()
    print_text(console, out.texts[0] if out.texts else " ".join(map(str, out.tokens[0].tolist())))
    for line in _lines(found, [text(token) for token in trace.token_ids], text):
        console.print(line, style="dim")
    console.print(f"page: {args.out}")
    return 0


def _lines(found: "Explanation", texts: list[str], text: Any) -> list[str]:
    unsure = ", ".join(f"{text(e.token_id)!r} {100 * e.confidence:.0f} % (step {e.step + 1})" for e in found.least_sure)
    opened = ", ".join(f"{texts[position]!r} {nats:.1f}" for position, nats in found.most_open)
    quarters = ", ".join(f"{nats:.2f}" for nats in found.entropy_by_quarter)
    return [
        f"{found.num_decided} tokens in {found.num_steps} steps; order: {found.order:+.2f} (1 is reading order)",
        f"mean confidence {100 * found.mean_confidence:.1f} %; least sure of {unsure}",
        f"revised {found.num_revised}, reopened {found.num_reopened}",
        f"entropy of an open position by quarters of the steps: {quarters} nats; most over time: {opened} nats",
    ]
