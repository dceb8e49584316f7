"""Families without golden values: their config.json, on a stock model's weights under the family's names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import redraft
from redraft.layouts import Layout, attention_mask
from redraft.models.families import FAMILIES, find_family, known_model_types
from redraft.models.settings import DiffusionSettings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
IDS = torch.arange(3, 15)[None]


def checkpoint(folder, config, **changes):
    """Save a random stock model, and make its config.json a family's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters", None) or {}
    raw |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return model


CASES = {
    "SDAR-1.7B-Chat": (
        Qwen3Config(**SIZES, head_dim=8),
        {"model_type": "sdar", "architectures": ["SDARForCausalLM"]},
        4,
        False,
    ),
    "sdar with its own block size": (
        Qwen3Config(**SIZES, head_dim=8),
        {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 8, "mask_token_id": 60},
        8,
        False,
    ),
    "SDAR-30B-A3B-Chat-b16": (Qwen3MoeConfig(**SIZES, **MOE, head_dim=8), {"model_type": "sdar_moe"}, 16, False),
    "fast-dllm v2": (
        Qwen2Config(**SIZES),
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 2},
        2,
        True,
    ),
    "rnd1": (
        Qwen3MoeConfig(**SIZES, **MOE, head_dim=8),
        {"model_type": "rnd1", "rope_scaling": False, "sliding_window": False, "moe_backend": "hf"},
        None,
        True,
    ),
    "a2d-llama": (LlamaConfig(**SIZES), {"model_type": "a2d-llama", "block_size": None}, None, False),
    "a2d-qwen2 of blocks": (Qwen2Config(**SIZES), {"model_type": "a2d-qwen2", "block_size": 4}, 4, False),
    "diffucoder": (
        Qwen2Config(**SIZES),
        {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        },
        None,
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_its_stock_class_without_the_causal_mask(tmp_path, name):
    config, changes, block_size, shift = CASES[name]
    stock = checkpoint(tmp_path / name, config, **changes)
    lm = redraft.load(tmp_path / name, mask_token_id=60, device="cpu")
    assert type(lm.model) is type(stock)
    assert lm.denoiser.settings == DiffusionSettings(mask_token_id=60, shift_logits=shift, block_size=block_size)
    mask = attention_mask(Layout(block_size=block_size), torch.arange(12)[None])
    if mask is None:
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with torch.no_grad():
        expected = stock(IDS, attention_mask=mask).logits
    if shift:
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    assert torch.allclose(lm.logits(IDS), expected, atol=1e-5)


def test_diffugpt_gets_its_trunk_and_embedding_back(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    stock = checkpoint(tmp_path, config)
    weights = load_file(tmp_path / "model.safetensors")
    theirs = {
        name.replace("transformer.wte", "embed_tokens").replace("transformer.", "denoise_model."): tensor
        for name, tensor in weights.items()
    }
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = redraft.load(tmp_path, mask_token_id=60, family="diffugpt", device="cpu")
    assert lm.denoiser.settings.shift_logits
    with torch.no_grad():
        expected = stock(IDS, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool)).logits
    assert torch.allclose(lm.logits(IDS)[:, 1:], expected[:, :-1], atol=1e-5)


def test_the_configs_mask_token_comes_before_the_tokenizers(tmp_path):
    checkpoint(tmp_path, Qwen3Config(**SIZES, head_dim=8), model_type="sdar", block_size=4, mask_token_id=61)
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, mask_token="t9").save_pretrained(tmp_path)
    assert redraft.load(tmp_path, device="cpu").denoiser.settings.mask_token_id == 61
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert redraft.load(tmp_path, device="cpu").denoiser.settings.mask_token_id == 9


def test_llada_moe_is_told_apart_from_llada_by_its_class():
    assert find_family({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}).name == "llada-moe"
    assert find_family({"model_type": "llada", "architectures": ["LLaDAModelLM"]}).name == "llada"
    assert find_family({"model_type": "llada"}).name == "llada"


def test_formats_that_look_autoregressive_are_known_by_hub_id():
    raw = {"model_type": "llama"}
    assert find_family(raw, hub_id="diffusionfamily/diffullama").name == "diffullama"
    assert find_family({"model_type": "gpt2"}, hub_id="diffusionfamily/diffugpt-m").name == "diffugpt"
    assert find_family({"model_type": "qwen2"}, hub_id="fredzzp/open-dcoder-0.5B").name == "open-dcoder"
    assert find_family(raw, hub_id="meta-llama/Llama-3.2-1B") is None


