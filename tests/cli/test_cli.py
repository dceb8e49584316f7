"""The commands as a user runs them: output, exit codes, one clear line for a mistake."""

import html.parser
import io
import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest
from sentence_pieces import Script, scripted, text_lm_of

from redraft.cli import main

ROOT = Path(__file__).parents[2]


def redraft(*arguments, stdin=""):
    """Run a command in this process; one that succeeds has nothing to say on standard error."""
    output, errors = io.StringIO(), io.StringIO()
    streams = patch.multiple(sys, stdin=io.StringIO(stdin), stdout=output, stderr=errors)
    with streams, pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    done = CompletedProcess(arguments, exit_.value.code, output.getvalue(), errors.getvalue())
    assert done.returncode or done.stderr == "", done.stderr
    return done


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model, trained by the command."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    settings = ["--train.max-steps", "3", "--train.compile", "off", "--data.max-documents", "12"]
    done = redraft("train", "stdlib-tiny", "--out", folder, *settings)
    assert done.returncode == 0, done.stderr
    assert "validation NELBO" in done.stdout
    assert "unigram entropy" in done.stdout
    assert "gzip -9" in done.stdout
    return folder


def test_train_writes_all_that_belongs_to_a_run(model):
    names = {path.name for path in model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.json", "log.jsonl", "loss.png"} <= names
    assert not names & {".saving"}
    config = json.loads((model / "config.json").read_text())
    assert config["diffusion"]["process"] == "masked"
    assert config["generation"] == {"preset": "llada-random", "temperature": 0.9}


def test_a_run_can_be_run_again_from_its_recipe(model, tmp_path):
    done = redraft("train", model / "recipe.json", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    first = (model / "log.jsonl").read_text().splitlines()
    again = (tmp_path / "again" / "log.jsonl").read_text().splitlines()
    evaluations = [[json.loads(line).get("eval_loss") for line in log] for log in (first, again)]
    assert evaluations[0] == evaluations[1]


def test_sample_prints_texts_or_json_and_writes_a_page(model, tmp_path):
    short = ["--max-new-tokens", "8", "--steps", "4"]
    done = redraft("sample", model, "import ", "class ", *short, "--trace", tmp_path / "trace.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import ")
    page = (tmp_path / "trace.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert "redraft sample" in page
    done = redraft("sample", model, "--json", *short, stdin="import ")
    assert json.loads(done.stdout)["prompt"] == "import "
    again = redraft("sample", model, "--json", *short, stdin="import ")
    assert again.stdout == done.stdout


def test_infill_keeps_the_text_around_the_holes(model):
    done = redraft("infill", model, "def f(x):[MASK:3]return y")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(x):")
    assert done.stdout.rstrip("\n").endswith("return y")
    done = redraft("infill", model, "def f(x):[MASK:3]return y", "--json")
    assert json.loads(done.stdout)["text"].startswith("def f(x):")
    assert len(json.loads(done.stdout)["tokens"]) == 3


def test_a_vote_prints_the_most_frequent_text(model):
    samples = ["--num-samples", "6", "--max-new-tokens", "1", "--temperature", "0.3", "--seed", "2"]
    rows = [json.loads(line) for line in redraft("sample", model, "x", *samples, "--json").stdout.splitlines()]
    texts = [row["text"] for row in rows]
    assert len(texts) == 6
    (chosen,) = [
        json.loads(line) for line in redraft("sample", model, "x", *samples, "--vote", "--json").stdout.splitlines()
    ]
    assert chosen["text"] == max(texts, key=texts.count)
    assert chosen["votes"] == texts.count(chosen["text"])
    assert f"{chosen['votes']} of 6 samples agree" in redraft("sample", model, "x", *samples, "--vote").stdout


def test_the_presets_are_listed_with_their_sources():
    listed = redraft("sample", "--preset", "?").stdout
    assert re.search(r"^llada +\S", listed, re.MULTILINE)
    assert listed == redraft("sample", "--preset=?").stdout


def test_sample_and_infill_keep_to_a_constraint(model):
    done = redraft("sample", model, "x = ", "--max-new-tokens", "8", "--choice", "None", "True", "--json")
    assert json.loads(done.stdout)["text"] in ("None", "True"), done.stderr
    done = redraft("infill", model, "x = [MASK:3]\n", "--regex", "[0-9]+")
    assert re.search(r"x = [0-9]+\n", done.stdout), done.stderr


def test_chat_takes_turns_and_commands_until_the_end_of_input(model):
    turns = "import os\n/set steps 2\n/settings\n/set nonsense 1\n/reset\nclass\n/quit\n"
    done = redraft("chat", model, "--max-new-tokens", "4", "--steps", "4", stdin=turns)
    assert done.returncode == 0, done.stderr
    assert "no chat template" in done.stdout
    assert "steps=2" in done.stdout
    assert "forgotten" in done.stdout
    assert "nonsense" in done.stdout


def test_chat_forgets_what_stands_behind_the_end(model):
    from redraft.cli.conversation import Conversation
    from redraft.language_model import load

    lm = load(model)
    conversation = Conversation(lm, {})
    for seed in range(40):
        conversation.reset()
        conversation.given = {"max_new_tokens": 8, "steps": 2, "temperature": 3.0, "seed": seed}
        list(conversation.reply("x"))
        (text,) = lm.generate("x", **conversation.given).texts
        assert conversation.text == "x" + text + "\n"


def test_doctor_reports_and_runs_a_tiny_model():
    done = redraft("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a tiny model runs" in done.stdout
    assert "transformers" in done.stdout


@pytest.mark.parametrize("command", ["train stdlib-tiny", "sample", "infill", "chat"])
def test_help_shows_the_defaults(command):
    done = redraft(*command.split(), "--help")
    assert done.returncode == 0
    assert "default:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; .*Did you mean 'train'"),
        (["train", "stdlib-tin"], "unknown recipe 'stdlib-tin'; .*Did you mean 'stdlib-tiny'"),
        (["train", "stdlib-tiny", "--train.learnin-rate", "1"], "learnin-rate.*Did you mean --train.learning-rate"),
        (["train", "stdlib-tiny", "--train.max-steps", "many"], "--train.max-steps.*many"),
        (["train", "stdlib-tiny", "--train.max-steps", "-3"], "max_steps must .*; got -3"),
        (["train", "stdlib-tiny", "--objective.schedule", "cosin"], "invalid choice 'cosin'.*'cosine'"),
        (["train", "stdlib-tiny", "--model.size", "2m"], "unknown model.size '2m'"),
        (["train", "stdlib-tiny", "--data.seq-len", "4096"], "seq_len must not exceed model.max_positions"),
        (["train", "stdlib-tiny", "--data.source", "nowhere.txt"], "nowhere.txt"),
        (["train", "no/run.json"], "no/run.json is not a readable recipe"),
        (["sample", "nowhere", "x"], "cannot read a model config from nowhere"),
        (["sample", "./nowhere", "x"], "the folder does not exist"),
        (["sample", "MODEL-2", "x"], "tiny-2: the folder does not exist. Did you mean .*tiny"),
        (["sample", "MODEL", "x", "--trace", "out.pdf"], "cannot write out.pdf: its name must end in .html or .json"),
        (["sample", "MODEL", "x", "--steps", "many"], r"--steps must be \{None\}\|INT; got \['many'\]"),
        (["sample", "MODEL"], "there is no prompt: standard input holds no text"),
        (["sample", "MODEL", "", "--chat"], "a user's message must hold text"),
        (["think", "MODEL", ""], "a prompt is empty"),
        (["sample"], "model|MODEL|STR"),
        (["sample", "MODEL", "x", "--steps", "-1"], r"steps must lie in \[1, 1048576\]; got -1"),
        (["sample", "MODEL", "x", "--block-size", "7"], "block_size must divide max_new_tokens; got 7 and 128"),
        (["sample", "MODEL", "x", "--max-new-tokens", "3000"], "must fit into the model's context of 512 tokens"),
        (["sample", "MODEL", "x", "--trace", "/no/such/place.html"], "cannot write /no/such/place.html"),
        (["sample", "MODEL", "x", "--preset", "lada"], "unknown preset 'lada'"),
        (["sample", "MODEL", "x", "--chat"], "no chat template"),
        (["sample", "MODEL", "x", "--regex", "(a"], "the regular expression cannot be an automaton"),
        (["sample", "MODEL", "x", "--json-schema", "no.json"], "a file that holds one; got 'no.json'"),
        (["infill", "MODEL", "no hole"], "nothing to fill"),
        (["sample", "MODEL", "x", "--device", "cuda"], "torch finds no such device"),
        (["sample", "MODEL", "x", "--device", "gpu"], "device 'gpu' is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, model, tmp_path):
    arguments = [a.replace("MODEL", str(model)) for a in arguments]
    if arguments[0] == "train":
        arguments += ["--out", str(tmp_path / "out")]
    done = redraft(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_not_overwritten(model):
    before = (model / "model.safetensors").read_bytes()
    done = redraft("train", "stdlib-tiny", "--out", model)
    assert done.returncode == 2
    assert "holds a run" in done.stderr
    assert (model / "model.safetensors").read_bytes() == before


def test_the_policies_and_the_batch_of_the_sampling_page_run(lm):
    parts = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), flags=re.DOTALL)
    names = {"lm": lm}
    exec("\n".join(parts), names)
    order = [int(step.is_committed[0].nonzero()[0]) for step in names["steps"]]
    assert order == list(range(2, 10))
    blocks = [int(position) // 4 for step in names["backwards"] for position in step.is_committed[0].nonzero()]
    assert blocks == sorted(blocks, reverse=True)
    assert set(names["finished"]) == {names["first"], names["second"]}
    for id, prompt in ((names["first"], [5, 6, 7]), (names["second"], [5, 6, 7, 8, 9])):
        expected = lm.generate([prompt], max_new_tokens=8, stop=None).sequences[0]
        assert names["finished"][id].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["llama2", "first", "bytes"])
def test_a_reply_keeps_its_spaces_and_ends_before_a_stop_string(kind):
    from redraft.cli.conversation import Conversation
    from redraft.cli.generation import styled, text_of

    lm = text_lm_of(kind)
    space = "Ġ" if kind == "bytes" else "▁"
    row = lm.tokenizer.convert_tokens_to_ids([space + "self", space + "yes", "<|im_end|>", "no"])
    conversation = Conversation(scripted(lm, Script(row)), {"max_new_tokens": 6, "block_size": 1, "stop": "<|im_end|>"})
    shown = list(conversation.reply("un"))
    assert conversation.text == "un self yes\n"
    assert shown[-1].plain == " self yes"
    pieces = styled(lm, row[:2] * 2, ["", "bold", "bold", ""])
    assert pieces.plain.strip() == "self yes self yes"
    assert [text_of(lm, id) for id in row[:3]] == [" self", " yes", "<|im_end|>"]
