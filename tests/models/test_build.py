import pytest
from tiny import TinyTokenizer

from redraft.models.build import ModelConfig, build_model
from redraft.models.settings import DiffusionSettings


@pytest.mark.parametrize(("size", "low", "high"), [("1m", 0.8, 1.5), ("5m", 5, 6.5), ("14m", 12, 15), ("30m", 26, 32)])
def test_a_size_has_about_as_many_parameters_as_its_name_says(size, low, high):
    model = build_model(ModelConfig(size=size), DiffusionSettings(mask_token_id=2), tokenizer=TinyTokenizer(4096))
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high
    assert model.config.is_causal is False


def test_explicit_numbers_overrule_the_size():
    shape = ModelConfig(size="1m", num_layers=3).shape
    assert (shape.num_layers, shape.hidden_size) == (3, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "5mm"}, "unknown model.size '5mm'.*Did you mean '5m'"),
        ({"architecture": "lama"}, "Did you mean 'llama'"),
        ({"num_layers": 0}, "model.num_layers must be at least 1; got 0"),
        ({"num_heads": 3}, "num_heads must divide model.hidden_size; got 3 heads and 256"),
    ],
)
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)
