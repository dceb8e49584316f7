"""`redraft think MODEL PROMPT ...`: thoughts in a continuous space, then an answer."""

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from redraft.cli.parsing import parse
from redraft.latent.thinking import ThinkingConfig
from redraft.latent.thought import Estimate, TrainOfThought, vote

SHOWN_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Think about prompts: blocks of thought denoised one after another."""

    model: tyro.conf.Positional[str]
    """Folder of a denoiser or its rollout."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; a dash reads one from standard input."""
    thinking: Annotated[ThinkingConfig, tyro.conf.arg(name="")] = field(default_factory=ThinkingConfig)
    """How to think."""
    show: bool = False
    """Show each thought forming: its text at t = 1, 0.75, 0.5, 0.25, 0."""
    trace: Path | None = None
    """Write a page of every step of every thought (.html), or its data (.json)."""
    json: bool = False
    """Print one JSON object per sample; `is_vote` marks the one that a vote chooses."""
    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""


def main(arguments: list[str]) -> int:
    """Parse, think, print."""
    args = parse(Arguments, arguments, command="think")

    from redraft.cli.common import be_quiet, check_writable, plain_console, read_prompts
    from redraft.latent.checkpoint import load_thinker

    prompts = read_prompts(args.prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("there is nothing to think about: a prompt is empty. Give a task as text.")
    check_writable(args.trace, ".html", ".json")
    be_quiet()
    thinker = load_thinker(args.model, device=args.device)
    found = thinker.think(prompts, trace=args.show or args.trace is not None, **asdict(args.thinking))
    console = plain_console()
    for prompt, samples in zip(prompts, found, strict=True):
        chosen = vote(samples)
        for sample in samples:
            if args.json:
                print(json.dumps(as_json(prompt, sample) | {"is_vote": sample is chosen}))
                continue
            console.print(prompt, style="dim")
            for line in lines(sample, show=args.show):
                console.print(line)
        if len(samples) > 1 and not args.json:
            console.print(f"vote: {chosen.answer or chosen.text}", style="bold")
    if args.trace:
        rows = [as_json(prompt, s) for prompt, samples in zip(prompts, found, strict=True) for s in samples]
        args.trace.write_text(
            json.dumps(rows) if args.trace.suffix.lower() == ".json" else page(rows), encoding="utf-8"
        )
    return 0


def lines(sample: TrainOfThought, *, show: bool) -> list[str]:
    """Lay one sample out for a terminal."""
    shown = []
    for number, thought in enumerate(sample.thoughts, start=1):
        shown.append(f"  thought {number}: {thought.text}   (last change {thought.instability:.3f})")
        if show:
            shown += [f"    t = {t:<5g} {text}" for t, text in forming(thought.steps, thought.text)]
    if sample.answer:
        shown.append(f"  answer: {sample.answer}")
    return [*shown, f"  {sample.forwards} forwards, ended by: {sample.stop}"]


def forming(steps: list[Estimate], final: str) -> list[tuple[float, str]]:
    """Pick the decoded estimate at the last step that is not past each shown time; the block itself at 0."""
    first = steps[0].text if steps else ""  # of models that begin after t = 1
    at = {t: next((step.text for step in reversed(steps) if step.t >= t - 1e-9), first) for t in SHOWN_TIMES[:-1]}
    return [*at.items(), (0.0, final)]


def as_json(prompt: str, sample: TrainOfThought) -> dict[str, object]:
    """Lay one sample out as plain data, without its latents."""
    thoughts = [
        {
            "text": thought.text,
            "steps": [(step.t, step.text) for step in thought.steps],
            "instability": thought.instability,
        }
        for thought in sample.thoughts
    ]
    return {
        "prompt": prompt,
        "answer": sample.answer,
        "thoughts": thoughts,
        "forwards": sample.forwards,
        "stop": sample.stop,
    }


def page(rows: list[dict[str, object]]) -> str:
    """Render samples as one page that loads nothing: each thought's estimates over t, and how stable it ended."""
    parts = []
    for row in rows:
        parts.append(f"<h2>{html.escape(str(row['prompt']))}</h2>")
        thoughts: list[dict[str, list[tuple[float, str]]]] = row["thoughts"]  # type: ignore[assignment]
        for number, thought in enumerate(thoughts, start=1):
            steps = [*thought["steps"], (0.0, str(thought["text"]))]
            body = "".join(f"<tr><td>{t:.2f}</td><td>{html.escape(text)}</td></tr>" for t, text in steps)
            caption = (
                f"thought {number}: {html.escape(str(thought['text']))} (last change {thought['instability']:.3f})"
            )
            parts.append(f"<table><caption>{caption}</caption>{body}</table>")
        parts.append(f"<p><b>{html.escape(str(row['answer']))}</b> {row['forwards']} forwards, {row['stop']}</p>")
    style = "body{font-family:sans-serif;max-width:50em;margin:2em auto}caption{text-align:left;font-weight:bold}"
    return f"<!doctype html><meta charset=utf-8><title>redraft think</title><style>{style}</style>{''.join(parts)}"
