"""Data and checkpoints that cannot be trained on: one clear line, exit code 2, nothing written."""

import json
import re
from pathlib import Path

import pytest

from redraft.cli import main

GOOD = [{"prompt": f"what is {i}?", "response": f"{i} is {i}"} for i in range(40)]
OTHER_SCHEMA = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
FILES = {
    "good.jsonl": GOOD,
    "empty-turn.jsonl": [*GOOD[:3], {"prompt": "a", "response": " "}],
    "no-answers.jsonl": [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(9)],
    "empty.jsonl": [],
    "mixed.jsonl": [*GOOD[:3], OTHER_SCHEMA],
}
TINY = [
    "--data.kind=chat", "--data.seq-len=32", "--data.vocab-size=270", "--data.validation-fraction=0.2",
    "--train.batch-size=2", "--train.max-steps=2",
    "--train.save-every=1", "--train.max-validation-windows=1", "--train.compile=off",
    "--train.precision=float32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, records in FILES.items():
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("questions.jinja").write_text("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")


def train(*arguments, code=0):
    with pytest.raises(SystemExit) as done:
        main(["train", "stdlib-tiny", *TINY, "--out", "run", *arguments])
    assert done.value.code == code


def refused(capsys, *arguments):
    """What `redraft train` says when it refuses."""
    capsys.readouterr()
    train(*arguments, code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("no-answers.jsonl", "", "line 1: no assistant turn, so there is nothing to learn"),
        ("empty.jsonl", "", "'empty.jsonl' holds no conversation with an answer"),
        ("empty-turn.jsonl", "", "empty-turn.jsonl, line 4: message 2: an empty assistant turn. Edit or remove it"),
        ("mixed.jsonl", "", "line 4: a record of messages, but those before it have prompt/response. Use one"),
        ("good.jsonl", "--data.chat.template no.jinja", "data.chat.template must be a text file; got 'no.jinja'"),
        ("good.jsonl", "--data.chat.template questions.jinja", "changes the answer .* Use another data.chat.template"),
        ("good.jsonl:-0.3,mixed.jsonl:1", "", "with positive weights, .*; got 'good.jsonl:-0.3' in"),
        ("stdlib:0.3,stdlib:1", "", "'stdlib' holds documents, not records. Use data.kind text, or mix it with"),
        ("good.jsonl:0.3,god.jsonl:1", "", "no file or folder 'god.jsonl'. Did you mean 'good.jsonl'"),
        ("god.jsonl", "", "no file or folder 'god.jsonl'. Did you mean 'good.jsonl'"),
    ],
)
def test_data_that_cannot_be_learnt_are_one_line_and_exit_code_2(source, flags, message, capsys):
    line = refused(capsys, "--data.source", source, *flags.split())
    assert re.search(message, line), line
    assert not Path("run").exists()


def test_a_checkpoint_of_another_objective_is_not_resumed(capsys):
    data = ("--data.source", "good.jsonl")
    train(*data)
    line = refused(capsys, *data, "--resume", "--objective.kind", "uniform")
    assert "these settings differ: objective.kind: 'masked' -> 'uniform'" in line
    recipe = Path("run/recipe.json")
    recipe.write_text(recipe.read_text().replace('"masked"', '"uniform"'))
    line = refused(capsys, *data, "--resume", "--objective.kind", "uniform")
    assert "checkpoint-2 was trained with kind 'masked', but recipe.json" in line
    recipe.write_text(recipe.read_text().replace('"uniform"', '"masked"').replace('"t_min": 0.001', '"t_min": 0.25'))
    line = refused(capsys, *data, "--resume", "--objective.t-min", "0.25")
    assert "checkpoint-2 was trained with t_min 0.001, but recipe.json or a file that it names has 0.25" in line
    line = refused(capsys, *data, "--train.max-steps=-3")
    assert re.search(r"^redraft train: train\.max_steps must .*; got -3\. See --help\.$", line), line
    line = refused(capsys, *data, "--out", "other", "--model.start", "run", "--objective.kind", "uniform")
    assert "run was trained for process masked; got uniform" in line
