"""`redraft convert`: what it prints, and one line for a mistake."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.cli import main


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


def test_it_says_what_it_made(source, tmp_path, capsys):
    assert run("convert", source, str(tmp_path / "out"), "--block-size", "4", "--shift-logits") == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM, block-causal attention, 4 tokens, logits shifted" in said
    assert "mask token: 40, a new row, set to the mean of the other rows" in said
    assert said.count("  yes  ") == 6


def test_a_causal_context_samples_at_once_and_says_how_to_train_it(source, tmp_path, capsys):
    flags = ["--block-size", "4", "--context", "causal", "--within", "causal"]
    assert run("convert", source, str(tmp_path / "out"), *flags) == 0
    said = capsys.readouterr().out
    assert "causal attention, causal in an open block of 4 tokens" in said
    assert "yes  committed text is autoregressive" in said
    assert "'Once upon a time' --preset ar" in said
    assert "redraft train a2d-speculate --model.start" in said
    assert "--objective.block-size 4 --objective.within causal" in said


def test_a_converted_model_can_be_checked_as_it_is(source, tmp_path, capsys):
    run("convert", source, str(tmp_path / "out"))
    capsys.readouterr()
    assert run("convert", str(tmp_path / "out")) == 0
    assert "yes  cached blocks equal uncached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "4"], "name a model to convert"),
        (["SOURCE", "OUT", "--to", "lada"], "unknown family 'lada'"),
        (["SOURCE", "OUT", "--block-size", "0"], "block_size must be at least 1; got 0"),
        (["SOURCE", "OUT", "--bloc-size", "4"], "Unrecognized options"),
        (["/no/where", "OUT"], "the folder does not exist"),
        (["SOURCE"], "is autoregressive"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(source, tmp_path, capsys, arguments, message):
    named = [{"SOURCE": source, "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments]
    assert run("convert", *named) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("redraft convert: ")
    assert message in said


def test_help_shows_every_flag(capsys):
    assert run("convert", "--help") == 0
    said = capsys.readouterr().out
    for flag in ("--mask-token-id", "--shift-logits", "--block-size", "--merge", "--to", "--family"):
        assert flag in said
