"""The stages as a user runs them: autoencoder, denoiser, rollout, think; and their mistakes."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import redraft
from redraft.cli import _dispatch
from redraft.data.sources import split_of
from redraft.latent.autoencoder import TextAutoencoder
from redraft.latent.config import LatentRunConfig
from redraft.latent.encode import encode_examples, encode_split, word_tokenizer
from redraft.latent.stages import run_stage
from redraft.latent.tasks import WorkedExample, find_task
from redraft.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SMALL = {
    "autoencoder": {"hidden_size": 32, "latent_dim": 4},
    "denoiser": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
}


def shrunk(config, **changes):
    """A recipe cut down to a few steps of a few dozen parameters."""
    return replace(
        config,
        **{name: replace(getattr(config, name), **small) for name, small in SMALL.items() if name == config.stage},
        train=replace(
            config.train,
            batch_size=8,
            max_steps=4,
            precision="float32",
            max_minutes=None,
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "sums.jsonl"
    pairs = [(a, b) for a in range(8) for b in range(8)]
    rows = [
        {"prompt": f"{a} {b}", "blocks": [f"{a} + {b}", f"= {a + b}"][: 1 + a % 2], "answer": f"{a + b}"}
        for a, b in pairs
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, task_file):
    """The three stages, one after another."""
    folder, console = tmp_path_factory.mktemp("runs"), Console(quiet=True)
    started = {}
    for stage, before in (("autoencoder", None), ("denoiser", "autoencoder"), ("rollout", "denoiser")):
        start = None if before is None else str(folder / before)
        config = shrunk(RECIPES[f"latent-{stage}"](), out=str(folder / stage), task=task_file, start=start, force=True)
        started[stage] = run_stage(config, console=console).folder
    return started


def test_each_stage_writes_a_whole_folder(runs):
    for stage, folder in runs.items():
        names = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.json", "log.jsonl"} <= names
        assert ("autoencoder" in names) == (stage != "autoencoder")
        assert json.loads((folder / "config.json").read_text())["stage"] == stage
        assert LatentRunConfig.read(folder / "recipe.json").stage == stage


def test_logs_hold_the_parts_of_the_loss(runs):
    lines = [json.loads(line) for line in (runs["rollout"] / "log.jsonl").read_text().splitlines()]
    assert {"loss", "flow", "stop", "rollout"} <= set(lines[0])


@pytest.mark.parametrize("stage", ["denoiser", "rollout"])
def test_a_trained_model_thinks_and_answers_the_same_twice(runs, stage):
    thinker = redraft.load_thinker(runs[stage], device="cpu")
    once, again = (thinker.think("3 4", steps=2, num_samples=2, seed=1)[0] for _ in range(2))
    assert [(s.text, s.answer) for s in once] == [(s.text, s.answer) for s in again]
    assert all(torch.equal(a.thoughts[0].latents, b.thoughts[0].latents) for a, b in zip(once, again, strict=True))


def test_think_shows_thoughts_forming_and_writes_a_page(runs, tmp_path, capsys):
    arguments = ["think", str(runs["denoiser"]), "3 4", "--blocks", "2", "--steps", "4"]
    assert _dispatch([*arguments, "--show", "--trace", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"t = ([\d.]+)", shown) == ["1", "0.75", "0.5", "0.25", "0"] * 2
    page = (tmp_path / "page.html").read_text()
    assert page.count("thought ") == 2
    assert page.count("t = ") == 10  # 4 steps and the block itself at t = 0
    assert _dispatch([*arguments, "--num-samples", "2", "--trace", str(tmp_path / "data.json")]) == 0
    samples = json.loads((tmp_path / "data.json").read_text())
    assert sorted(sample["is_vote"] for sample in samples) == [False, True]
    assert [len(thought["steps"]) for thought in samples[0]["thoughts"]] == [4, 4]
    assert "t = " not in capsys.readouterr().out.split("vote")[0].split("forwards")[-1]


def test_check_prints_the_gate_and_fails_where_it_is_missed(runs, capsys):
    assert _dispatch(["think", "--check", str(runs["denoiser"])]) == 1
    shown = capsys.readouterr().out
    assert re.findall(r"relative noise ([\d.]+)", shown) == ["0", "0.1", "0.25", "0.5", "0.75"]
    assert "the gate is not passed" in shown


@pytest.mark.slow
def test_mistakes_are_one_line_and_exit_code_2(runs, task_file, tmp_path, capsys):
    autoencoder, denoiser, rollout = (str(runs[stage]) for stage in ("autoencoder", "denoiser", "rollout"))
    out = ["--out", str(tmp_path / "out"), "--task", task_file]
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"prompt": "a", "blocks": ["1"], "answer": "1"}\n' * 64)
    other = ["--out", str(tmp_path / "out"), "--task", "sudoku"]
    strange, held = tmp_path / "strange.jsonl", tmp_path / "held.jsonl"
    foreign = [{"prompt": f"{i % 8} {i // 8}", "blocks": ["foo bar baz"], "answer": ""} for i in range(40)]
    strange.write_text("\n".join(map(json.dumps, foreign)))
    prompt = next(str(i) for i in range(99) if split_of(str(i), validation_fraction=0.1) == "validation")
    held.write_text(json.dumps({"prompt": prompt, "blocks": ["1"], "answer": "1"}))
    checkpoint = runs["denoiser"] / "checkpoint-4"
    from_autoencoder = ["train", "latent-denoiser", "--start", autoencoder, "--force"]
    from_denoiser = ["train", "latent-rollout", "--start", denoiser]
    for arguments, message in [
        (["think", denoiser, "3 4", "--blocks", "0"], r"blocks must lie in \[1, .*; got 0"),
        (["think", denoiser, "3 4", "--steps", "0"], r"steps must lie in \[1, .*; got 0"),
        (["think", denoiser, "1 2 3 4 5 6 7"], "a prompt must have 1 to 2 tokens, as in training; got 7"),
        (["think", autoencoder, "3 4"], "must be of stage denoiser or rollout; it is of stage 'autoencoder'"),
        (
            ["sample", denoiser, "3 4"],
            f"is a latent denoiser .*Use redraft.load_thinker or `redraft think {re.escape(denoiser)}`",
        ),
        (
            ["sample", autoencoder, "3 4"],
            f"is a latent autoencoder .*`redraft think --check {re.escape(autoencoder)}`",
        ),
        (["train", "latent-rollout", "--smoke"], "-smoke: the folder does not exist. `redraft train latent-denoiser`"),
        (["think", denoiser, "3 4", "--blocks", "9"], "blocks must be at most the 2 the model was built for; got 9"),
        (["think", denoiser, "3 zwei"], "the model does not know the word 'zwei'"),
        (["think", str(Path(denoiser) / "no"), "3 4"], "the folder does not exist"),
        (["think", "--check", str(tmp_path)], "config.json"),
        (
            ["train", denoiser, "--resume", "--objective.times", "uniform"],
            "objective.times: 'logit-normal' -> 'uniform'",
        ),
        (["train", "latent-denoiser", "--start", autoencoder, "--force", "--out", denoiser], "holds a run"),
        (["think", "--check", denoiser, "3 4"], "measures the autoencoder without prompts; got '3 4'"),
        (["train", "latent-denoiser", "--start", denoiser, *out], "of stage autoencoder; it is of stage 'denoiser'"),
        (["train", "latent-rollout", "--start", autoencoder, *out], "of stage denoiser; it is of stage 'autoencoder'"),
        (["train", "latent-rollout", "--start", rollout, *out], "of stage denoiser; it is of stage 'rollout'"),
        (["train", "latent-denoiser", "--start", autoencoder, *out], "fails its gate: .*Train it longer, or --force"),
        (["train", "latent-denoiser", "--start", str(tmp_path / "no"), *out], "the folder does not exist"),
        (["train", "latent-denoiser", "--start", autoencoder, "--resume", *out], "holds no run to resume"),
        (["train", "latent-autoencoder", "--train.accumulation", "2", *out], "cannot be accumulated; got .* 2"),
        (
            ["train", "latent-denoiser", "--start", autoencoder, "--force", "--train.batch-size", "999", *out],
            "rows, fewer than",
        ),
        (
            ["train", "latent-autoencoder", "--task", str(alone), *out[:2]],
            "no held-out blocks for the gate: of 1 prompts 10 % are held out",
        ),
        ([*from_denoiser, *other], "another task; got prompt_tokens 16, not 2 or fewer;.* words that it does not know"),
        (
            ["train", "latent-denoiser", "--force", "--start", autoencoder, *other],
            "another task; got block_tokens 4, not 3",
        ),
        ([*from_denoiser, *out, "--objective.answer-weight", "-1"], "answer_weight must be at least 0; got -1.0"),
        (["think", denoiser, "3 4", "--cfg-scale", "nan"], "cfg_scale must be a finite number; got nan"),
        (["think", denoiser, "3 4", "--init-noise", "inf"], "init_noise must be a finite number; got inf"),
        (
            ["train", "latent-autoencoder", "--autoencoder.latent-dim", "0", *out],
            r"latent_dim must lie in \[1, .*; got 0",
        ),
        (["train", "latent-denoiser", "--denoiser.num-layers", "0", *out], r"num_layers must lie in \[1, .*; got 0"),
        (["train", "latent-autoencoder", "--task", "sums"], "unknown task 'sums'"),
        ([*from_autoencoder, *out, "--denoiser.weighting", "x"], "invalid choice 'x'"),
        ([*from_autoencoder, *out, "--autoencoder.latent-dim", "8"], "settings of autoencoder are for stage autoencod"),
        (["train", "latent-autoencoder", *out, "--start", autoencoder], "an autoencoder is the first stage; got start"),
        (["train", "latent-autoencoder", "--task", task_file, "--out", ""], "out must name the folder"),
        ([*from_autoencoder, "--task", str(strange), *out[:2]], "words that it does not know, 'bar' the first"),
        (
            ["train", "latent-autoencoder", "--task", str(held), *out[:2]],
            "there are no blocks to train on: of 1 prompts",
        ),
        (["think", str(checkpoint), "3 4"], "checkpoint-4 is a checkpoint, not a finished model"),
        (["think", "--check", str(checkpoint)], "a checkpoint, not a finished model. Give the folder of the ended run"),
    ]:
        assert _dispatch(arguments) == 2, arguments
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert re.search(message, told[0]), told
        assert not (tmp_path / "out").exists()


def test_an_autoencoder_without_a_normaliser_is_refused_even_if_forced(runs, task_file, tmp_path, capsys):
    bare, thinker = tmp_path / "bare", tmp_path / "thinker"
    shutil.copytree(runs["autoencoder"], bare)
    shutil.copytree(runs["denoiser"], thinker)
    for folder in (bare, thinker / "autoencoder"):
        TextAutoencoder(TextAutoencoder.from_pretrained(folder).config).save_pretrained(folder)
    for arguments in (
        [
            "train",
            "latent-denoiser",
            "--start",
            str(bare),
            "--force",
            "--task",
            task_file,
            "--out",
            str(tmp_path / "out"),
        ],
        ["train", "latent-rollout", "--start", str(thinker), "--task", task_file, "--out", str(tmp_path / "out")],
        ["think", "--check", str(bare)],
        ["think", str(thinker), "3 4"],
    ):
        assert _dispatch(arguments) == 2, arguments
        (told,) = capsys.readouterr().err.strip().splitlines()
        assert "no normaliser; got scale 0" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["", "autoencoder"])
def test_damaged_files_are_one_line(runs, tmp_path, capsys, part):
    """What transformers would fill with memory as it was, or end in a traceback."""
    told = []
    for number, (name, damage) in enumerate(
        [
            ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
            ("model.safetensors", Path.unlink),
            ("model.safetensors", without_first_weight),
            ("config.json", partial(edit, num_layers=3)),
            ("config.json", partial(edit, hidden_size=64)),
            ("model.safetensors", with_nan),
            ("config.json", lambda path: path.write_text("[" * 100_000)),
            ("tokenizer.json", Path.unlink),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(runs["denoiser"], folder)
        if name == "tokenizer.json":
            for file in folder.glob("*token*"):
                file.unlink()
        else:
            damage(folder / part / name)
        assert _dispatch(["think", str(folder), "3 4"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        told.append(line)
    messages = ["Is a file cut short", "cannot read the weights", "1 missing weights", "missing weights", "mismatched"]
    messages[3] = "chunk is linear now" if part else messages[3]
    messages += ["holds NaN or infinity", "maximum recursion depth exceeded", "has no tokenizer"]
    for line, message in zip(told, messages, strict=True):
        assert message in line, line


def without_first_weight(path):
    tensors = load_file(path)
    tensors.pop("scale" if "scale" in tensors else "out.weight")  # the normaliser's, where there is one
    save_file(tensors, path, metadata={"format": "pt"})


def with_nan(path):
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "caf\xe9", "blocks": ["1"], "answer": "1"}', "is not UTF-8"),
        (b"[" * 100_000, "line 1: must be"),
        (b'{"prompt": "1 <|mask|>", "blocks": ["1"], "answer": "1"}\n' * 64, "the word '<|mask|>' is a special token"),
    ],
)
def test_files_of_examples_that_cannot_be_read_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert _dispatch(["train", "latent-autoencoder", "--task", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_an_answer_is_right_however_a_file_spaces_it_or_its_tokenizer_writes_it(tmp_path):
    path = tmp_path / "spaced.jsonl"
    path.write_text(
        '{"prompt": "a", "blocks": ["1  + 1"], "answer": "Two  apples"}\n{"prompt": "b", "blocks": ["1  + 1"]}'
    )
    task = find_task(str(path))
    assert task.is_solved("a", "Two apples")
    assert task.is_solved("b", "1 + 1")
    assert not task.is_solved("b", "1 + 2")
    uncased = replace(task, read=str.lower)
    assert uncased.is_solved("a", "two  apples")


def test_an_encoder_that_is_a_latent_model_is_one_line(runs, task_file, tmp_path, capsys):
    chosen = ["--autoencoder.encoder", str(runs["autoencoder"])]
    assert _dispatch(["train", "latent-autoencoder", "--task", task_file, "--out", str(tmp_path / "o"), *chosen]) == 2
    assert "does not denoise tokens" in capsys.readouterr().err


def test_rollout_without_an_answer_decoder_teaches_thoughts_alone(runs, task_file, tmp_path):
    config = shrunk(RECIPES["latent-denoiser"](), out=str(tmp_path / "mute"), task=task_file, force=True)
    mute = run_stage(
        replace(config, start=str(runs["autoencoder"]), objective=replace(config.objective, answer_weight=0.0)),
        console=Console(quiet=True),
    ).folder
    assert redraft.load_thinker(mute).think("1 2", steps=1)[0][0].answer == ""
    recipe = shrunk(RECIPES["latent-rollout"](), out=str(tmp_path / "r"), task=task_file, start=str(mute))
    thinker = redraft.load_thinker(run_stage(recipe, console=Console(quiet=True)).folder)
    assert thinker.denoiser.config.stage == "rollout"
    assert thinker.think("1 2", steps=1)[0][0].answer == ""


def test_the_own_task_of_the_page_trains_and_thinks(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/latent-thinking.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("max_steps=1000", "max_steps=2"), names)
    assert len(names["samples"]) == 4


def test_stages_over_an_encoder_whose_texts_end_with_a_separator(tmp_path):
    """BERT's tokenizers have no end-of-text token."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder, words = tmp_path / "bert", [str(n) for n in range(8)]
    vocabulary = {word: i for i, word in enumerate(["the", "[PAD]", "[UNK]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(folder)
    task = tmp_path / "task.jsonl"
    rows = [{"prompt": f"{a} {b}", "blocks": [f"{a}", f"{b} {a}"], "answer": f"{b}"} for a in words for b in words]
    task.write_text("\n".join(map(json.dumps, rows)))
    first = shrunk(RECIPES["latent-autoencoder"](), out=str(tmp_path / "ae"), task=str(task))
    first = replace(first, autoencoder=replace(first.autoencoder, encoder=str(folder)))
    start = str(run_stage(first, console=Console(quiet=True)).folder)
    config = shrunk(RECIPES["latent-denoiser"](), out=str(tmp_path / "den"), task=str(task), start=start, force=True)
    thinker = redraft.load_thinker(run_stage(config, console=Console(quiet=True)).folder)
    assert {*thinker.think("1 2", steps=2)[0][0].text.split()} <= {"the", *words}
    ids, mask = encode_split(find_task(str(task)), thinker.tokenizer, split="train", where="bert").real_blocks()
    assert (ids[~mask] == vocabulary["[PAD]"]).all()
    assert not mask.all()


@pytest.mark.slow
def test_the_recipes_autoencoder_passes_the_gate_on_countdown(tmp_path, capsys):
    assert _dispatch(["train", "latent-autoencoder", "--out", str(tmp_path / "ae")]) == 0
    assert _dispatch(["think", "--check", str(tmp_path / "ae")]) == 0
    assert "the gate is passed" in capsys.readouterr().out


@pytest.mark.parametrize("unknown", [None, 0])
def test_padding_is_no_unknown_word_whatever_the_tokenizer_calls_unknown(unknown):
    examples = [
        WorkedExample(prompt="1 2 3", blocks=("1",), answer="1"),
        WorkedExample(prompt="1", blocks=("1 2",), answer="2 3"),
    ]
    tokenizer = word_tokenizer(examples)
    encoded = encode_examples(examples, tokenizer, split="train", held_out=0.0)
    tokenizer.unk_token_id = unknown
    assert encoded.unknown_words(tokenizer) == []
    tokenizer.unk_token_id = int(encoded.columns["prompt"][0, 0])
    assert encoded.unknown_words(tokenizer)[0] == "1"


def test_a_recipe_of_an_earlier_version_is_refused_in_one_line(runs, tmp_path, capsys):
    path = tmp_path / "recipe.json"
    saved = json.loads((runs["denoiser"] / "recipe.json").read_text())
    path.write_text(json.dumps(saved | {"rollout": {"steps": 9, "weight": 1.0}}))
    assert _dispatch(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "settings that were removed" in line
