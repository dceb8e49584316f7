"""What a run ended with, and whether that is worth anything."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from redraft.likelihood.problem import Estimate
from redraft.training.callbacks import LOG_FILE, read_log
from redraft.training.curve import series
from redraft.training.output import say

MOST_GROWTH = 1000  # of the norm of the trained weights; a run that learns stays far below
MOST_RISE = 10  # of the training loss


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ended with."""

    folder: Path
    steps: int
    held_out: Estimate | None = None
    unigram_nats: float | None = None
    """Entropy of the held-out tokens under their own frequencies, nats per token."""
    gzip_bits_per_byte: float | None = None
    """`gzip -9` on the held-out text."""
    diverged: str | None = None
    """By what one sees that the run diverged; None where it did not."""
    signal: int | None = None
    """The signal that ended the run early."""


def weight_norm(model: Any) -> float:
    """Return the norm over all trained weights; all processes take part."""
    norm = torch.nn.utils.get_total_norm([p.detach() for p in model.parameters() if p.requires_grad])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def divergence(folder: Path, *, norm_before: float, norm: float) -> str | None:
    """Say by what a run has diverged: weights that exploded, or a training loss that rose; None where it did not."""
    if not norm < MOST_GROWTH * max(norm_before, 1):
        return f"the norm of its weights went from {norm_before:.3g} to {norm:.3g}"
    _, losses = series(read_log(folder / LOG_FILE), "loss")
    losses = [loss for loss in losses if math.isfinite(loss)]  # of a step that is not finite the guard tells
    if losses and (last := median(losses[-5:])) > MOST_RISE * max(losses[0], 1):
        return f"its training loss went from {losses[0]:.4g} to {last:.4g}"
    return None


def worse_than_chance(held_out: Estimate, *, chance: float, measure: str) -> str | None:
    """Say so where a held-out loss is twice what guessing at random costs, or is no number."""
    if held_out.nats_per_token < 2 * chance:
        return None
    return (
        f"its held-out {measure} is {held_out.nats_per_token:.4g} nats per token; guessing at random costs {chance:.4g}"
    )


def announce(outcome: Outcome, console: Console, *, measure: str = "NELBO") -> None:
    """Say what a finished run ended with, in words where that is worth nothing."""
    if outcome.held_out:
        say(console, f"{f'held-out {measure}:':<17} {outcome.held_out}")
    if outcome.held_out and outcome.unigram_nats:
        below = 100 * (1 - outcome.held_out.nats_per_token / outcome.unigram_nats)
        compared = f"the {measure} is {abs(below):.1f} % {'below' if below > 0 else 'above'}"
        say(console, f"unigram entropy:  {outcome.unigram_nats:.4f} nats per token ({compared})")
        say(console, f"gzip -9:          {outcome.gzip_bits_per_byte:.3f} bits per byte on the same text")
        if not below > 0:
            say(
                console,
                "the model is worse than guessing each token by its frequency, so what it generates is noise. Train "
                "it for more steps, or on more data.",
            )
    if outcome.diverged:
        say(
            console,
            f"the run diverged: {outcome.diverged}. The model in {outcome.folder} is of no use. Start another --out "
            "with a lower --train.learning-rate.",
        )
    else:
        say(console, f"saved to {outcome.folder}")
