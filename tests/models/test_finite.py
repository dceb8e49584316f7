"""Damaged weights end in one line that names the tensor: at loading, and where logits are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_lm

import redraft
from redraft.models.finite import check_finite

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_lm(dtype=torch.float32).model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def damage(folder, value, *, name=NAME):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NAME, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_damaged_weight_is_named_at_loading_and_at_converting(folder, tmp_path, value, name):
    damage(folder, value, name=name)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity\\.") as told:
        redraft.load(folder, device="cpu")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        redraft.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_large_and_tiny_weights_are_no_damage(folder, dtype):
    damage(folder, 1e30)
    damage(folder, 1e-40, name="model.layers.0.mlp.up_proj.weight")
    assert redraft.load(folder, dtype=dtype, device="cpu").model.dtype == getattr(torch, dtype)


def test_a_weight_that_overflows_in_the_chosen_dtype_is_named(folder):
    damage(folder, 7e4)
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinity.*dtype='float32'"):
        redraft.load(folder, dtype="float16", device="cpu")


def test_further_damage_is_counted(folder):
    damage(folder, float("nan"))
    damage(folder, float("inf"), name="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight .*\(and 1 more tensors\)"):
        redraft.load(folder, device="cpu")


@pytest.mark.parametrize("field", ["rms_norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_no_number_is_named(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"config.json: {field} must be a finite number; got {value}"):
        redraft.load(folder, device="cpu")


def test_every_dtype_is_looked_at_and_no_memory_is_copied():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.zeros(3, 1000, dtype=dtype)
        check_finite("here", [("w", tensor), ("empty", tensor[:0].new_zeros(1))])
        for value in (float("nan"), float("inf"), -float("inf")):
            tensor[1, 700] = value
            with pytest.raises(ValueError, match="here: w holds"):
                check_finite("here", [("w", tensor)])


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_generating_from_weights_damaged_later_names_the_tensor(cache):
    lm = tiny_lm(dtype=torch.float32)
    lm.generate([3, 4, 5], max_new_tokens=4, steps=2, cache=cache)
    lm.model.get_parameter(NAME).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinity"):
        lm.generate([3, 4, 5], max_new_tokens=4, steps=2, cache=cache)
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinity"):
        lm.infill([[3, 2, 5]])
    with pytest.raises(ValueError, match=f"{NAME} holds NaN or infinity"):
        lm.loglikelihood([3, 4], [5, 6])


def test_a_row_that_ends_with_its_first_step_is_looked_at_too():
    lm = tiny_lm(dtype=torch.float32)
    lm.model.get_parameter(NAME).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        lm.generate([3, 4, 5], max_new_tokens=1, steps=1, stop=None)


def test_logits_that_overflow_over_finite_weights_name_the_layer():
    lm = tiny_lm(dtype=torch.float32)
    lm.model.get_parameter(NAME).data.fill_(3e38)
    with pytest.raises(ValueError, match=r"output of model.layers.1.mlp.up_proj is the first .* finite in float32"):
        lm.generate([3, 4, 5], max_new_tokens=4, steps=2)


def test_a_processor_that_makes_logits_nan_is_not_blamed_on_the_model(lm):
    with pytest.raises(ValueError, match="a guide, a logits processor or cfg_scale made them so"):
        lm.generate([3, 4, 5], max_new_tokens=4, steps=2, logits_processor=[lambda ids, logits: logits * float("nan")])


def test_logits_that_rule_tokens_out_are_no_damage(lm):
    def only_seven(ids, logits):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([7]), 0.0)

    out = lm.generate([3, 4, 5], max_new_tokens=4, steps=2, logits_processor=[only_seven])
    assert out.tokens[0].tolist() == [7, 7, 7, 7]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_a_damaged_adapter_is_named(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(redraft.load(folder, device="cpu").model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"adapter: .*lora_B.* holds NaN"):
        redraft.load(folder, adapter=tmp_path / "adapter", device="cpu")


def test_no_step_waits_for_the_device_once_more(lm, monkeypatch):
    """What reads which rows are done reads with it whether there is NaN, and all else that the host must know."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    steps = list(lm.stream([3, 4, 5], max_new_tokens=4, steps=4, stop=None))
    assert len(steps) == 4
    assert reads.count(torch.Size([6, 1])) == len(steps)  # done, stuck, NaN, block finished, first undecided, accepted
