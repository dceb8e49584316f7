"""The examples run to their end."""

import re
import runpy
from pathlib import Path

from redraft.recipes import stdlib_demo
from redraft.recipes.smoke import smoke

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_demo_solves_trains_and_writes_one_page_of_all_of_it(tmp_path, monkeypatch, capsys):
    tiny = smoke(stdlib_demo())
    monkeypatch.setattr("redraft.recipes.stdlib_demo", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "___2   ___2   1_42   1342\n" in printed
    assert "except ImportError:\n    yaml = None\nis_there = yaml is not None\n" in printed
    assert '"You are very kind," said Elizabeth' in printed
    assert re.search(r'\{ *"name": *"(spam|eggs)", *"port": *[1-9]\d{0,3}, *"debug": *(true|false)\}', printed)
    assert f"redraft infill {tiny.out}" in printed
    page = (tmp_path / tiny.out / "demo.html").read_text()
    names = ["sudoku 1", "sudoku 2", "sudoku 3", "gaps 1", "gaps 2", "JSON object", "text of the small model"]
    assert all(f'"title":"{name}"' in page for name in names)
