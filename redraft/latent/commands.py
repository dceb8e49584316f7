"""`redraft think MODEL PROMPT ...`: thoughts in a continuous space, then an answer; or --check of the autoencoder."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redraft.cli.parsing import DeviceFlags, OutputFlags, parse
from redraft.latent.config import ThinkingConfig

if TYPE_CHECKING:
    from redraft.latent.thinking import TrainOfThought

SHOWN_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True, kw_only=True)
class ThinkFlags(DeviceFlags, OutputFlags):
    """Denoise blocks of continuous thought about prompts, one block after another, and print thoughts and answers."""

    model: tyro.conf.Positional[str]
    """Folder of a denoiser or of a rollout, or redraft/NAME; with --check also of an autoencoder."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; a dash reads one from standard input."""
    thinking: Annotated[ThinkingConfig, tyro.conf.arg(name="")] = field(default_factory=ThinkingConfig)
    """How to think."""
    check: bool = False
    """Only measure how many held-out blocks the autoencoder reconstructs exactly, and whether it passes its gate."""
    show: bool = False
    """Also print the text of each thought while it forms: at t = 1, 0.75, 0.5, 0.25, 0."""


def main(arguments: list[str]) -> int:
    """Parse, think, print."""
    args = parse(ThinkFlags, arguments, command="think")

    from redraft.cli.common import check_writable, import_quietly, plain_console, read_prompts

    if args.check and args.prompts:
        raise ValueError(f"--check measures the autoencoder without prompts; got {args.prompts[0]!r}. Leave it out.")
    if args.check:
        import_quietly()
        return check(args.model)
    prompts = read_prompts(args.prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty. Give prompts as text.")
    check_writable(args.trace, ".html", ".json")
    import_quietly()
    from redraft.latent.checkpoint import load_thinker
    from redraft.latent.thinking import choose_sample

    thinker = load_thinker(args.model, device=args.device)
    groups = thinker.think(prompts, trace=args.show or args.trace is not None, **asdict(args.thinking))
    console, rows = plain_console(), []
    page: list[str] = []
    for prompt, samples in zip(prompts, groups, strict=True):
        chosen = choose_sample(samples)
        for sample in samples:
            rows.append(as_json(prompt, sample) | {"is_vote": sample is chosen})
            page += [prompt, *lines(sample, None), ""]
            if args.json:
                print(json.dumps(rows[-1]))
                continue
            console.print(prompt, style="dim")
            for line in lines(sample, SHOWN_TIMES if args.show else ()):
                console.print(line)
        if len(samples) > 1 and not args.json:
            console.print(f"vote: {chosen.answer or chosen.text}", style="bold")
    if args.trace:
        shown = html.escape("\n".join(page))
        text = f"<!doctype html><meta charset=utf-8><title>redraft think</title><pre>{shown}</pre>"
        is_json = args.trace.suffix.lower() == ".json"
        args.trace.write_text(json.dumps(rows) if is_json else text, encoding="utf-8")
    return 0


def check(model: str) -> int:
    """Print how many held-out blocks the autoencoder reconstructs exactly; return 1 where that is too few."""
    from redraft.cli.common import plain_console
    from redraft.latent.autoencoder import gate_failures, measure_gate
    from redraft.latent.checkpoint import load_autoencoder
    from redraft.latent.encode import encode_split
    from redraft.latent.tasks import find_task

    autoencoder, tokenizer = load_autoencoder(model)
    if (task := autoencoder.config.task) is None:
        raise ValueError(f"{model} was trained on a task from Python, which --check cannot load.")
    sizes = {"block_tokens": autoencoder.config.block_tokens}
    ids, mask = encode_split(find_task(task), tokenizer, split="validation", where=model, sizes=sizes).real_blocks()
    gate, console = measure_gate(autoencoder, ids, mask), plain_console()
    console.print(f"{len(ids)} distinct blocks of held-out prompts")
    for level, share in gate.items():
        console.print(f"relative noise {level:<4}  {100 * share:5.1f} % exact")
    failures = gate_failures(gate)
    console.print("the gate is not passed: " + "; ".join(failures) if failures else "the gate is passed")
    return 1 if failures else 0


def lines(sample: "TrainOfThought", times: Sequence[float] | None) -> Iterator[str]:
    """Format one sample as lines of text, with the estimates at these times (None: of all steps)."""
    for number, thought in enumerate(sample.thoughts, start=1):
        yield f"  thought {number}: {thought.text}"
        steps = [(step.t, step.text) for step in thought.steps] + [(0.0, thought.text)]
        if times is not None:  # for each time, the estimate of the last step before it
            steps = [next((t, text) for at, text in reversed(steps) if at >= t - 1e-9) for t in times]
        yield from (f"    t = {t:<5g} {text}" for t, text in steps)
    if sample.answer:
        yield f"  answer: {sample.answer}"
    yield f"  {sample.forwards} forwards, ended by: {sample.stop}"


def as_json(prompt: str, sample: "TrainOfThought") -> dict[str, Any]:
    """Return one sample as plain data, without its latents."""
    steps = [[(step.t, step.text) for step in thought.steps] for thought in sample.thoughts]
    thoughts = [{"text": t.text, "steps": s} for t, s in zip(sample.thoughts, steps, strict=True)]
    parts = {"answer": sample.answer, "forwards": sample.forwards, "stop": sample.stop}
    return {"prompt": prompt, "thoughts": thoughts, **parts}
