"""A merged adapter gives the logits that it gives when laid over its base, or is refused with the reason."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import redraft
from redraft.models.adapter import merge_adapter
from redraft.models.convert import convert
from redraft.models.settings import DiffusionSettings

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(3, 15)[None]


def llama(folder, *, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, **SIZES, bos_token_id=None, eos_token_id=1, tie_word_embeddings=tied)
    DiffusionSettings(mask_token_id=2).save_to(config)
    save(LlamaForCausalLM(config), folder)


def gpt2(folder):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    DiffusionSettings(mask_token_id=2).save_to(config)
    save(GPT2LMHeadModel(config), folder)


def bert(folder):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, **SIZES, max_position_embeddings=64)
    DiffusionSettings(mask_token_id=2).save_to(config)
    save(BertForMaskedLM(config), folder)


def save(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)


def adapter(base, folder, *, auto=AutoModelForCausalLM, **settings):
    """Save a LoRA whose every trained weight is far from where it starts."""
    torch.manual_seed(1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on what is tested here
        lora = LoraConfig(**{"r": 2, "init_lora_weights": False} | settings)
        model = get_peft_model(auto.from_pretrained(base), lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(folder)


KINDS = {
    "the head": {"target_modules": ["lm_head"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both by one adapter": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a layer and the head, rsLoRA": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "the head, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "ranks by module": {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 4}},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "biases of norms": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_merged_logits_are_those_of_the_adapter_laid_over(tmp_path, settings, tied):
    llama(tmp_path / "base", tied=tied)
    adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    laid_over = redraft.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu").logits(IDS)
    merged = redraft.load(tmp_path / "merged", device="cpu").logits(IDS)
    plain = redraft.load(tmp_path / "base", device="cpu").logits(IDS)
    assert (merged - laid_over).abs().max() < 1e-4 * laid_over.abs().max()
    assert (plain - laid_over).abs().max() > 1e-2 * laid_over.abs().max()


@pytest.mark.parametrize(
    ("make", "auto", "targets"),
    [(gpt2, AutoModelForCausalLM, ["wte", "c_attn"]), (bert, AutoModelForMaskedLM, ["decoder", "word_embeddings"])],
)
def test_other_architectures_are_untied_too(tmp_path, make, auto, targets):
    make(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", auto=auto, target_modules=targets)
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    laid_over = redraft.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu").logits(IDS)
    merged = redraft.load(tmp_path / "merged", device="cpu").logits(IDS)
    assert (merged - laid_over).abs().max() < 1e-4 * laid_over.abs().max()


def test_weights_stay_tied_where_the_adapter_leaves_them_alone(tmp_path):
    llama(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_mask_row_added_to_merged_weights_leaves_them_untied(tmp_path):
    llama(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["diffusion"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["embed_tokens"])
    made = convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert made.settings.mask_token_id == 40
    convert(tmp_path / "base", tmp_path / "plain")
    laid_over = redraft.load(tmp_path / "base", adapter=tmp_path / "adapter", mask_token_id=2, family="diffullama")
    expected = laid_over.denoiser.model(IDS, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool)).logits
    merged = redraft.load(tmp_path / "merged", device="cpu").logits(IDS)[..., :40]
    assert torch.allclose(merged, expected, atol=1e-4 * expected.abs().max().item())


def test_biases_without_a_place_are_refused_with_what_to_do(tmp_path):
    llama(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ValueError, match=r"cannot be merged: .*lora_bias=True.*redraft.load\(BASE, adapter=") as told:
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_moves_the_logits_is_refused(tmp_path, monkeypatch):
    llama(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    monkeypatch.setattr("redraft.models.adapter.untie", lambda model: None)
    with pytest.raises(ValueError, match=r"cannot be merged: logits with it merged are off by"):
        merge_adapter(redraft.load(tmp_path / "base", device="cpu").model, tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    llama(tmp_path / "base")
    gpt2(tmp_path / "other")
    adapter(tmp_path / "other", tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"does not fit this model: .*c_attn"):
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
