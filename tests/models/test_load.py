import json

import pytest
import torch
from tiny import tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import redraft


@pytest.fixture
def folder(tmp_path):
    tiny_lm(dtype=torch.float32).model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("architecture", "auto"), [("llama", AutoModelForCausalLM), ("modernbert", AutoModelForMaskedLM)]
)
def test_a_saved_model_gives_the_same_logits_in_plain_transformers(tmp_path, architecture, auto):
    tiny_lm(architecture=architecture, dtype=torch.float32).model.save_pretrained(tmp_path)
    lm, plain = redraft.load(tmp_path), auto.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), plain(ids).logits, atol=1e-5)
    assert lm.denoiser.settings.mask_token_id == 2


def test_attention_is_bidirectional_and_block_causal_on_request(lm):
    ids = torch.randint(3, 40, (1, 8))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 2) % 37 + 3
    first = slice(0, 4)
    assert not torch.allclose(lm.logits(ids)[:, first], lm.logits(changed)[:, first])
    layout = ("block-causal", 4)
    assert torch.allclose(lm.logits(ids, layout=layout)[:, first], lm.logits(changed, layout=layout)[:, first])


def test_padding_is_inert(lm):
    ids = torch.randint(0, 40, (1, 8))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1] * 8 + [0] * 3])
    assert torch.allclose(lm.logits(padded, mask)[:, :8], lm.logits(ids), atol=1e-6)


def test_shifted_logits_are_the_left_neighbours():
    ids = torch.randint(0, 40, (2, 6))
    plain = tiny_lm().logits(ids)
    shifted = tiny_lm(shift_logits=True).logits(ids)
    assert torch.allclose(shifted[:, 1:], plain[:, :-1])
    assert torch.allclose(shifted[:, 0], plain[:, 0])


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "cannot read the weights of .* cut short"),
        (drop_a_weight, "1 missing weights: model.layers.0.mlp.up_proj.weight"),
        (lambda f: edit_config(f, diffusion=None), "names no mask token.*Pass mask_token_id="),
        (lambda f: edit_config(f, diffusion={"mask_token_id": 40}), "vocabulary of 40 tokens; got 40"),
        (lambda f: edit_config(f, diffusion={"mask_token": 2}), "unknown entries.*mask_token"),
        (lambda f: edit_config(f, architectures=["NoSuchModel"]), "NoSuchModel is not transformers' class"),
        (lambda f: edit_config(f, model_type="no_such_type"), "cannot read a model config"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot read the weights"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        redraft.load(folder)


def test_a_path_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(ValueError, match="the folder does not exist"):
        redraft.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot read a model config from no/such-model"):
        redraft.load("no/such-model")


def test_a_mask_token_can_be_named_at_loading(folder):
    edit_config(folder, diffusion=None)
    assert redraft.load(folder, mask_token_id=7).denoiser.settings.mask_token_id == 7
