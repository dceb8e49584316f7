import pytest
from server_doubles import FakeEngine, serving

from redraft.serving.app import Backend


@pytest.fixture
def engine(text_lm):
    return FakeEngine(text_lm.tokenizer)


@pytest.fixture
def backend(engine, text_lm):
    return Backend(engine=engine, models={"tiny": text_lm, "tuned": text_lm}, max_model_len=128)


@pytest.fixture
def server(backend):
    with serving(backend) as server:
        yield server
