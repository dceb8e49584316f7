"""Every mistake at loading is one line: what, the value, what to do. Nothing is ever initialised at random."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    ConvBertConfig,
    ConvBertForMaskedLM,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    FNetConfig,
    FNetForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import redraft
from redraft.models.settings import DiffusionSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own

ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
DATA = Path(__file__).parent.parent / "golden" / "data"


def tiny_llama(*, diffusion: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    if diffusion:
        DiffusionSettings(mask_token_id=2).save_to(config)
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_unknown_model_type_lists_the_known_and_names_convert(folder):
    edit_config(folder, model_type="lladda2_moe", diffusion=None)
    with pytest.raises(ValueError, match=r"unknown model_type 'lladda2_moe'.*Dream.*llada2_moe.*redraft convert"):
        redraft.load(folder)


def test_a_near_miss_is_suggested(folder):
    edit_config(folder, model_type="dreem")
    with pytest.raises(ValueError, match=r"Did you mean 'dream'"):
        redraft.load(folder)


def test_a_checkpoint_that_wants_remote_code_is_refused_and_not_run(folder):
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "modeling_evil.EvilConfig"}, diffusion=None)
    with pytest.raises(ValueError, match=r"code inside the checkpoint, which is never run"):
        redraft.load(folder)


def test_a_family_that_ships_code_loads_without_running_it(tmp_path):
    shutil.copytree(DATA / "llada", tmp_path / "llada")
    (tmp_path / "llada" / "modeling_llada.py").write_text("raise SystemExit('remote code ran')")
    edit_config(tmp_path / "llada", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    assert type(redraft.load(tmp_path / "llada").model).__name__ == "LlamaForCausalLM"


def test_an_autoregressive_model_is_refused_and_convert_named(tmp_path):
    tiny_llama(diffusion=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"autoregressive.*redraft convert.*diffullama"):
        redraft.load(tmp_path, mask_token_id=2)


def test_the_format_of_a_checkpoint_can_be_named(tmp_path):
    tiny_llama(diffusion=False).save_pretrained(tmp_path)
    lm = redraft.load(tmp_path, mask_token_id=2, family="diffullama")
    assert lm.denoiser.settings.shift_logits
    assert lm.model.config.is_causal is False
    with pytest.raises(ValueError, match=r"unknown family 'diffulama'; known are .*Did you mean 'diffullama'"):
        redraft.load(tmp_path, mask_token_id=2, family="diffulama")


def test_missing_weights_are_named(folder):
    edit_weights(folder, lambda w: w.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"1 missing weights: model.layers.1.self_attn.q_proj.weight"):
        redraft.load(folder)


def test_extra_weights_are_named(folder):
    edit_weights(folder, lambda w: w.update({f"model.extra{i}.weight": torch.zeros(2) for i in range(5)}))
    with pytest.raises(ValueError, match=r"5 unexpected weights: model.extra0.weight, .*, \.\.\."):
        redraft.load(folder)


def test_weights_of_another_shape_are_named(folder):
    edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"1 mismatched weights: model.norm.weight"):
        redraft.load(folder)


@pytest.mark.parametrize("name", ["llada", "llada2"])
def test_a_missing_weight_of_a_family_is_named(tmp_path, name):
    shutil.copytree(DATA / name, tmp_path / name)
    weight = {
        "llada": "model.transformer.blocks.1.ff_proj.weight",
        "llada2": "model.layers.1.attention.query_key_value.weight",
    }[name]
    edit_weights(tmp_path / name, lambda w: w.pop(weight))
    with pytest.raises(ValueError, match=r"missing weights: model.layers.1"):
        redraft.load(tmp_path / name, mask_token_id=255)


def test_a_variant_that_the_stock_class_does_not_compute_is_refused(tmp_path):
    shutil.copytree(DATA / "llada", tmp_path / "llada")
    edit_config(tmp_path / "llada", alibi=True)
    with pytest.raises(ValueError, match=r"this llada checkpoint has alibi=True; only False"):
        redraft.load(tmp_path / "llada")


ENCODERS = {
    "deberta": (
        lambda: DebertaForMaskedLM(DebertaConfig(**ENCODER)),
        r"the check 'nothing leaks past the mask' failed \(RuntimeError",
    ),
    "deberta-v2": (
        lambda: DebertaV2ForMaskedLM(DebertaV2Config(**ENCODER)),
        r"the check 'nothing leaks past the mask' failed \(RuntimeError",
    ),
    "fnet": (lambda: FNetForMaskedLM(FNetConfig(**ENCODER)), "a masked token moves other positions by"),
    "convbert": (lambda: ConvBertForMaskedLM(ConvBertConfig(**ENCODER)), "a masked token moves other positions by"),
}


@pytest.mark.parametrize(("make", "reason"), ENCODERS.values(), ids=ENCODERS)
def test_an_encoder_that_does_not_obey_its_mask_is_refused_as_it_stands(tmp_path, make, reason):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be used: .*{reason}") as told:
        redraft.load(tmp_path, mask_token_id=2, device="cpu")
    assert "\n" not in str(told.value)


SPOILT = [
    ("llada", {"n_heads": 0}, "cannot read config.json as one of llada"),
    ("llada", {"n_heads": "2"}, "cannot read config.json as one of llada"),
    ("llada", {"mlp_hidden_size": None, "mlp_ratio": None}, "cannot read config.json as one of llada"),
    ("llada", {"n_layers": 10**9}, "n_layers must be at most 10000"),
    ("llada", {"activation_type": "nonesuch"}, "cannot read the model config"),
    ("llada", {"mask_token_id": "x"}, "mask_token_id must be of type int; got 'x'"),
    ("llada2", {"num_experts": 10**8}, "num_experts must be at most 10000"),
    ("llada2", {"n_group": 3}, "n_group must divide 8 experts; got 3"),
    ("llada2", {"n_group": 0}, "cannot read config.json as one of llada2"),
    ("llada2", {"partial_rotary_factor": "x"}, "cannot read the model config"),
    ("llada_moe", {"moe_layer_freq": 5}, "cannot read config.json as one of llada-moe"),
    ("dream", {"rope_theta": None}, "cannot read the model config"),
    ("dream", {"layer_types": 3}, "cannot read config.json as one of dream"),
    ("dream", {"vocab_size": -3}, "vocabulary of -3 tokens"),
    ("a2d_qwen3", {"block_size": "x"}, "block_size must be one of int, None; got 'x'"),
    ("a2d_qwen3", {"block_size": 2.5}, "block_size must be one of int, None; got 2.5"),
    ("a2d_qwen3", {"block_size": 0}, "block_size must lie in .1, 1048576.; got 0"),
    ("a2d_qwen3", {"num_key_value_heads": 3}, "mismatched weights"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "changes", "message"), SPOILT)
def test_a_spoilt_config_of_a_family_is_one_line(tmp_path, name, changes, message):
    shutil.copytree(DATA / name, tmp_path / name)
    edit_config(tmp_path / name, **changes)
    with pytest.raises(ValueError, match=message) as told:
        redraft.load(tmp_path / name, mask_token_id=None if "mask_token_id" in changes else 255, device="cpu")
    assert "\n" not in str(told.value)


def test_a_mask_id_outside_the_vocabulary_is_told(folder):
    with pytest.raises(ValueError, match=r"must lie in the vocabulary of 40 tokens; got 40"):
        redraft.load(folder, mask_token_id=40)
    with pytest.raises(ValueError, match=r"got 156895"):
        redraft.load(DATA / "llada2")


def test_a_tokenizer_larger_than_the_embedding_is_told(folder):
    vocabulary = {f"t{i}": i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer has 50 tokens and the embedding 40 rows"):
        redraft.load(folder)


def test_a_path_that_does_not_exist_with_the_hub_offline_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"the folder does not exist"):
        redraft.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"cannot read a model config from no/such-model.*offline"):
        redraft.load("no/such-model")


def test_dtype_and_device_are_obeyed(folder):
    assert redraft.load(folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert redraft.load(folder, dtype=torch.float16, device="cpu").model.dtype == torch.float16


@pytest.fixture
def adapter(folder, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_loads_on_top(folder, adapter):
    ids = torch.arange(3, 15)[None]
    plain, adapted = redraft.load(folder), redraft.load(folder, adapter=adapter)
    assert type(adapted.model) is type(plain.model)
    assert (adapted.logits(ids) - plain.logits(ids)).abs().max() > 1e-3


def test_an_adapter_of_another_model_is_refused(folder, adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    first = sorted(weights)[0]
    weights.pop(first)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model: 1 weights, first"):
        redraft.load(folder, adapter=adapter)
    with pytest.raises(ValueError, match=r"cannot read an adapter"):
        redraft.load(folder, adapter=tmp_path / "nothing")


def edit_adapter(**changes):
    def damage(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pickle-ran",))


def as_evil_bin(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"evil": Evil()}, adapter / "adapter_model.bin")


SPOILT_ADAPTERS = {
    "config empty": lambda a: (a / "adapter_config.json").write_text(""),
    "config not UTF-8": lambda a: (a / "adapter_config.json").write_bytes(b"\xff"),
    "config deep": lambda a: (a / "adapter_config.json").write_text("[" * 100_000),
    "config a list": lambda a: (a / "adapter_config.json").write_text("[]"),
    "kind unknown": edit_adapter(peft_type="NONESUCH"),
    "kind absent": edit_adapter(peft_type=None),
    "rank 0": edit_adapter(r=0),
    "rank text": edit_adapter(r="two"),
    "rank another": edit_adapter(r=3),
    "rank huge": edit_adapter(r=10**8),
    "rank huge of a module": edit_adapter(rank_pattern={"q_proj": 10**8}),
    "targets unknown": edit_adapter(target_modules=["nonesuch"]),
    "targets a broken expression": edit_adapter(target_modules="(["),
    "targets fewer": edit_adapter(target_modules=["q_proj"]),
    "targets more": edit_adapter(target_modules=["q_proj", "v_proj", "k_proj"]),
    "alpha text": edit_adapter(lora_alpha="large"),
    "weights cut": lambda a: (a / "adapter_model.safetensors").write_bytes(b"1234567"),
    "weights absent": lambda a: (a / "adapter_model.safetensors").unlink(),
    "weights pickled code": as_evil_bin,
    "settings beside it a list": lambda a: (a / "config.json").write_text("[]"),
    "settings beside it of a text": lambda a: (a / "config.json").write_text('{"diffusion": "masked"}'),
    "settings beside it unknown": lambda a: (a / "config.json").write_text('{"diffusion": {"mask": 3}}'),
}


@pytest.mark.parametrize("name", SPOILT_ADAPTERS)
def test_a_spoilt_adapter_is_one_line(folder, adapter, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    SPOILT_ADAPTERS[name](adapter)
    with pytest.raises(ValueError, match="adapter|config.json") as told:
        redraft.load(folder, adapter=adapter, device="cpu")
    assert type(told.value) is ValueError
    assert "\n" not in str(told.value)
    assert "weights_only" not in str(told.value)
    assert not (tmp_path / "pickle-ran").exists()
    with pytest.raises(ValueError, match="adapter|config.json"):
        redraft.convert(folder, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()
