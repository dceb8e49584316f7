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


def main(arguments: list[str]) -> int:
    """Compare and print one line per score."""
    args = parse(CompareFlags, arguments, command="compare")

    from redraft.evaluation.report import compare

    for difference in compare(args.first, args.second):
        print(difference)
    return 0
