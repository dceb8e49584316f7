"""Shape-checked tests: every annotated function of redraft is checked by jaxtyping and beartype while tests run."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
install_import_hook("redraft", "shape_checks.checked")


@pytest.fixture(scope="session")
def lm():
    from tiny import tiny_lm

    return tiny_lm()
