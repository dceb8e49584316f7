"""The compiled body: the same tokens, and nothing is compiled again once both shapes of a block were seen."""

import pytest
import torch
from tiny import tiny_lm
from torch._dynamo.utils import counters

from redraft.language_model import LanguageModel
from redraft.models import denoiser as denoiser_module

CHOSEN = {"preset": "bd3lm", "block_size": 4, "max_new_tokens": 16, "steps_per_block": 3, "stop": None}
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own code


def compiled(lm):
    return LanguageModel(denoiser=lm.denoiser.compiled(), eos_token_id=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "shapes"),
    [(CHOSEN, 2), ({"max_new_tokens": 16, "steps": 6, "stop": None}, 1)],
    ids=["exact cache", "whole canvas"],
)
def test_a_compiled_generation_has_the_same_tokens_and_compiles_each_shape_once(chosen, shapes):
    torch._dynamo.reset()
    prompts = [list(range(5, 15))]
    expected = tiny_lm().generate(prompts, temperature=0.7, **chosen).tokens
    lm = compiled(tiny_lm())
    before = counters["stats"]["unique_graphs"]
    graphs = []
    for _ in lm.stream(prompts, temperature=0.7, **chosen):
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[-1] == shapes
    assert graphs[:5][-1] == shapes  # the first block, and the step that finishes it
    again = lm.generate(prompts, temperature=0.7, **chosen)
    assert counters["stats"]["unique_graphs"] - before == shapes
    assert torch.equal(again.tokens[0], expected[0])


def test_static_forwards_equal_those_that_look_at_what_is_needed_alone(monkeypatch):
    lm = tiny_lm()
    rows = [list(range(5, 15)), [7, 8, 9]]
    expected = [tokens.tolist() for tokens in lm.generate(rows, temperature=0.7, **CHOSEN).tokens]
    denoiser = denoiser_module.Denoiser(lm.model, lm.denoiser.settings, is_compiled=True)  # static, and run eagerly
    static = LanguageModel(denoiser=denoiser, eos_token_id=1)
    assert [tokens.tolist() for tokens in static.generate(rows, temperature=0.7, **CHOSEN).tokens] == expected
    alone = [static.generate([row], temperature=0.7, **CHOSEN).tokens[0].tolist() for row in rows]
    assert alone == expected


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(denoiser_module, "can_compile", lambda: False)
    with pytest.raises(ValueError, match="compile=True needs a GPU with Triton or a C"):
        tiny_lm().denoiser.compiled()
