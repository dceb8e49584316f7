"""The loss curve as a picture."""

from pathlib import Path
from typing import Any

from rich.console import Console

from redraft.training.callbacks import LOG_FILE, read_log
from redraft.training.config import RECIPE_FILE, RunConfig
from redraft.training.output import say

CURVE_FILE = "loss.png"


def draw_curve(folder: Path, *, console: Console) -> None:
    """Draw log.jsonl of a run into loss.png: training loss and held-out bound against steps, nats per token."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(console, "no loss curve: matplotlib is not installed (pip install 'redraft[plots]')")
        return
    lines = read_log(folder / LOG_FILE)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    config = RunConfig.read(folder / RECIPE_FILE)
    objective, is_preference = config.objective, config.data.kind == "preference"
    drawn = "training" if objective.kind == "ar" else f"training, t in ({objective.t_min:g}, {objective.t_max:g}]"
    held_out = "held-out preference loss" if is_preference else f"held-out {objective.measure}"
    axes.plot(*series(lines, "loss"), color="#9db4c0", linewidth=1, label=drawn)
    axes.plot(*series(lines, "eval_loss"), color="#253237", marker="o", markersize=4, label=held_out)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats per pair" if is_preference else "nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / CURVE_FILE, dpi=150)


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a number was logged, and the numbers."""
    chosen = [line for line in lines if isinstance(line.get(name), float | int)]
    return [line["step"] for line in chosen], [line[name] for line in chosen]