PUBLISHED = {
    "LLaDA-8B": (
        "llada",
        {"d_model": 4096, "embedding_size": 126464, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
         "vocab_size": 126464, "mlp_hidden_size": 12288, "max_sequence_length": 4096, "rope_theta": 500000.0,
         "mask_token_id": 126336,
         "eos_token_id": 126081, "multi_query_attention": None, "activation_type": "silu", "rms_norm_eps": 1e-05},
        {"mask_token_id": 126336, "shift_logits": False, "block_size": None},
        126081,
    ),
    "LLaDA2.0-mini": (
        "llada2",
        {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
         "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4,
         "moe_intermediate_size": 512, "intermediate_size": 5120, "head_dim": 128, "vocab_size": 157184,
         "partial_rotary_factor": 0.5, "rope_theta": 600000, "first_k_dense_replace": 1},
        {"mask_token_id": 156895, "shift_logits": False, "block_size": 32},
        156892,
    ),
    "Dream-7B": (
        "dream",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 1000000.0, "mask_token_id": 151666},
        {"mask_token_id": 151666, "shift_logits": True, "block_size": None},
        151643,
    ),
    "SDAR-1.7B": (
        "sdar",
        {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "intermediate_size": 6144, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000},
        {"mask_token_id": 151669, "shift_logits": False, "block_size": 4},
        151643,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "expected", "eos"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_config_gives_the_published_settings(name, raw, expected, eos):
    config = find_family({}, name=name).config(raw, path="JetLM/SDAR-1.7B-Chat")
    settings = DiffusionSettings.read_from(config)
    assert {key: getattr(settings, key) for key in expected} == expected
    assert config.eos_token_id == eos
    assert config.is_causal is False
    assert config.rope_parameters["rope_theta"] == raw["rope_theta"]


NAMES = {
    "JetLM/SDAR-8B-Chat": ("sdar", 4),
    "JetLM/SDAR-8B-Chat-b8": ("sdar", 8),
    "downloads/SDAR-4B-Chat-b64": ("sdar", 64),
    "hub/models--JetLM--SDAR-30B-A3B-Chat-b32/snapshots/0123abc": ("sdar-moe", 32),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": ("a2d-qwen3", None),
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": ("a2d-qwen3", 32),
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": ("a2d-qwen2", 32),
    "me/Llama-diffusion-mdlm-v0.1": ("a2d-llama", None),
    "divelab/OPDLM-8B": ("a2d-qwen3", 4),
    "hub/models--divelab--OPDLM-0.6B/snapshots/0123abc": ("a2d-qwen3", 4),
    "runs/../JetLM/SDAR-30B-A3B-Sci": ("sdar-moe", 4),
    "Gen-Verse/TraDo-8B-Instruct": ("sdar", 4),
    "Gen-Verse/TraDo-8B-Thinking": ("sdar", 4),
}
RAW = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.mark.parametrize(("path", "family", "block_size"), [(path, *facts) for path, facts in NAMES.items()])
def test_blocks_are_read_off_a_published_name(path, family, block_size):
    config = find_family({}, name=family).config(RAW, mask_token_id=60, path=path)
    assert config.diffusion["block_size"] == block_size


def test_what_config_json_says_of_blocks_comes_before_the_name():
    config = find_family({}, name="sdar").config(RAW | {"block_size": 8}, mask_token_id=60, path="SDAR-8B-Chat-b32")
    assert config.diffusion["block_size"] == 8
    config = find_family({}, name="a2d-qwen3").config(RAW | {"block_size": None}, mask_token_id=60, path="OPDLM-4B")
    assert config.diffusion["block_size"] is None


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("sdar", "my-model"),
        ("sdar", "runs/sdar-tuned"),
        ("sdar", "TraDo-8B-Instruct-b16"),
        ("a2d-qwen3", "models/Qwen3-0.6B-bd3lm"),
        ("a2d-llama", "checkpoint-final"),
        ("a2d-llama", "bd3lm-from-mdlm"),
        ("a2d-llama", "mdlm-vs-bd3lm-32"),
        ("a2d-llama", "not-mdlm-but-bd3lm"),
        ("a2d-llama", "bd3lm-from-Llama-diffusion-mdlm-v0.1"),
        ("a2d-qwen3", "Qwen3-0.6B-diffusion-mdlm-v0.1-to-bd3lm"),
        ("a2d-qwen3", "mdlm-of-Qwen3-0.6B-diffusion-bd3lm-v0.1"),
        ("a2d-qwen3", "OPDLM-8B-bd3lm-16"),
        ("sdar", "my-sdar-b16-ft"),
        ("sdar", "SDAR-1.7B-Chat-b16-ft"),
        ("sdar", "b32-from-SDAR-1.7B-Chat"),
        ("sdar", "sdar-b4-to-sdar-b16"),
        ("sdar", "hub/models--JetLM--SDAR-1.7B-Chat/snapshots/0123abc/my-b16"),
    ],
)
def test_blocks_that_nothing_tells_are_asked_for(family, path):
    ways = r'neither config.json .* tells .*block_size=N to redraft.load.*"block_size": N .*--block-size N'
    with pytest.raises(ValueError, match=ways) as told:
        find_family({}, name=family).config(RAW, mask_token_id=60, path=path)
    assert Path(path).name in str(told.value)


