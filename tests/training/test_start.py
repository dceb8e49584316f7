"""Training that begins with a model that exists: its weights, tokenizer and settings go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import redraft
from redraft.cli import main
from redraft.data.config import DataConfig
from redraft.data.tokenizer import train_tokenizer
from redraft.models.config import ModelConfig
from redraft.recipes import RECIPES
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import RunResult, run
from redraft.training.start import load_start

QUIET = Console(quiet=True)
TEXTS = [f"def function_{i}_{j}(x):\n    return x + {i * j % 7}\n" for i in range(40) for j in range(12)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start-corpus")
    for i in range(40):
        (folder / f"module_{i}.py").write_text("\n".join(TEXTS[12 * i : 12 * i + 12]))
    return folder


def save_autoregressive(folder, *, dtype=torch.float32):
    """Save a Llama as published: causal, with a tokenizer that has no mask token."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.mask_token = None
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=304, **SIZES, max_position_embeddings=64, bos_token_id=None, eos_token_id=1)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return save_autoregressive(tmp_path_factory.mktemp("start") / "source")


@pytest.fixture(scope="session")
def start(source):
    """The same model, converted: a new mask row, logits shifted."""
    redraft.convert(source, source.parent / "converted", shift_logits=True)
    return source.parent / "converted"


@pytest.fixture
def config(start, corpus, tmp_path):
    return RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(
            source=str(corpus), seq_len=32, validation_fraction=0.2
        ),
        model=ModelConfig(start=str(start)),
        train=TrainConfig(
            batch_size=4, max_steps=4, save_every=2, max_validation_windows=8, precision="float32",
            compile="off", learning_rate=1e-2,
        ),
    )  # fmt: skip


def short(train):
    return replace(train, max_steps=1)


def starting_from(config, folder):
    return replace(config, model=ModelConfig(start=str(folder)))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_begins_with_the_weights_of_its_start_and_keeps_its_settings(config, start):
    run(replace(config, train=replace(short(config.train), learning_rate=1e-12)), console=QUIET)
    before, after = weights(start), weights(config.out)
    assert all((before[name] - after[name]).abs().max() <= 1e-9 for name in before)
    ours, theirs = (redraft.load(folder, device="cpu") for folder in (config.out, start))
    assert ours.denoiser.settings == theirs.denoiser.settings
    assert ours.denoiser.settings.shift_logits
    assert ours.denoiser.settings.block_size is None
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template


def test_block_diffusion_goes_on_from_a_start(config):
    objective = ObjectiveConfig(kind="block", block_size=8)
    run(replace(config, objective=objective, train=short(config.train)), console=QUIET)
    settings = redraft.load(config.out, device="cpu").denoiser.settings
    assert (settings.block_size, settings.shift_logits) == (8, True)


def test_a_causal_context_goes_on_from_a_start_and_is_autoregressive_in_plain_transformers(config, tmp_path):
    objective = ObjectiveConfig(kind="block", block_size=8, context="causal")
    run(replace(config, objective=objective, train=short(config.train)), console=QUIET)
    lm = redraft.load(config.out, dtype=torch.float64, device="cpu")
    settings = lm.denoiser.settings
    assert (settings.block_size, settings.context, settings.within) == (8, "causal", "full")
    plain = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float64)
    prompt, options = torch.tensor([[5, 6, 7, 8]]), {"do_sample": False, "eos_token_id": -1}
    theirs = plain.generate(prompt, max_new_tokens=8, bad_words_ids=[[settings.mask_token_id]], **options)
    ours = lm.generate([[5, 6, 7, 8]], preset="ar", max_new_tokens=8, stop=None)
    assert ours.tokens[0].tolist() == theirs[0, 4:].tolist()
    blocks = replace(objective, context="block")
    with pytest.raises(ValueError, match=r"has a causal context, .* Use --objective.context causal --objective.within"):
        run(replace(starting_from(config, config.out), objective=blocks, out=str(tmp_path / "next")), console=QUIET)


def test_half_precision_is_trained_in_single_with_a_mask_token_that_its_tokenizer_does_not_know(config, tmp_path):
    half = save_autoregressive(tmp_path / "half", dtype=torch.bfloat16)
    made = redraft.convert(half, tmp_path / "converted-half", mask_token_id=303)
    assert weights(made.folder)["model.norm.weight"].dtype == torch.bfloat16
    run(replace(starting_from(config, made.folder), train=short(config.train)), console=QUIET)
    assert all(weight.dtype == torch.float32 for weight in weights(config.out).values())
    assert redraft.load(config.out, device="cpu").denoiser.settings.mask_token_id == 303


