"""`redraft sample --sweep steps`: what fewer steps cost in quality, and what they save in time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from redraft.language_model import LanguageModel

NUM_POINTS = 6


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of steps."""

    steps: int
    forwards: float
    tokens_per_second: float
    nats_per_token: float
    """Bound on the negative log-likelihood that the model itself gives to what it wrote."""
    entropy: float
    """Of the texts' tokens under their own frequencies, nats: a repeated word is likely, too, and says nothing."""


def sweep_steps(
    lm: LanguageModel,
    prompts: list[Any],
    settings: dict[str, Any],
    *,
    constraint: Any,
    console: Console,
    plot: Path | None,
) -> list[Point]:
    """Generate with all steps, a half, a quarter, ..., and print a table; `plot` is drawn with matplotlib."""
    for name in ("steps", "steps_per_block", "budget", "forwards"):
        if name in settings:
            raise ValueError(f"--sweep chooses the steps; got --{name.replace('_', '-')}. Leave it out.")
    most = lm.sampling_config(**settings).max_new_tokens
    counts = sorted({max(1, most >> k) for k in range(NUM_POINTS)}, reverse=True)
    console.print(f"{'steps':>6} {'forwards':>9} {'tokens/s':>9} {'nats/token':>11} {'entropy':>8}")
    points = []
    for steps in counts:
        point = _measure(lm, prompts, settings | {"steps": steps}, constraint=constraint)
        points.append(point)
        console.print(
            f"{point.steps:>6} {point.forwards:>9.1f} {point.tokens_per_second:>9.1f} {point.nats_per_token:>11.3f} "
            f"{point.entropy:>8.3f}",
        )
    if plot is not None:
        _draw(points, plot)
        console.print(f"plot: {plot}")
    return points


def _measure(lm: LanguageModel, prompts: list[Any], settings: dict[str, Any], *, constraint: Any) -> Point:
    from redraft.evaluation.metrics import unigram_entropy

    out = lm.generate(prompts, constraint=constraint, **settings)
    num_tokens = sum(len(tokens) for tokens in out.tokens)
    contexts = [
        sequence[: len(sequence) - len(tokens)] for sequence, tokens in zip(out.sequences, out.tokens, strict=True)
    ]
    nats = [lm.loglikelihood(c, tokens, samples=32).nats for c, tokens in zip(contexts, out.tokens, strict=True)]
    return Point(
        steps=settings["steps"],
        forwards=sum(out.forwards) / len(out.forwards),
        tokens_per_second=num_tokens / out.seconds,
        nats_per_token=-sum(nats) / num_tokens,
        entropy=sum(unigram_entropy(tokens.tolist()) for tokens in out.tokens) / len(out.tokens),
    )


def _draw(points: list[Point], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'redraft[plots]'.") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="forwards per text", ylabel="nats per token", xscale="log")
    axes.plot([p.forwards for p in points], [p.nats_per_token for p in points], "o-", label="bound on -log p")
    axes.plot([p.forwards for p in points], [p.entropy for p in points], "s--", label="entropy of the text")
    axes.legend()
    figure.savefig(path)
