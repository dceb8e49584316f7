"""`redraft compare A B`: is one evaluation better than the other, item by item."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from redraft.cli.parsing import parse


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Test the difference between two evaluations, B - A, by a paired bootstrap over the items both finished."""

    first: tyro.conf.Positional[Path]
    """Folder of `redraft eval` (A)."""
    second: tyro.conf.Positional[Path]
    """Folder of `redraft eval` (B)."""
    plot: Path | None = None
    """Write a plot of scores against forward passes (.png, .svg, .pdf)."""


def main(arguments: list[str]) -> int:
    """Compare and print one line per score."""
    args = parse(CompareFlags, arguments, command="compare")

    from redraft.cli.common import check_writable
    from redraft.evaluation.report import compare, plot_frontier, provenance

    check_writable(args.plot, ".png", ".svg", ".pdf")
    for difference in compare(args.first, args.second):
        print(difference)
    if args.plot is not None:
        plot_frontier(args.plot, [args.first, args.second], provenance({"bootstrap": 0}))
    return 0
