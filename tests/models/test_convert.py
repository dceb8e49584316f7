"""Any decoder or encoder becomes a diffusion model that is measured before it is written."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import redraft
from redraft.models.convert import convert
from redraft.models.probe import CACHED, check_model
from redraft.models.settings import DiffusionSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(3, 15)[None]


def enlarge(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    return enlarge(LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES, bos_token_id=None, eos_token_id=1, **changes)))


def tokenizer(size=40, *, reserved=None, mask=None):
    vocabulary = {f"t{i}": i for i in range(size)}
    if reserved is not None:
        vocabulary = {(f"<|reserved_special_token_{i}|>" if i == reserved else f"t{i}"): i for i in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), mask_token=mask
    )


@pytest.fixture
def source(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_with_the_causal_mask_restored_the_logits_are_the_sources(source, tmp_path):
    convert(source, tmp_path / "out", mask_token_id=2)
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        before = plain(IDS).logits
    after = redraft.load(tmp_path / "out", device="cpu")
    assert torch.allclose(after.logits(IDS, layout=("block-causal", 1)), before, atol=1e-5)
    assert not torch.allclose(after.logits(IDS), before, atol=1e-2)


def test_the_checkpoint_carries_its_settings(source, tmp_path):
    made = convert(source, tmp_path / "out", mask_token_id=2, shift_logits=True, block_size=4)
    assert made.settings == DiffusionSettings(mask_token_id=2, shift_logits=True, block_size=4)
    lm = redraft.load(tmp_path / "out", device="cpu")
    assert lm.denoiser.settings == made.settings
    assert all(check.passed for check in made.checks)
    plain = redraft.load(source, device="cpu", mask_token_id=2, family="diffullama").denoiser
    assert torch.equal(lm.denoiser.logits(IDS), plain.logits(IDS, layout=lm.denoiser.settings.layout))


@pytest.mark.parametrize("within", ["full", "causal"])
def test_with_a_causal_context_it_is_the_source_until_a_block_is_open(source, tmp_path, within):
    made = convert(source, tmp_path / "out", mask_token_id=2, block_size=4, context="causal", within=within)
    assert (made.settings.context, made.settings.within) == ("causal", within)
    lm = redraft.load(tmp_path / "out", device="cpu")
    plain, again = (AutoModelForCausalLM.from_pretrained(at).eval() for at in (source, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, plain(IDS).logits)
        tokens = plain.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, bad_words_ids=[[2]])
    ours = lm.generate(IDS.tolist(), preset="ar", max_new_tokens=6, stop=None)
    assert [row.tolist() for row in ours.tokens] == tokens[:, IDS.shape[1] :].tolist()
    assert {"committed text is autoregressive", "positions are the model's own"} <= {
        check.claim for check in made.checks
    }


def test_a_causal_context_without_blocks_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="a causal context needs a block_size"):
        convert("nothing here", tmp_path / "out", context="causal")
    with pytest.raises(ValueError, match="within 'causal' needs context 'causal'"):
        convert("nothing here", tmp_path / "out", block_size=4, within="causal")


def test_convert_is_public():
    assert redraft.convert is convert


def test_a_converted_model_converts_again_and_keeps_its_settings(source, tmp_path):
    convert(source, tmp_path / "first", mask_token_id=2, shift_logits=True)
    again = convert(tmp_path / "first", tmp_path / "second", block_size=4)
    assert again.settings == DiffusionSettings(mask_token_id=2, shift_logits=True, block_size=4)


@pytest.mark.parametrize(
    ("made", "asked", "chosen", "note", "rows"),
    [
        (lambda: tokenizer(40, mask="t7"), None, 7, "the tokenizer's own t7", 40),
        (lambda: tokenizer(40, reserved=9), None, 9, "the reserved <.reserved_special_token_9.>", 40),
        (lambda: tokenizer(36), None, 36, "a spare row", 40),
        (lambda: tokenizer(40), None, 40, "a new row", 41),
        (lambda: tokenizer(40), 5, 5, "as asked", 40),
        (lambda: None, None, 40, "a new row", 41),
        (lambda: None, 5, 5, "as asked", 40),
    ],
)
def test_the_mask_token_is_found_or_made_and_reported(source, tmp_path, made, asked, chosen, note, rows):
    made = made()
    if made is not None:
        made.save_pretrained(source)
    result = convert(source, tmp_path / "out", mask_token_id=asked)
    assert result.settings.mask_token_id == chosen
    assert any(note.replace(".res", "|res").replace(".>", "|>") in text for text in result.notes)
    lm = redraft.load(tmp_path / "out", device="cpu")
    assert lm.model.config.vocab_size == rows
    if made is not None:
        assert lm.tokenizer.mask_token_id == chosen
    if "row" in note:
        weight = lm.model.get_input_embeddings().weight
        others = torch.arange(rows) != chosen
        assert torch.allclose(weight[chosen], weight[others].mean(dim=0), atol=1e-6)


def test_a_mask_id_outside_the_vocabulary_is_told(source, tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 40 tokens; got 40"):
        convert(source, tmp_path / "out", mask_token_id=40)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # its own
@pytest.mark.parametrize("mask", [None, "t7"])
def test_a_head_that_does_not_call_its_output_embedding_is_refused(tmp_path, mask):
    config = MobileBertConfig(
        vocab_size=40, **SIZES, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32
    )  # fmt: skip
    MobileBertForMaskedLM(config).save_pretrained(tmp_path / "source")
    if mask is not None:
        tokenizer(40, mask=mask).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="mobilebert computes its logits without calling its output embedding"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"x" * 99])
def test_a_damaged_gguf_file_is_one_line(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot read .*model.gguf: ") as told:
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(told.value)


def test_a_folder_in_use_is_not_overwritten(source):
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(source, source, mask_token_id=2)


def test_an_encoder_with_its_head_converts(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, **SIZES, max_position_embeddings=64)
    source = enlarge(BertForMaskedLM(config))
    source.save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "out", mask_token_id=2)
    assert made.architecture == "BertForMaskedLM"
    assert not any("head" in note for note in made.notes)
    with torch.no_grad():
        assert torch.allclose(redraft.load(tmp_path / "out").logits(IDS), source(IDS).logits, atol=1e-5)


def test_an_encoder_that_counts_from_its_padding_keeps_its_positions(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=40, **SIZES, max_position_embeddings=64, pad_token_id=1)
    source = enlarge(RobertaForMaskedLM(config))
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", mask_token_id=2)
    with torch.no_grad():
        assert torch.allclose(redraft.load(tmp_path / "out").logits(IDS), source(IDS).logits, atol=1e-5)


def test_a_model_that_counts_otherwise_than_we_do_fails_the_check(monkeypatch):
    monkeypatch.setattr("redraft.models.masks.COUNTS_FROM_PADDING", set())
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=40, **SIZES, max_position_embeddings=64, pad_token_id=1)
    settings = DiffusionSettings(mask_token_id=2)
    settings.save_to(config)
    positions = check_model(enlarge(RobertaForMaskedLM(config)), settings)[1]
    assert not positions.passed


def test_an_encoder_without_a_head_gets_one_and_it_is_said(tmp_path):
    torch.manual_seed(0)
    source = enlarge(BertModel(BertConfig(vocab_size=40, **SIZES, max_position_embeddings=64)))
    source.save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "out", mask_token_id=2)
    assert any("created the vocabulary head" in note for note in made.notes)
    trunk = redraft.load(tmp_path / "out", device="cpu").model.bert
    assert torch.equal(trunk.encoder.layer[1].output.dense.weight, source.encoder.layer[1].output.dense.weight)


def test_a_missing_weight_of_the_trunk_is_still_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    BertModel(BertConfig(vocab_size=40, **SIZES)).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing weights: bert.encoder.layer.1.output.dense.weight"):
        convert(tmp_path / "source", tmp_path / "out", mask_token_id=2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)),
            "mamba has recurrent, convolutional",
        ),
        (
            lambda: Lfm2ForCausalLM(
                Lfm2Config(vocab_size=40, **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])
            ),
            r"lfm2 has recurrent, convolutional, sparse or compressing layers \(conv\)",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=40, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
            ),
            "no language model of architecture 't5'|encoder-decoder",
        ),
    ],
)
def test_what_reads_left_to_right_is_refused_with_the_reason(tmp_path, make, reason):
    make().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "source", tmp_path / "out", mask_token_id=2)
    assert not (tmp_path / "out").exists()


def test_a_hybrid_that_hides_its_kind_is_caught_by_measuring():
    torch.manual_seed(0)
    config = Lfm2Config(vocab_size=40, **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    settings = DiffusionSettings(mask_token_id=2)
    settings.save_to(config)
    looks_ahead, _, isolated, *_ = check_model(enlarge(Lfm2ForCausalLM(config)), settings)
    assert not looks_ahead.passed
    assert "model.layers.0" in looks_ahead.measured
    assert not isolated.passed


def test_a_causal_model_fails_the_check():
    checks = check_model(llama(), DiffusionSettings(mask_token_id=2))
    assert not checks[0].passed
    assert "2 layers do not look ahead" in checks[0].measured


@pytest.mark.parametrize(
    "make",
    [
        lambda: MistralForCausalLM(MistralConfig(vocab_size=40, **SIZES, num_key_value_heads=2, sliding_window=3)),
        lambda: Gemma2ForCausalLM(
            Gemma2Config(vocab_size=40, **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=3, pad_token_id=0)
        ),
    ],
    ids=["every layer windowed", "every second layer windowed, eager attention"],
)
def test_windows_hold_with_a_mask_as_without_one(tmp_path, make):
    torch.manual_seed(0)
    enlarge(make()).save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "out", mask_token_id=2, block_size=4)
    assert {check.claim for check in made.checks if not check.passed} <= {CACHED}
    denoiser = redraft.load(tmp_path / "out", device="cpu").denoiser
    everything = torch.ones_like(IDS)
    full = redraft.layouts.Layout()
    with torch.no_grad():
        masked = denoiser.logits(IDS, segment_ids=everything, layout=full)
        unmasked = denoiser.logits(IDS, layout=full)
    assert torch.allclose(masked, unmasked, atol=1e-4)


def test_an_adapter_is_merged(source, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), lora).save_pretrained(tmp_path / "adapter")
    convert(source, tmp_path / "plain", mask_token_id=2)
    made = convert(source, tmp_path / "merged", mask_token_id=2, adapter=tmp_path / "adapter")
    assert any("merged the adapter" in note for note in made.notes)
    laid_on = redraft.load(tmp_path / "plain", adapter=tmp_path / "adapter", device="cpu")
    merged = redraft.load(tmp_path / "merged", device="cpu")
    assert torch.allclose(merged.logits(IDS), laid_on.logits(IDS), atol=1e-4)
    assert "lora" not in json.dumps(sorted(merged.model.state_dict()))


def test_a_sharded_source_converts(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "whole", tmp_path / "a", mask_token_id=2)
    convert(tmp_path / "shards", tmp_path / "b", mask_token_id=2)
    assert torch.equal(redraft.load(tmp_path / "a").logits(IDS), redraft.load(tmp_path / "b").logits(IDS))


def test_the_data_type_is_kept_or_changed(source, tmp_path):
    convert(source, tmp_path / "same", mask_token_id=2)
    convert(source, tmp_path / "half", mask_token_id=2, dtype="bfloat16")
    assert redraft.load(tmp_path / "same").model.dtype == torch.float32
    assert redraft.load(tmp_path / "half").model.dtype == torch.bfloat16
