"""`redraft train`: recipes that are damaged, folders that cannot be written, and what it proposes to do next."""

import json
import os
import shlex
from dataclasses import replace

import pytest

import redraft.training.run  # noqa: F401  # what libraries print when they are first imported is not of a command
from redraft.cli import main
from redraft.cli.train import longer_command, next_steps
from redraft.data.config import DataConfig
from redraft.latent.config import LatentRunConfig
from redraft.recipes import RECIPES
from redraft.recipes.smoke import smoke
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig


def refused(capsys, *arguments):
    """What `redraft train` says when it refuses."""
    with pytest.raises(SystemExit) as done:
        main(["train", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert done.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def without(name):
    return lambda saved: {key: value for key, value in saved.items() if key != name}


def having(section, **values):
    return lambda saved: saved | {section: saved[section] | values}


EDITS = {
    "no model": (without("model"), "recipe.json has no 'model', so it was edited or damaged"),
    "no data": (without("data"), "recipe.json has no 'data', so it was edited or damaged"),
    "no train": (without("train"), "recipe.json has no 'train', so it was edited or damaged"),
    "no objective": (without("objective"), "recipe.json has no 'objective', so it was edited or damaged"),
    "empty": (lambda _: {}, "recipe.json has no 'out', so it was edited or damaged"),
    "null": (lambda _: None, "recipe.json must hold an object of settings; got NoneType"),
    "a list": (lambda saved: [saved], "recipe.json must hold an object of settings; got list"),
    "a number": (lambda _: 3, "recipe.json must hold an object of settings; got int"),
    "model null": (lambda saved: saved | {"model": None}, "model must hold an object of settings; got NoneType"),
    "model a list": (lambda saved: saved | {"model": []}, "model must hold an object of settings; got list"),
    "an unknown section": (lambda saved: saved | {"modle": {}}, "'modle'; .*Did you mean 'model'"),
    "an unknown name": (having("train", learnin_rate=1), "'learnin_rate'; .*Did you mean 'learning_rate'"),
    "a text for a number": (having("data", seq_len="32"), "data: seq_len must be of type int; got '32'"),
    "a wrong value": (
        having("train", learning_rate=float("nan")),
        "learning_rate must be a finite number; got nan",
    ),
    "a stage by value": (lambda saved: saved | {"train": "stage"}, "train must hold an object of settings; got str"),
    "out of bytes": (lambda saved: saved | {"out": "a\udcff"}, r"out must be a name in UTF-8; got 'a\\udcff'"),
    "out with a NUL": (lambda saved: saved | {"out": "a\0b"}, r"out must be a name in UTF-8; got 'a\\x00b'"),
}
BYTES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "nothing": lambda whole: b"",
    "not UTF-8": lambda whole: whole.replace(b'"out"', b'"o\xfft"'),
    "NULs": lambda whole: bytes(len(whole)),
    "deeply nested": lambda whole: b"[" * 100_000,
}


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    smoke(replace(RECIPES["stdlib-tiny"](), out=str(folder))).save(folder)
    return folder


@pytest.mark.parametrize("name", EDITS)
def test_a_damaged_recipe_is_one_line_and_nothing_is_written(run_folder, capsys, name):
    import re

    edit, message = EDITS[name]
    recipe = run_folder / "recipe.json"
    recipe.write_text(json.dumps(edit(json.loads(recipe.read_text()))))
    line = refused(capsys, str(run_folder), "--resume")
    assert re.search(message, line), line
    assert [path.name for path in run_folder.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("name", BYTES)
def test_a_recipe_that_is_no_json_is_one_line(run_folder, capsys, name):
    recipe = run_folder / "recipe.json"
    recipe.write_bytes(BYTES[name](recipe.read_bytes()))
    assert "recipe.json is not a readable recipe: " in refused(capsys, str(run_folder), "--resume")
    assert "recipe.json is not a readable recipe: " in refused(capsys, str(recipe), "--out", f"{run_folder}-again")


@pytest.mark.parametrize("recipe", ["stdlib-tiny", "latent-autoencoder"])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "out must name the folder of the run; got ''"),
        (os.fsdecode(b"bad\xff"), r"arguments must be UTF-8; got 'bad\udcff'. Rename the file"),
        ("file[/red]", "out must be a folder; file[/red] is a file. Choose another --out"),
        ("file[/red]/deeper", "cannot write to file[/red]/deeper: Not a directory. Choose another --out"),
        ("a" * 300, "File name too long. Choose another --out"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, recipe, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file[").mkdir()
    (tmp_path / "file[/red]").touch()
    assert message in refused(capsys, recipe, "--smoke", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file["]


def steps_of(**changes):
    return "\n".join(next_steps(replace(RunConfig(out="runs/a b[/red]"), **changes)))


def test_what_is_proposed_after_training_on_code_is_code():
    steps = steps_of()
    assert shlex.split(steps)[:4] == ["redraft", "sample", "runs/a b[/red]", r"$import os\n\ndef "]
    assert "--trace 'runs/a b[/red]'/trace.html" in steps
    assert "redraft infill 'runs/a b[/red]'" in steps
    assert "redraft chat" not in steps  # there is no chat template


@pytest.mark.parametrize("data", [DataConfig(source="stories.txt"), DataConfig(source="stdlib:0.5,stories.txt:0.5")])
def test_what_is_proposed_after_training_on_other_texts_is_not_code(data):
    steps = steps_of(data=data)
    assert "redraft sample" in steps
    assert "[MASK:8]" in steps
    assert "import os" not in steps
    assert "def " not in steps


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_what_is_proposed_after_training_on_conversations_is_a_chat(kind):
    assert steps_of(data=DataConfig(kind=kind)) == "redraft chat 'runs/a b[/red]'"


def test_a_chat_is_proposed_where_the_start_brought_a_template(tmp_path):
    (tmp_path / "chat_template.jinja").touch()
    assert next_steps(RunConfig(out=str(tmp_path)))[-1] == f"redraft chat {tmp_path}"


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(kind="uniform"),
        ObjectiveConfig(kind="block", block_size=8),
        ObjectiveConfig(kind="ar"),
    ],
)
def test_no_sampler_is_proposed_as_checkpoints_carry_theirs_and_no_holes_to_causal_models(objective):
    steps = steps_of(objective=objective)
    assert "redraft sample" in steps
    assert "--preset" not in steps
    assert ("redraft infill" in steps) == (objective.kind != "ar")


def test_what_is_proposed_after_thoughts_fits_the_task_and_the_stage():
    assert next_steps(RECIPES["thought-ar"]()) == [
        "redraft eval runs/thought-ar --tasks thought:countdown --batch-size 100 --out runs/thought-ar/eval"
    ]
    stages = {name: next_steps(RECIPES[f"latent-{name}"]()) for name in ("autoencoder", "denoiser", "rollout")}
    assert stages["autoencoder"] == [
        "redraft think --check runs/latent-autoencoder",
        "redraft train latent-denoiser --start runs/latent-autoencoder --task countdown",
    ]
    think, rollout = stages["denoiser"]
    assert rollout == "redraft train latent-rollout --start runs/latent-denoiser --task countdown"
    assert shlex.split(think)[:3] == ["redraft", "think", "runs/latent-denoiser"]
    assert stages["rollout"] == [think.replace("latent-denoiser", "latent-rollout")]
    other = next_steps(LatentRunConfig(task="composition", out="runs/c"))
    assert other[1] == "redraft train latent-denoiser --start runs/c --task composition"


def test_the_command_that_trains_for_as_long_again_is_in_the_unit_of_the_run():
    begin = "redraft train 'runs/a b' --resume --train."
    steps = RunConfig(out="runs/a b")
    minutes = RunConfig(out="runs/a b", train=TrainConfig(max_minutes=4.5))
    assert longer_command(steps, steps=600) == f"{begin}max-steps 1200"
    assert longer_command(minutes, steps=600) == f"{begin}max-minutes 9"
