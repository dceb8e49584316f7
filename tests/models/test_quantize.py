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
ERROR = {"int8": 0.04, "int4": 0.40, "nf4": 0.55}
"""Largest relative error of the logits. The checkpoints are random and 4 bits leave no structure to lean on."""
AGREEMENT = {"int8": 0.9, "int4": 0.5, "nf4": 0.3}
"""Least share of positions whose likeliest token stays (of 256 tokens)."""


def load(name="llada", *, dtype="float32", **options):
    return redraft.load(DATA / name, mask_token_id=255, dtype=dtype, device="cpu", **options)


def inner(parameter):
    """The tensors a quantised parameter is made of."""
    if hasattr(parameter, "quant_state"):  # nf4
        return [parameter, parameter.quant_state.absmax]
    names = getattr(parameter, "tensor_data_names", None)
    return [parameter] if names is None else [getattr(parameter, name) for name in names]


def num_bytes(module):
    return sum(tensor.nbytes for parameter in module.parameters() for tensor in inner(parameter))


@pytest.mark.parametrize("quantization", list(ERROR))
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
    limit = {"int8": 0.28, "int4": 0.21, "nf4": 0.18}[quantization]
    assert ratio < limit  # of float32, with the scales, and Dream's bias
    assert num_bytes(small.model) < 0.7 * num_bytes(plain.model)
    for of in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(small.model, of)().weight, getattr(plain.model, of)().weight)


@pytest.mark.parametrize("quantization", list(ERROR))
def test_a_quantised_model_generates(quantization):
    lm = load(quantization=quantization)
    out = lm.generate([[3, 4, 5], [7]], max_new_tokens=8, block_size=4, stop=None)
    assert [len(tokens) for tokens in out.tokens] == [8, 8]
    assert torch.equal(out.tokens[1], lm.generate([[7]], max_new_tokens=8, block_size=4, stop=None).tokens[0])
    half = load(dtype="bfloat16", quantization=quantization).model
    assert half.dtype == torch.bfloat16
    if quantization == "nf4":
        assert half.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16


def test_nf4_computes_with_what_it_unpacks_forward_and_backward():
    import bitsandbytes

    plain, small = load(), load(quantization="nf4")
    layers = dict(small.model.named_modules())
    for name, layer in plain.model.named_modules():
        if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
            packed = layers[name].weight
            with torch.no_grad():
                layer.weight.copy_(bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))
    x = plain.model.get_input_embeddings()(torch.arange(3, 15)[None]).detach()
    found = []
    for lm in (plain, small):
        inputs = x.clone().requires_grad_()
        logits = lm.model(inputs_embeds=inputs).logits
        logits.square().sum().backward()
        found.append((logits, inputs.grad))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_can_be_saved_and_loaded_again(tmp_path, quantization):
    ids = torch.arange(3, 15)[None]
    lm = load(quantization=quantization)
    lm.model.save_pretrained(tmp_path)
    assert torch.equal(redraft.load(tmp_path, device="cpu").logits(ids), lm.logits(ids))
    with pytest.raises(ValueError, match=r"is quantised already; got quantization='int4'. Leave it out"):
        redraft.load(tmp_path, device="cpu", quantization="int4")


@pytest.mark.parametrize("quantization", list(ERROR))
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
    with pytest.raises(ValueError, match=r"unknown quantization 'int3'; known are int8, int4, nf4"):
        load(quantization="int3")
    with pytest.raises(ValueError, match=r"nearly all weights of qwen3_moe are fused experts. Load it without"):
        load("llada_moe", quantization="int8")
    for package, quantization in (("torchao", "int8"), ("bitsandbytes", "nf4")):
        monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda: False)
        with pytest.raises(ValueError, match=rf"needs {package}, .* not installed: pip install 'redraft\[quant\]'"):
            load(quantization=quantization)


def test_a_quantised_checkpoint_without_the_package_is_told(tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_torchao

    load(quantization="int8").model.save_pretrained(tmp_path)
    monkeypatch.setattr(quantizer_torchao, "is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match=r"cannot read the weights of .*requires torchao library"):
        redraft.load(tmp_path, device="cpu")
