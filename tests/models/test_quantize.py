"""Quantised weights run here, on the CPU: close to the unquantised ones, smaller, and refused where they do not fit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import redraft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own

DATA = Path(__file__).parent.parent / "golden" / "data"
ERROR = {"int8": 0.04, "int4": 0.40}
"""Largest relative error of the logits. The checkpoints are random and 4 bits leave no structure to lean on."""
AGREEMENT = {"int8": 0.9, "int4": 0.5}
"""Least share of positions whose likeliest token stays (of 256 tokens)."""


def load(name="llada", *, dtype="float32", **options):
    return redraft.load(DATA / name, mask_token_id=255, dtype=dtype, device="cpu", **options)


def inner(parameter):
    """The tensors a quantised parameter is made of."""
    names = getattr(parameter, "tensor_data_names", None)
    return [parameter] if names is None else [getattr(parameter, name) for name in names]


def num_bytes(module):
    return sum(tensor.nbytes for parameter in module.parameters() for tensor in inner(parameter))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llada", "dream", "a2d_qwen3"])  # renamed, shifted, plain
def test_quantised_logits_are_close_to_the_unquantised_and_the_layers_smaller(name, quantization):
    ids = load_file(DATA / name / "golden.safetensors")["input_ids"].long()
    plain, small = load(name), load(name, quantization=quantization)
    expected, got = plain.logits(ids), small.logits(ids)
    assert type(small.model) is type(plain.model)
    assert 1e-4 < (got - expected).norm() / expected.norm() < ERROR[quantization]
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() >= AGREEMENT[quantization]
    projections = [lm.model.model.layers[0].self_attn.q_proj for lm in (plain, small)]
    ratio = num_bytes(projections[1]) / num_bytes(projections[0])
    assert ratio < {"int8": 0.28, "int4": 0.21}[quantization]  # of float32, with the scales, and Dream's bias
    assert num_bytes(small.model) < 0.7 * num_bytes(plain.model)
    for of in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(small.model, of)().weight, getattr(plain.model, of)().weight)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_model_generates(quantization):
    lm = load(quantization=quantization)
    out = lm.generate([[3, 4, 5], [7]], max_new_tokens=8, block_size=4, stop=None)
    assert [len(tokens) for tokens in out.tokens] == [8, 8]
    assert torch.equal(out.tokens[1], lm.generate([[7]], max_new_tokens=8, block_size=4, stop=None).tokens[0])
    assert load(dtype="bfloat16", quantization=quantization).model.dtype == torch.bfloat16


def test_int8_weights_can_be_saved_and_loaded_again(tmp_path):
    ids = torch.arange(3, 15)[None]
    lm = load(quantization="int8")
    lm.model.save_pretrained(tmp_path)
    assert torch.equal(redraft.load(tmp_path, device="cpu").logits(ids), lm.logits(ids))
    with pytest.raises(ValueError, match=r"is quantised already; got quantization='int4'. Leave it out"):
        redraft.load(tmp_path, device="cpu", quantization="int4")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_adapter_lies_over_quantised_weights(tmp_path, quantization):
    plain = load()
    plain.model.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), lora)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 15)[None]
    adapted = load(adapter=tmp_path / "adapter").logits(ids)
    small = load(adapter=tmp_path / "adapter", quantization=quantization).logits(ids)
    assert (small - adapted).norm() < ERROR[quantization] * adapted.norm() < (plain.logits(ids) - adapted).norm()


def test_what_cannot_be_quantised_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown quantization 'int3'; known are int8, int4"):
        load(quantization="int3")
    with pytest.raises(ValueError, match=r"nearly all weights of qwen3_moe are fused experts. Load it without"):
        load("llada_moe", quantization="int8")
    monkeypatch.setattr("transformers.utils.is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs torchao, which is not installed: pip install 'redraft\[quant\]'"):
        load(quantization="int8")


def test_a_quantised_checkpoint_without_the_package_is_told(tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_torchao

    load(quantization="int8").model.save_pretrained(tmp_path)
    monkeypatch.setattr(quantizer_torchao, "is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match=r"cannot read the weights of .*requires torchao library"):
        redraft.load(tmp_path, device="cpu")
