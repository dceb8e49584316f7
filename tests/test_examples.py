"""The examples run to their end."""

import runpy
from dataclasses import replace
from pathlib import Path

from redraft.recipes import stdlib_demo
from redraft.recipes.smoke import smoke

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_demo_trains_fills_generates_and_says_what_to_try_next(tmp_path, monkeypatch, capsys):
    tiny = smoke(stdlib_demo())
    tiny = replace(tiny, data=replace(tiny.data, seq_len=512))
    monkeypatch.setattr("redraft.recipes.stdlib_demo", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"redraft infill {tiny.out}" in printed
    assert all((tmp_path / tiny.out / name).exists() for name in ("trace.html", "infill.html", "model.safetensors"))
