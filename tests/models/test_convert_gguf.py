"""A GGUF file is a source like any other: unpacked, converted, equal to the model it was made from."""

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import redraft
from redraft.models.convert import convert

pytest.importorskip("gguf", reason="transformers reads GGUF configs with it")

VOCABULARY = 40
TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *(chr(ord("a") + i) for i in range(26)),
    *(f"a{chr(ord('a') + i)}" for i in range(11)),
]


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(item):
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(string(text) for text in item)
    return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)


def write_gguf(path, metadata, tensors):
    """Write the format's version 3 with float32 tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(name) + value(item) for name, item in metadata.items())
    offset = 0
    for name, tensor in tensors.items():
        head += string(name) + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", 0, offset)
        offset += -(-tensor.nbytes // 32) * 32
    head += b"\0" * (-len(head) % 32)
    body = b"".join(tensor.tobytes() + b"\0" * (-tensor.nbytes % 32) for tensor in tensors.values())
    path.write_bytes(head + body)


def interleaved(weight, heads):
    """Order the rows of queries and keys as GGUF's llama has them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def gguf(llama, tmp_path):
    ours = {name: tensor.detach().numpy() for name, tensor in llama.state_dict().items()}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(2):
        for theirs, name in {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        }.items():  # fmt: skip
            names[f"model.layers.{i}.{name}"] = f"blk.{i}.{theirs}"
    tensors = {}
    for name, theirs in names.items():
        tensor = ours[f"{name}.weight"]
        if name.endswith(("q_proj", "k_proj")):
            tensor = interleaved(tensor, 4 if name.endswith("q_proj") else 2)
        tensors[f"{theirs}.weight"] = np.ascontiguousarray(tensor)
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCABULARY - 3),
        "tokenizer.ggml.merges": [f"a {chr(ord('a') + i)}" for i in range(11)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_gguf(tmp_path / "tiny.gguf", metadata, tensors)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_converts_to_the_model_it_was_made_from(llama, gguf, tmp_path):
    made = convert(gguf, tmp_path / "out")
    assert any("GGUF" in note for note in made.notes)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = llama(ids).logits
    lm = redraft.load(tmp_path / "out", device="cpu")
    after = lm.logits(ids, layout=("block-causal", 1))[..., :VOCABULARY]
    assert torch.allclose(after, before, atol=1e-5)
    assert lm.tokenizer.mask_token_id == made.settings.mask_token_id


def test_a_file_that_is_not_there_or_not_gguf_is_told(tmp_path):
    with pytest.raises(ValueError, match="the file does not exist"):
        convert(tmp_path / "nothing.gguf", tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"cannot read .*bad.gguf"):
        convert(tmp_path / "bad.gguf", tmp_path / "out")


@pytest.mark.slow
def test_the_command_prints_no_line_per_tensor(gguf, tmp_path):
    command = [sys.executable, "-m", "redraft.cli", "convert", str(gguf), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unpacked the GGUF blocks" in done.stdout