BASES = {
    "sdar": "JetLM/SDAR-1.7B-Chat",
    "a2d-llama": "dllm-hub/Llama-diffusion-mdlm-v0.1",
    "a2d-qwen3": "divelab/OPDLM-8B",
}


@pytest.mark.parametrize("folder", ["mine", "my-bd3lm-run", "my-sdar-b16-ft"])
@pytest.mark.parametrize("family", BASES)
def test_the_name_of_the_base_of_a_fine_tuned_model_tells_nothing_of_its_blocks(family, folder):
    raw = RAW | {"_name_or_path": BASES[family]}
    with pytest.raises(ValueError, match=f"the name '{folder}' tells how many tokens"):
        find_family({}, name=family).config(raw, mask_token_id=60, path=folder)


@pytest.mark.parametrize(
    ("target", "block_size"),
    [("SDAR-8B-Chat-b16", 16), ("models--JetLM--SDAR-8B-Chat-b64/snapshots/0123abc", 64), ("SDAR-8B-Chat", 4)],
)
def test_a_link_to_a_published_checkpoint_keeps_its_name(tmp_path, target, block_size):
    (tmp_path / target).mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / target)
    config = find_family({}, name="sdar").config(RAW, mask_token_id=60, path=tmp_path / "model")
    assert config.diffusion["block_size"] == block_size


def test_a_link_whose_name_tells_of_other_blocks_than_its_target_is_asked_about(tmp_path):
    (tmp_path / "SDAR-8B-Chat").mkdir()
    (tmp_path / "SDAR-8B-Chat-b16").symlink_to(tmp_path / "SDAR-8B-Chat")
    with pytest.raises(ValueError, match="checkpoints of sdar differ in their blocks"):
        find_family({}, name="sdar").config(RAW, mask_token_id=60, path=tmp_path / "SDAR-8B-Chat-b16")


def test_asked_for_blocks_are_taken_from_the_conversion(tmp_path):
    checkpoint(tmp_path / "mine", Qwen3Config(**SIZES, head_dim=8), model_type="sdar", mask_token_id=60)
    with pytest.raises(ValueError, match="checkpoints of sdar differ in their blocks"):
        redraft.convert(tmp_path / "mine", tmp_path / "out")
    assert redraft.convert(tmp_path / "mine", tmp_path / "out", block_size=8).settings.block_size == 8


def test_blocks_that_nothing_tells_are_given_at_loading(tmp_path):
    checkpoint(tmp_path / "mine", Qwen3Config(**SIZES, head_dim=8), model_type="a2d-qwen3", mask_token_id=60)
    with pytest.raises(ValueError, match="Pass block_size=N to redraft.load"):
        redraft.load(tmp_path / "mine", device="cpu")
    lm = redraft.load(tmp_path / "mine", block_size=8, device="cpu")
    assert lm.denoiser.settings.block_size == 8
    lm.model.save_pretrained(tmp_path / "saved")
    assert redraft.load(tmp_path / "saved", device="cpu").denoiser.settings.block_size == 8


@pytest.mark.parametrize(
    ("changes", "stated"), [({"model_type": "rnd1"}, None), ({"diffusion": {"mask_token_id": 60, "block_size": 4}}, 4)]
)
def test_a_checkpoint_that_states_its_blocks_takes_no_others_at_loading(tmp_path, changes, stated):
    kind = Qwen3MoeConfig(**SIZES, **MOE, head_dim=8)
    checkpoint(tmp_path, kind, **{"model_type": "qwen3_moe", "mask_token_id": 60} | changes)
    assert redraft.load(tmp_path, device="cpu").denoiser.settings.block_size == stated
    with pytest.raises(ValueError, match=f"block_size is for checkpoints.* got 8 for .*, which has {stated}. Leave it"):
        redraft.load(tmp_path, block_size=8, device="cpu")


def test_published_steps_are_one_for_each_token_of_a_block():
    for path, size in (("JetLM/SDAR-8B-Chat", 4), ("JetLM/SDAR-8B-Chat-b32", 32)):
        config = find_family({}, name="sdar").config(RAW, mask_token_id=60, path=path)
        assert config.generation == {"preset": "sdar", "steps_per_block": size, "temperature": 1.0}