def test_what_it_saves_is_trained_and_loads_in_plain_transformers_and_a_resumed_run_ends_bitwise_equal(config, start):
    outcome = run(config, console=QUIET)
    before, whole = weights(start), weights(config.out)
    assert any((before[name] - whole[name]).abs().max() > 1e-3 for name in before)
    ids = torch.arange(3, 35)[None]
    ours = redraft.load(outcome.folder, device="cpu").logits(ids, layout="full")
    with torch.no_grad():  # plain transformers does not know the shift
        plain = AutoModelForCausalLM.from_pretrained(outcome.folder).eval()(input_ids=ids).logits
    assert torch.allclose(ours[:, 1:], plain[:, :-1], atol=1e-5)
    shutil.rmtree(Path(config.out) / "checkpoint-4")  # as if it had been killed after its second step
    (Path(config.out) / "model.safetensors").unlink()
    run(config, resume=True, console=QUIET)
    resumed = weights(config.out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_encoder_without_a_head_or_an_end_token_trains(config, tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.eos_token, tokenizer.sep_token, tokenizer.pad_token = None, "<|eos|>", None
    BertModel(BertConfig(vocab_size=300, **SIZES, max_position_embeddings=32)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    made = redraft.convert(tmp_path / "bert", tmp_path / "converted-bert")
    run(replace(starting_from(config, made.folder), train=short(config.train)), console=QUIET)
    assert not redraft.load(config.out, device="cpu").denoiser.settings.shift_logits
    AutoModelForMaskedLM.from_pretrained(config.out)


def test_a_mask_token_that_the_tokenizer_calls_otherwise_becomes_its_mask_token(config, source, tmp_path):
    made = redraft.convert(source, tmp_path / "asked", mask_token_id=0)
    tokenizer = json.loads((made.folder / "tokenizer_config.json").read_text())
    tokenizer.pop("mask_token")
    (made.folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    lm = load_start(starting_from(config, made.folder))
    assert lm.tokenizer.mask_token_id == lm.denoiser.settings.mask_token_id == 0


def without_tokenizer(start, folder):
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    return folder


def without_end(start, folder):
    shutil.copytree(start, folder)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


def of_another_process(start, folder):
    shutil.copytree(start, folder)
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"]["process"] = "uniform"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda start, _: start.parent / "source", "is autoregressive .*`redraft convert .*source OUT`"),
        (lambda _, folder: folder, "no model at .*: the folder does not exist"),
        (without_tokenizer, "model.start must bring its tokenizer; .* holds none. Save one beside the model."),
        (without_end, "the tokenizer must have eos_token; .* has none. Add it"),
        (of_another_process, "was trained for process uniform; got masked"),
    ],
)
def test_a_start_that_cannot_be_trained_is_told_before_anything_is_written(config, start, tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as told:
        run(starting_from(config, make(start, tmp_path / "changed")), console=QUIET)
    assert "\n" not in str(told.value)
    assert not Path(config.out).exists()


def test_windows_beyond_the_context_of_the_start_are_told(config):
    longer = replace(config, data=replace(config.data, seq_len=65))
    with pytest.raises(ValueError, match="data.seq_len must not exceed the context of model.start; got 65 and 64"):
        run(longer, console=QUIET)


@pytest.mark.parametrize(
    "given", [{"size": "1m"}, {"max_positions": 64}, {"architecture": "modernbert", "dropout": 0.1}]
)
def test_a_shape_beside_a_start_is_told(given):
    with pytest.raises(ValueError, match=f"model.start brings its own shape; got model.{next(iter(given))}"):
        ModelConfig(start="some/model", **given)


def test_a_tokenizer_beside_a_start_is_told():
    with pytest.raises(ValueError, match="model.start brings its own tokenizer; got data.tokenizer 'other'"):
        RunConfig(model=ModelConfig(start="some/model"), data=DataConfig(tokenizer="other"))


@pytest.mark.parametrize("flag", [["--model.start", "a/b"], ["--model.start=a/b"]])
def test_the_shape_of_a_recipe_gives_way_to_a_start_on_the_command_line(monkeypatch, flag, capsys):
    taken = []

    def take(config, **_):
        taken.append(config)
        return RunResult(folder=Path(config.out), steps=0)

    monkeypatch.setattr("redraft.training.run.run", take)
    with pytest.raises(SystemExit):
        main(["train", "stdlib-tiny", *flag])
    assert taken[0].model == ModelConfig(start="a/b")
    assert taken[0].train == RECIPES["stdlib-tiny"]().train
    with pytest.raises(SystemExit) as exit_:
        main(["train", "stdlib-tiny", *flag, "--model.size", "1m,layers=3"])
    assert exit_.value.code == 2
    assert "got model.size beside it" in capsys.readouterr().err
