import subprocess
import sys

import pytest
from tiny import TinyTokenizer

from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.settings import DiffusionSettings


@pytest.mark.parametrize(("size", "low", "high"), [("1m", 0.8, 1.5), ("5m", 5, 6.5), ("14m", 12, 15), ("30m", 26, 32)])
def test_a_size_has_about_as_many_parameters_as_its_name_says(size, low, high):
    model = build_model(ModelConfig(size=size), DiffusionSettings(mask_token_id=2), tokenizer=TinyTokenizer(4096))
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high
    assert model.config.is_causal is False


def test_explicit_numbers_overrule_the_size():
    size = ModelConfig(size="1m, layers=3").dimensions
    assert (size.layers, size.hidden) == (3, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "5mm"}, "unknown model.size '5mm'.*Did you mean '5m'"),
        ({"architecture": "lama"}, "model.architecture must be one of 'llama', 'modernbert'; got 'lama'"),
        ({"size": "layers=0"}, "model.size must be a name, or positive numbers .* got 'layers=0'"),
        ({"size": "1m,layers=2,width=3"}, "got 'width=3' in '1m,layers=2,width=3'"),
        ({"size": "heads=3"}, "heads must divide hidden; got 3 heads and 256"),
        ({"max_positions": 0}, r"model.max_positions must lie in \[1, 1048576\]; got 0"),
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\); got 1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_settings_are_read_without_torch():
    code = "import sys, redraft.models.config, redraft.models.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