def test_a_family_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    source = "from redraft.models.family import Family\n\n"
    fields = 'fields={"num_hidden_layers": "depth"}, weights={"^trunk.": "^model."}, mask_token_id=60'
    (tmp_path / "my_families.py").write_text(f'{source}MINE = Family(name="mine", stock="qwen3", {fields})\n')
    monkeypatch.syspath_prepend(tmp_path)
    stock = checkpoint(tmp_path / "theirs", Qwen3Config(**SIZES, head_dim=8), model_type="theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    raw["depth"] = raw.pop("num_hidden_layers")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(raw))
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    renamed = {name.replace("model.", "trunk.", 1): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = stock(IDS, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool)).logits
    with pytest.raises(ValueError, match="unknown model_type 'theirs'"):
        redraft.load(tmp_path / "theirs", device="cpu")
    lm = redraft.load(tmp_path / "theirs", family="my_families:MINE", device="cpu")
    assert torch.allclose(lm.logits(IDS), expected, atol=1e-5)
    redraft.convert(tmp_path / "theirs", tmp_path / "ours", family="my_families:MINE")
    assert torch.allclose(redraft.load(tmp_path / "ours", device="cpu").logits(IDS), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "unknown family 'mine'; known are llada, .*, MODULE:NAME"),
        ("no_such_module:MINE", "family no_such_module:MINE cannot be imported: No module named .*PYTHONPATH"),
        ("redraft.models.families:MINE", "family redraft.models.families:MINE cannot be imported.*no attribute 'MINE'"),
        (":MINE", "family :MINE cannot be imported: Empty module name"),
        ("redraft.models.families:_SDAR", "must be a redraft.models.family.Family; got str"),
    ],
)
def test_what_is_no_family_is_told(name, message):
    with pytest.raises(ValueError, match=message):
        find_family({}, name=name)


def test_experts_chosen_by_a_block_are_refused():
    raw = PUBLISHED["LLaDA2.0-mini"][1]
    find_family({}, name="llada2").config(raw | {"expert_capacity": None})
    for name in ("llada2", "llada2.1"):
        with pytest.raises(ValueError, match="expert_capacity=64 is of LLaDA2.2, .*the logits would be others"):
            find_family({}, name=name).config(raw | {"expert_capacity": 64})


def test_a_block_model_under_the_name_of_a_family_of_full_attention_is_refused():
    with pytest.raises(ValueError, match="this checkpoint has block_size=32, and dream attends to everything"):
        find_family({}, name="dream").config(RAW | {"block_size": 32}, mask_token_id=60)


MASK_IDS = {
    "llada": 126336, "llada-moe": 156895, "llada2": 156895, "llada2.1": 156895, "dream": 151666, "sdar": 151669,
    "sdar-moe": 151669, "fast-dllm-v2": 151665, "rnd1": 151669, "diffusion-gemma": 0, "a2d-gpt2": None,
    "a2d-llama": None, "a2d-qwen2": None, "a2d-qwen3": None, "diffullama": None, "diffugpt": None,
    "open-dcoder": None,
    "wedlm": None, "wedlm-7b": None, "sdlm": 151665, "nemotron": 100, "i-dlm": 151669, "efficient-dlm": 151662,
    "stable-diffcoder": None,
}  # fmt: skip
EOS_IDS = {
    "llada": 126081, "llada-moe": 156892, "llada2": 156892, "llada2.1": 156892, "dream": 151643, "sdar": 151643,
    "sdar-moe": 151643, "fast-dllm-v2": 151645, "rnd1": 151645,
    "sdlm": 151645,
}  # fmt: skip
SHIFTED = {"dream", "fast-dllm-v2", "rnd1", "diffullama", "diffugpt", "open-dcoder"}
BLOCKS = {"llada2": 32, "llada2.1": 32, "fast-dllm-v2": 32, "diffusion-gemma": 256}
WITHIN = {"wedlm": "reordered", "wedlm-7b": "reordered", "sdlm": "with-last", "nemotron": "full", "i-dlm": "causal"}
SHIFTED |= {"sdlm", "i-dlm"}
BLOCKS |= {"wedlm": 32, "wedlm-7b": 32, "sdlm": 4, "nemotron": 32, "i-dlm": 4}
BLOCKS |= {"efficient-dlm": 32, "stable-diffcoder": 4}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_familys_ids_shift_and_blocks_are_the_published_ones(family):
    assert family.mask_token_id == MASK_IDS[family.name]
    assert family.eos_token_id == EOS_IDS.get(family.name)
    assert family.shift_logits == (family.name in SHIFTED)
    assert family.block_size == BLOCKS.get(family.name)
    assert family.within == WITHIN.get(family.name)
    assert family.process == ("uniform" if family.name == "diffusion-gemma" else "masked")


def test_every_family_rests_on_an_architecture_of_transformers():
    for family in FAMILIES:
        assert AutoConfig.for_model(family.stock).model_type == family.stock
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert {"Dream", "llada", "llada2_moe", "llada21_moe", "sdar"} <= set(known_model_types())
