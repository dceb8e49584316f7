"""Functions that transformers binds when it is imported are imported when it calls them."""

import subprocess
import sys

import pytest

from redraft.models import later

PROGRAM = """
import sys
from redraft.models.later import CALLED_LATER, import_modelling
import_modelling()
assert not {"torchao", "scipy"} & set(sys.modules), "imported at once"
import transformers.loss.loss_for_object_detection as loss
import transformers.quantizers.quantizer_torchao as quantizer
import scipy.optimize, torch
assert type(scipy.optimize) is type(sys)
assert loss.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
assert quantizer.flatten_tensor_state_dict({"a": torch.ones(1)})[0]["a"] == 1
assert set(CALLED_LATER) <= set(sys.modules)
"""


@pytest.fixture
def colorsys(monkeypatch):
    """Put off a module of the standard library that nothing else imports."""
    monkeypatch.setattr(later, "CALLED_LATER", {"colorsys": "rgb_to_hsv"})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    yield
    sys.modules.pop("colorsys", None)


def test_a_function_is_imported_when_it_is_called(colorsys):
    with later._called_later():
        from colorsys import rgb_to_hsv
    assert "colorsys" not in sys.modules
    assert rgb_to_hsv(1, 0, 0) == (0, 1, 1)
    assert hasattr(sys.modules["colorsys"], "__file__")


def test_other_names_are_the_real_modules_and_it_stays(colorsys):
    with later._called_later():
        from colorsys import hsv_to_rgb
    assert hsv_to_rgb.__module__ == "colorsys"
    assert sys.modules["colorsys"].hsv_to_rgb is hsv_to_rgb


def test_a_module_that_is_there_keeps_its_place(colorsys):
    import colorsys as real

    with later._called_later():
        assert sys.modules["colorsys"] is real
    assert sys.modules["colorsys"] is real


def test_an_error_in_the_block_leaves_no_stand_in(colorsys):
    with pytest.raises(KeyError), later._called_later():
        raise KeyError
    assert "colorsys" not in sys.modules


def test_transformers_gets_torchao_and_scipy_when_it_calls_them():
    pytest.importorskip("torchao")
    pytest.importorskip("scipy")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
