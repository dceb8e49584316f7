"""The tools that make checkpoints which ship, on a folder and a table of a test's own."""

import importlib.util
from pathlib import Path

from redraft import checkpoints

TABLE = """
[{name}]
description = "A random model for tests."
commands = ["redraft train stdlib-tiny --out runs/tiny"]
licence = "Apache-2.0"
data = ["Nothing: no licence"]
limits = ["It knows nothing."]
examples = [{examples}]
"""
RECIPE = {"out": "/home/me/run", "data": {"source": "/home/me/books:0.5,stdlib:0.5"}, "train": {"seed": 3}}


def tool(name):
    """Import a file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ship_tool(tmp_path, monkeypatch, *, name, examples):
    """Import tools/ship.py, with an empty folder of checkpoints and a table of one name."""
    folder, table, ship = tmp_path / "shipped", tmp_path / "checkpoints.toml", tool("ship")
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    table.write_text(TABLE.format(name=name, examples=examples))
    monkeypatch.setattr(checkpoints, "FOLDER", folder)
    monkeypatch.setattr(ship, "TABLE", table)
    return ship
