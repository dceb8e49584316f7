"""What `import redraft` offers is the same at every use and in every way of importing it."""

import importlib.util
import subprocess
import sys

import pytest

import redraft


@pytest.mark.parametrize("name", [name for name in redraft.__all__ if name != "__version__"])
def test_no_public_name_is_also_a_submodule_which_would_hide_it_at_the_second_use(name):
    assert importlib.util.find_spec(f"redraft.{name}") is None


@pytest.mark.parametrize(
    "first",
    [
        "redraft.load",
        "redraft.Regex",
        *(pytest.param(f"redraft.{n}", marks=pytest.mark.slow) for n in ("convert", "custom_generate")),
    ],
)
def test_a_public_name_is_the_same_object_at_the_first_use_at_the_second_and_imported(first):
    name = first.removeprefix("redraft.")
    program = (
        f"import redraft; a = {first}; b = {first}; from redraft import {name} as c;"
        "from types import ModuleType; assert a is b is c and callable(a) and not isinstance(a, ModuleType)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'generate'; it offers Choice, Contains"):
        redraft.generate  # noqa: B018
