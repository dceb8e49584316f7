"""Checkpoints that ship: made from runs, named `redraft/NAME`, checked, listed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shipping import RECIPE, ship_tool, tool

import redraft
from redraft import checkpoints
from redraft.cli import main
from redraft.cli.models import example_command
from redraft.latent.checkpoint import load_thinker


@pytest.fixture
def ship(tmp_path, monkeypatch):
    examples = '["sample", "ab", "--max-new-tokens", "4", "--steps", "2"], ["infill", "a[MASK:2]b"]'
    return ship_tool(tmp_path, monkeypatch, name="tiny", examples=examples)


@pytest.fixture
def run(model_folder, tmp_path):
    """The folder of a finished run, with a checkpoint that does not ship."""
    folder = tmp_path / "run"
    shutil.copytree(model_folder, folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 7, "train_runtime": 90.0}\n')
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"much")
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_shipped_run_loads_by_its_name_with_the_chosen_sampler(ship, run):
    folder = ship.ship("tiny", run, generation={"preset": "llada", "temperature": 0.5})
    lm = redraft.load("redraft/tiny", device="cpu")
    assert lm.sampling_config().temperature == 0.5
    assert lm.model.dtype == torch.float32
    before, after = load_file(run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(after[name].dtype == (torch.bfloat16 if w.ndim > 1 else torch.float32) for name, w in before.items())
    assert all(torch.equal(after[name], w.to(after[name].dtype)) for name, w in before.items())
    assert "/home/me" not in (folder / "recipe.json").read_text()
    assert json.loads((folder / "recipe.json").read_text())["data"]["source"] == "books:0.5,stdlib:0.5"
    entry = checkpoints.read_index()["tiny"]
    assert (entry["steps"], entry["minutes"], entry["seed"]) == (7, 1.5, 3)
    assert entry["parameters"] == sum(weight.numel() for weight in before.values())
    assert set(entry["sha256"]) == set(files_of(folder)) >= {"README.md", "config.json", "tokenizer.json"}
    assert entry["bytes"] == sum(map(len, files_of(folder).values()))
    for line in ("# redraft/tiny", "7 steps in 1.5 minutes", "Data: Nothing: no licence", "`redraft train stdlib-tiny"):
        assert line.strip("`") in (folder / "README.md").read_text()


def test_shipping_again_writes_the_same_and_adds_the_scores_of_an_evaluation(ship, run, tmp_path):
    folder = ship.ship("tiny", run)
    first = files_of(checkpoints.FOLDER)
    index = json.loads(first["index.json"])
    index["tiny"]["commit"] = "of the training"
    (checkpoints.FOLDER / "index.json").write_text(json.dumps(index))
    ship.ship("tiny", run)
    assert checkpoints.read_index()["tiny"]["commit"] == "of the training"
    second = files_of(checkpoints.FOLDER)
    assert second.keys() == first.keys()
    assert second["tiny/model.safetensors"] == first["tiny/model.safetensors"]
    ship.ship("tiny", run)
    assert files_of(checkpoints.FOLDER) == second
    task = {"task": "puzzles", "scores": {"bits_per_byte": {"mean": 2.0, "low": 1.902, "high": 2.098, "count": 9}}}
    results = {"provenance": {"command": "redraft eval redraft/tiny --out /home/me/out"}, "tasks": [task]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    ship.ship("tiny", run, results=[tmp_path])
    (score,) = checkpoints.read_index()["tiny"]["scores"]
    assert score == {
        "task": "puzzles",
        "unit": "bits per byte",
        "value": 2.0,
        "standard_error": pytest.approx(0.05),
        "items": 9,
        "command": "redraft eval redraft/tiny --out out",
    }
    assert "| puzzles | bits per byte | 2 | 0.05 | 9 | `redraft eval" in (folder / "README.md").read_text()


def test_what_cannot_ship_is_refused_and_nothing_is_written(ship, run, monkeypatch):
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            ship.ship("tiny", run, **settings)
        assert set(files_of(checkpoints.FOLDER)) == {"index.json"}

    refused("unknown setting in config.json's generation 'warmth'", generation={"warmth": 1})
    monkeypatch.setattr(ship, "MAX_BYTES", 1000)
    refused("all checkpoints together must have at most 0.001 MB")
    (run / "model.safetensors").unlink()
    refused("has no model.safetensors. Give the folder of a finished run")
    with pytest.raises(ValueError, match=r"unknown table of checkpoints.toml 'tinny'.*Did you mean 'tiny'"):
        ship.ship("tinny", run)
    assert ship.parse_settings(["preset=llada", "temperature=0.5"]) == {"preset": "llada", "temperature": 0.5}


def test_a_damaged_or_missing_file_is_one_line(ship, run, capsys):
    folder = ship.ship("tiny", run)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"^redraft/tiny is damaged: \S+tokenizer.json is not as it was shipped. Rein"):
        redraft.load("redraft/tiny")
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "redraft/tiny", "x"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("redraft sample: redraft/tiny is damaged: ")
    assert line.endswith("model.safetensors is missing. Reinstall redraft.")
    (checkpoints.FOLDER / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read \S+index.json: .*Reinstall redraft"):
        redraft.load("redraft/tiny")


def test_unknown_names_list_the_known_ones_and_other_paths_stay(ship, run, tmp_path, monkeypatch):
    ship.ship("tiny", run)
    with pytest.raises(ValueError, match=r"unknown checkpoint 'redraft/tinny'; known are redraft/tiny\. Did you mean"):
        redraft.load("redraft/tinny")
    with pytest.raises(ValueError, match="Did you mean redraft/tiny"):
        redraft.load("tiny")
    for path in ("redraft", "redraft/", "redraft/a/b", "./redraft/tiny", "other/tiny", Path("/redraft/tiny")):
        assert checkpoints.local_path(path) == path
    for name in ("tiny", "mine"):
        (tmp_path / "redraft" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert checkpoints.local_path("redraft/mine") == "redraft/mine"
    assert checkpoints.local_path("redraft/tiny") == str(checkpoints.FOLDER / "tiny")
    assert checkpoints.public_name(checkpoints.FOLDER / "tiny") == "redraft/tiny"
    assert checkpoints.public_name("redraft/mine") == str(tmp_path / "redraft" / "mine")


def test_every_command_takes_the_name(ship, run, tmp_path, capsys):
    ship.ship("tiny", run)
    (tmp_path / "own.jsonl").write_text('{"prompt": "say", "answer": "x"}\n')
    short = ["--max-new-tokens", "4", "--steps", "2"]
    for arguments in (
        ["sample", "redraft/tiny", "ab", *short],
        ["infill", "redraft/tiny", "a[MASK:2]b"],
        ["eval", "redraft/tiny", "--tasks", tmp_path / "own.jsonl", *short, "--out", tmp_path / "eval"],
        ["convert", "redraft/tiny", tmp_path / "converted"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, arguments)])
        assert exit_.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "converted" / "model.safetensors").exists()


def test_redraft_models_lists_what_ships(ship, run, capsys):
    ship.ship("tiny", run)
    with pytest.raises(SystemExit, match="0"):
        main(["models"])
    listed = capsys.readouterr().out
    for part in (
        "redraft/tiny  A random model",
        "M parameters",
        "weights: Apache-2.0; data: No",
        "redraft sample ",
    ):
        assert part in listed
    with pytest.raises(SystemExit, match="0"):
        main(["models", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"name": "redraft/tiny"} | checkpoints.read_index()["tiny"]


def test_the_names_are_resolved_without_torch():
    code = "import sys, redraft.cli.models; from redraft.checkpoints import local_path; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_page_of_samples_has_ten_of_each_and_is_the_same_again(ship, run, tmp_path, monkeypatch):
    ship.ship("tiny", run)
    samples, pages = tool("samples"), []
    assert len(samples.SEEDS) == 10
    monkeypatch.setattr(samples, "SEEDS", range(2))
    for name in ("first.md", "second.md"):
        monkeypatch.setattr(samples, "PAGE", tmp_path / name)
        assert samples.main([]) == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]
    assert "$ redraft sample redraft/tiny ab --max-new-tokens 4 --steps 2 --seed 0\nab" in pages[0]
    assert "$ redraft infill redraft/tiny 'a[MASK:2]b' --seed 1\na" in pages[0]
    assert example_command("tiny", ["sample", "a b"]) == "redraft sample redraft/tiny 'a b'"


def test_all_that_ships_is_in_the_index_whole_small_enough_and_loads():
    index = checkpoints.read_index()
    for name, entry in index.items():
        folder = Path(checkpoints.local_path(f"redraft/{name}"))  # raises for a file that is not as it was shipped
        assert set(files_of(folder)) == set(entry["sha256"])
        if "stage" in json.loads((folder / "config.json").read_text()):
            load_thinker(f"redraft/{name}")
        else:
            redraft.load(f"redraft/{name}").sampling_config()
    assert {path.parent.name for path in checkpoints.FOLDER.glob("*/config.json")} == set(index)
    assert sum(entry["bytes"] for entry in index.values()) <= tool("ship").MAX_BYTES
