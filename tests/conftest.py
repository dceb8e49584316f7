"""Shape-checked tests: every annotated function of redraft is checked by jaxtyping and beartype while tests run."""

import os

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# An example may take long where others work too. Examples are the same in every run, so that a change is judged by what
# it changes; `pytest --hypothesis-profile explore` draws new ones.
SLOW_IS_NO_FAULT = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "any machine", deadline=None, derandomize=True, suppress_health_check=SLOW_IS_NO_FAULT
)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=SLOW_IS_NO_FAULT)
hypothesis.settings.load_profile("any machine")
install_import_hook("redraft", "shape_checks.checked")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tokens(tmp_path_factory):
    """Prepare data in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unchecked():
    """Run without type checks: values of a wrong type reach the code, and small calls take their usual time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def lm():
    from tiny import tiny_lm

    return tiny_lm()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import torch
    from tiny import tiny_lm
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", "<mask>", *sorted({chr(i) for i in range(32, 127)} | {"\n"})]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>", padding_side="right"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    folder = tmp_path_factory.mktemp("evaluation") / "tiny"
    model = tiny_lm(vocab_size=len(characters), dtype=torch.float32).model
    model.config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_lm(model_folder):
    import redraft

    return redraft.load(model_folder)
