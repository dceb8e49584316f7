"""What a family's users get back: their own names, their own config, equal weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redraft
from redraft.models.convert import convert

DATA = Path(__file__).parent.parent / "golden" / "data"
ROUND_TRIPS = {"llada": "llada", "llada2": "llada2", "llada21": "llada2.1", "dream": "dream"}


@pytest.mark.parametrize(("folder", "family"), ROUND_TRIPS.items())
def test_a_round_trip_gives_the_original_names_shapes_and_values(tmp_path, folder, family):
    convert(DATA / folder, tmp_path / "stock", mask_token_id=255)
    convert(tmp_path / "stock", tmp_path / "back", to=family)
    original = load_file(DATA / folder / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize(("folder", "family"), ROUND_TRIPS.items())
def test_the_config_says_again_what_it_said(tmp_path, folder, family):
    convert(DATA / folder, tmp_path / "back", mask_token_id=255, to=family)
    original = json.loads((DATA / folder / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("model_type", "architectures", "vocab_size"):
        assert back[name] == original[name]
    sizes = [name for name, value in original.items() if isinstance(value, int | float) and name in back]
    assert len(sizes) > 10
    assert {name: back[name] for name in sizes} == {name: original[name] for name in sizes}


@pytest.mark.parametrize(("folder", "family"), [("llada2", "llada2"), ("llada21", "llada2.1")])
def test_what_readers_of_llada2_assert_on_is_written(tmp_path, folder, family):
    convert(DATA / folder, tmp_path / "back", mask_token_id=255, to=family)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = {
        "moe_router_enable_expert_bias": True, "embedding_dropout": 0.0, "router_dtype": "fp32", "rotary_dim": 8,
        "score_function": "sigmoid", "use_qk_norm": True, "norm_topk_prob": True,
    }  # fmt: skip
    assert {name: back[name] for name in expected} == expected  # 16 dimensions a head, half of them rotated


@pytest.mark.parametrize(("folder", "family"), ROUND_TRIPS.items())
def test_what_is_written_back_loads_with_equal_logits(tmp_path, folder, family):
    convert(DATA / folder, tmp_path / "back", mask_token_id=255, to=family)
    ids = load_file(DATA / folder / "golden.safetensors")["input_ids"]
    before = redraft.load(DATA / folder, mask_token_id=255)
    after = redraft.load(tmp_path / "back")
    assert torch.equal(after.logits(ids), before.logits(ids))
    assert after.denoiser.settings == before.denoiser.settings


def test_a_model_that_the_original_code_would_compute_otherwise_is_refused(tmp_path):
    convert(DATA / "llada", tmp_path / "shifted", shift_logits=True)
    with pytest.raises(ValueError, match=r"cannot be written as llada: shift_logits is True here and False there"):
        convert(tmp_path / "shifted", tmp_path / "out", to="llada")
    with pytest.raises(ValueError, match=r"cannot be written as dream: the architecture is 'llama' here"):
        convert(DATA / "llada", tmp_path / "out", to="dream")
    with pytest.raises(ValueError, match=r"cannot be written as sdar. Use one of llada, llada2, llada2.1, dream"):
        convert(DATA / "llada", tmp_path / "out", to="sdar")
    assert not (tmp_path / "out").exists()
