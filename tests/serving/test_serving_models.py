"""Which models `redraft serve` takes; what it does not take is refused in one line that says what to do."""

import pytest
import torch
from server_doubles import call, serving
from tiny import tiny_lm
from transformers import LlamaConfig, LlamaForCausalLM

import redraft
from redraft.cli import _dispatch
from redraft.cli.serve import ServeFlags, open_backend
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig

VOCABULARY = 99


def save_causal(folder, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refused(capsys, folder):
    assert _dispatch(["serve", str(folder), "--port", "0"]) == 2
    out, message = capsys.readouterr()
    assert (out, message.count("\n")) == ("", 1)
    return message


def test_what_is_no_text_diffusion_model_is_refused_with_what_to_do(capsys, tmp_path, text_lm):
    save_causal(tmp_path / "causal", text_lm.tokenizer)
    tiny_lm(dtype=torch.float32).model.save_pretrained(tmp_path / "bare")
    shape = LatentDenoiserConfig(
        vocab_size=20, prompt_tokens=5, answer_tokens=3, max_blocks=3, latent_dim=4, hidden_size=32, num_layers=2,
        num_heads=2,
    )  # fmt: skip
    LatentDenoiser(shape).save_pretrained(tmp_path / "thinker")
    capsys.readouterr()
    message = refused(capsys, tmp_path / "causal")
    assert "is autoregressive (LlamaForCausalLM; " in message
    assert f"`redraft convert {tmp_path / 'causal'} OUT` (--autoregressive keeps it as a baseline)" in message
    assert "has no tokenizer. Save one with the model." in refused(capsys, tmp_path / "bare")
    message = refused(capsys, tmp_path / "thinker")
    assert "is a latent denoiser and does not denoise tokens" in message
    assert f"`redraft think {tmp_path / 'thinker'}`" in message


def served(folder, *, body):
    """Serve a folder, and return the answer of a request."""
    with serving(lambda: open_backend(ServeFlags(model=str(folder), max_rows=2, device="cpu"), {})) as server:
        return call(server, "/v1/completions", body)[:2]


@pytest.mark.usefixtures("unchecked")
def test_an_encoder_is_served(tmp_path, text_lm):
    model = tiny_lm(architecture="modernbert", vocab_size=VOCABULARY, dtype=torch.float32).model
    model.save_pretrained(tmp_path)
    text_lm.tokenizer.save_pretrained(tmp_path)
    status, answer = served(tmp_path, body={"prompt": "def", "max_tokens": 12, "seed": 1})
    wanted = redraft.load(tmp_path, device="cpu").generate("def", max_new_tokens=12, seed=1)
    assert (status, answer["choices"][0]["text"]) == (200, wanted.texts[0])


@pytest.mark.usefixtures("unchecked")
def test_an_autoregressive_baseline_is_served(tmp_path, text_lm):
    redraft.convert(save_causal(tmp_path / "causal", text_lm.tokenizer), tmp_path / "baseline", autoregressive=True)
    status, answer = served(tmp_path / "baseline", body={"prompt": "def", "max_tokens": 12, "ignore_eos": True})
    wanted = redraft.load(tmp_path / "baseline", device="cpu").generate("def", max_new_tokens=12, stop=None)
    assert (status, answer["choices"][0]["text"]) == (200, wanted.texts[0])
    assert answer["usage"]["redraft"]["tokens_per_forward"] == 1
