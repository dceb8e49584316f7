"""docs/convert.md: from an autoregressive model to a chatting diffusion model by the page's own five commands."""

import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.cli import main
from redraft.data.tokenizer import train_tokenizer

PAGE = Path(__file__).parents[2] / "docs/convert.md"
SMALL = {
    "train": ["--data.seq-len", "32", "--train.max-minutes", "None", "--train.max-steps",
              "2", "--train.batch-size", "4", "--train.compile", "off"],
    "sample": ["--max-new-tokens", "4", "--steps", "2"],
    "chat": ["--max-new-tokens", "4", "--steps", "2"],
}  # fmt: skip


def commands():
    """Read the block of commands out of the page."""
    section = PAGE.read_text().split("in five commands")[1]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].strip().splitlines()


@pytest.fixture
def source(tmp_path):
    """A tiny chat model: causal, with a chat template, without a mask token; and texts to train on."""
    (tmp_path / "my_texts").mkdir()
    texts = [f"Question {i}: how much is {i} and {i}? It is {2 * i}, as everybody knows.\n" * 8 for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"my_texts/{i}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, vocab_size=290)
    tokenizer.mask_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(tmp_path / "source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=290, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    return "source"


def test_the_five_commands_of_the_page_lead_from_an_autoregressive_model_to_a_chat(
    source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    said = {}
    for line in commands():
        program, command, *arguments = shlex.split(line)
        assert program == "redraft"
        arguments = [source if "SmolLM2" in argument else argument for argument in arguments]
        monkeypatch.setattr("sys.stdin", io.StringIO("How much is 2 and 2?\n/quit\n"))
        with pytest.raises(SystemExit) as exit_:
            main([command, *arguments, *SMALL.get(command, [])])
        said[command] = capsys.readouterr().out  # of the check for `convert`
        assert exit_.value.code == 0, line
    assert list(said) == ["convert", "train", "sample", "chat"]
    assert said["convert"].count("  yes  ") == 6
    assert "model: out/smol" in said["train"]
    assert said["sample"].startswith("The capital of France")
    assert "no chat template" not in said["chat"]
    assert (tmp_path / "runs/smol/model.safetensors").exists()
