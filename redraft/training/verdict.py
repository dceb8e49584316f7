"""The result of a run: whether it diverged, how good the model is, and its loss curve."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from redraft.likelihood.problem import Estimate
from redraft.training.checkpoint import explain_disk_errors
from redraft.training.config import RunConfig
from redraft.training.output import say

MAX_GROWTH = 1000  # of the norm of the trained weights; a run that learns stays far below
MAX_RISE = 10  # of the training loss
CURVE_FILE = "loss.png"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run."""

    folder: Path
    steps: int
    validation: Estimate | None = None
    unigram_nats: float | None = None
    """Entropy of the validation tokens under their own frequencies, nats per token."""
    gzip_bits_per_byte: float | None = None
    """`gzip -9` on the validation text."""
    diverged: str | None = None
    """Why the run counts as diverged; None where it does not."""
    signal: int | None = None
    """The signal that ended the run early."""


def weight_norm(model: Any) -> float:
    """Return the norm over all trained weights; all processes take part."""
    norm = torch.nn.utils.get_total_norm([p.detach() for p in model.parameters() if p.requires_grad])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def divergence(history: list[dict[str, Any]], *, norm_before: float, norm: float) -> str | None:
    """Say why a run has diverged: weights that exploded, or a training loss that rose; None where it did not."""
    if not norm < MAX_GROWTH * max(norm_before, 1):
        return f"the norm of its weights went from {norm_before:.3g} to {norm:.3g}"
    losses = [line["loss"] for line in history if math.isfinite(line.get("loss", math.nan))]  # the guard counts others
    if losses and (last := median(losses[-5:])) > MAX_RISE * max(losses[0], 1):
        return f"its training loss went from {losses[0]:.4g} to {last:.4g}"
    return None


def worse_than_chance(validation: Estimate, *, chance: float, measure: str) -> str | None:
    """Say so if a validation loss is at least twice the loss of guessing at random, or NaN; else return None."""
    if validation.nats_per_token < 2 * chance:
        return None
    nats = f"{validation.nats_per_token:.4g} nats per token"
    return f"its validation {measure} is {nats}; guessing at random has {chance:.4g}"


def announce(result: RunResult, console: Console, *, measure: str = "NELBO", on: str = "") -> None:
    """Print the results of a finished run `on` some data, with a warning if the model is of no use."""
    if result.validation:
        say(console, f"validation {measure}: {result.validation}")
        say(console, f"{'':18}on {on}; ± is the standard error over windows")
    if result.validation and result.unigram_nats:
        below = 100 * (1 - result.validation.nats_per_token / result.unigram_nats)
        compared = f"the {measure} is {abs(below):.1f} % {'below' if below > 0 else 'above'}"
        say(console, f"unigram entropy:  {result.unigram_nats:.4f} nats per token of the same windows ({compared})")
        say(console, f"gzip -9:          {result.gzip_bits_per_byte:.3f} bits per byte on the same text")
        eval_differs = "redraft eval --tasks perplexity:... reads each document apart: its figure differs"
        say(console, f"{'':18}{eval_differs}")
        if not below > 0:
            say(
                console,
                "the model is worse than guessing each token by its frequency, so what it generates is noise. Train "
                "it for more steps, or on more data.",
            )
    if result.diverged:
        say(
            console,
            f"the run diverged: {result.diverged}. The model in {result.folder} is of no use. Start another --out "
            "with a lower --train.learning-rate.",
        )
    else:
        say(console, f"saved to {result.folder}")


def draw_curve(history: list[dict[str, Any]], config: RunConfig, *, console: Console) -> None:
    """Draw the log of a run into loss.png: training and validation loss against steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(console, "no loss curve: matplotlib is not installed (pip install 'redraft[plots]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    objective, is_preference = config.objective, config.data.kind == "preference"
    drawn = "training" if objective.kind == "ar" else f"training, t in ({objective.t_min:g}, {objective.t_max:g}]"
    validation = "validation preference loss" if is_preference else f"validation {objective.measure}"
    axes.plot(*_series(history, "loss"), color="#9db4c0", linewidth=1, label=drawn)
    axes.plot(*_series(history, "eval_loss"), color="#253237", marker="o", markersize=4, label=validation)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats per pair" if is_preference else "nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with explain_disk_errors(CURVE_FILE, Path(config.out)):
        figure.savefig(Path(config.out) / CURVE_FILE, dpi=150)


def _series(history: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a number was logged, and the numbers."""
    lines = [line for line in history if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
