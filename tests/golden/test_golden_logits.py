"""Every family's checkpoint, in its own format, gives its reference implementation's logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import redraft
from redraft.layouts import attention_mask

DATA = Path(__file__).parent / "data"
FAMILIES = ["llada", "llada_moe", "llada2", "llada21", "dream", "a2d_qwen3", "sdar", "sdar_moe", "a2d_qwen3_block"]
SHIFTED = {"dream"}
BLOCK_CAUSAL = {"llada2": 8, "llada21": 8, "sdar": 4, "sdar_moe": 4, "a2d_qwen3_block": 4}
UNSTATED = {"sdar_moe", "a2d_qwen3_block"}
"""Families whose config.json does not say how many tokens a block has."""
TOLERANCE = dict.fromkeys(FAMILIES, 1e-5) | dict.fromkeys(("sdar", "sdar_moe", "a2d_qwen3_block"), 5e-5)
"""The logits of the last three reach 20."""


def load(name: str) -> redraft.LanguageModel:
    size = BLOCK_CAUSAL[name] if name in UNSTATED else None
    return redraft.load(DATA / name, mask_token_id=255, block_size=size, dtype="float32", device="cpu")


def golden(name: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(DATA / name / "golden.safetensors")
    return tensors["input_ids"], tensors["logits"]


def shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def layout(name: str):
    return ("block-causal", BLOCK_CAUSAL[name]) if name in BLOCK_CAUSAL else "full"


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_reference(name):
    ids, logits = golden(name)
    ours = load(name).logits(ids, layout=layout(name))
    assert ours.dtype == torch.float32
    assert difference(ours, shifted(logits) if name in SHIFTED else logits) <= TOLERANCE[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_causal_mask_does_not(name):
    ids, logits = golden(name)
    ours = load(name).logits(ids, layout=("block-causal", 1))
    assert difference(ours, shifted(logits) if name in SHIFTED else logits) > 1e-2


@pytest.mark.parametrize("name", ["dream", "a2d_qwen3"])
def test_the_other_shift_does_not(name):
    ids, logits = golden(name)
    ours = load(name).logits(ids, layout=layout(name))
    assert difference(ours, logits if name in SHIFTED else shifted(logits)) > 1e-2


@pytest.mark.parametrize("name", sorted(BLOCK_CAUSAL))
def test_another_block_size_does_not(name):
    ids, logits = golden(name)
    other = 12 - BLOCK_CAUSAL[name]
    assert difference(load(name).logits(ids, layout=("block-causal", other)), logits) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_save_loads_in_plain_transformers_with_equal_logits(name, tmp_path):
    ids, logits = golden(name)
    lm = load(name)
    lm.model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain) is type(lm.model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = attention_mask(redraft.layouts.Layout(block_size=BLOCK_CAUSAL.get(name)), positions)
    with torch.no_grad():
        again = plain.eval()(input_ids=ids, attention_mask=mask).logits
    assert difference(again, logits) <= TOLERANCE[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_save_needs_no_flags_to_load(name, tmp_path):
    ids, _ = golden(name)
    lm = load(name)
    lm.model.save_pretrained(tmp_path)
    again = redraft.load(tmp_path, device="cpu")
    assert again.denoiser.settings == lm.denoiser.settings
    assert torch.equal(again.logits(ids), lm.logits(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    ids, _ = golden(name)
    lm = load(name)
    lengths = torch.ones_like(ids)
    lengths[:, 16:] = 0
    other = ids.clone()
    other[:, 16:] = 0
    # An expert multiplies the tokens routed to it at once, padding included: their number shows in the rounding.
    limit = 1e-5 if any("experts" in name for name, _ in lm.denoiser.model.named_modules()) else 0
    assert difference(lm.logits(ids, lengths)[:, :16], lm.logits(other, lengths)[:, :16]) <= limit
