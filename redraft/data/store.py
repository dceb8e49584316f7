"""Windows on disk: one binary file per column, written as they come and mapped when read."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from redraft.data.packing import PackingReport, TargetWindows, Windows
from redraft.data.splits import Split

Batch = tuple[Windows | TargetWindows, PackingReport]


def write_windows(
    folder: Path, split: Split, batches: Iterable[Batch], *, seq_len: int, vocab_size: int
) -> PackingReport:
    """Write the windows of a split and return their report; one batch is in memory at a time.

    A column takes the smallest unsigned dtype that holds every token id or segment of the split.
    """
    report, columns = PackingReport(), dict[str, Any]()
    with ExitStack() as files:
        for windows, report in batches:  # noqa: B007
            if not columns:
                largest = {"input_ids": vocab_size, "segment_ids": seq_len, "is_target": 1}
                columns = {name: np.min_scalar_type(largest[name]) for name in windows._fields}
                paths = {name: _path(folder, split, name) for name in columns}
                opened = {name: files.enter_context(path.open("wb")) for name, path in paths.items()}
            for name, rows in windows._asdict().items():
                opened[name].write(rows.astype(columns[name]).tobytes())
    settings = {"seq_len": seq_len, "columns": {name: dtype.name for name, dtype in columns.items()}}
    (folder / f"{split}.json").write_text(json.dumps(settings | {"report": asdict(report)}))
    return report


def open_windows(folder: Path, split: Split) -> tuple[Windows | TargetWindows, PackingReport]:
    """Map the windows of a split, without reading them."""
    saved = json.loads((folder / f"{split}.json").read_text())
    report, columns = PackingReport(**saved["report"]), saved["columns"]
    shape = (report.num_windows, saved["seq_len"])
    if not report.num_windows:
        return Windows(*np.empty((2, *shape), np.uint16)), report
    rows = {name: np.memmap(_path(folder, split, name), dtype, "r", shape=shape) for name, dtype in columns.items()}
    return (TargetWindows if "is_target" in rows else Windows)(**rows), report


def _path(folder: Path, split: Split, column: str) -> Path:
    return folder / f"{split}.{column}.bin"
