"""The compiled body: the same tokens, and nothing is compiled again once both shapes of a block were seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_lm

from redraft.language_model import LanguageModel
from redraft.models import denoiser as denoiser_module

CHOSEN = {"preset": "bd3lm", "block_size": 4, "max_new_tokens": 16, "steps_per_block": 3, "stop": None}
WHOLE = {"max_new_tokens": 16, "steps": 6, "stop": None}
PROMPT = list(range(5, 15))
SCRIPT = """
import json, sys
from tiny import tiny_lm
from torch._dynamo.utils import counters
from redraft.language_model import LanguageModel

prompt, chosen = json.loads(sys.argv[1])
lm = LanguageModel(denoiser=tiny_lm().denoiser.compiled(), eos_token_ids=(1,))
graphs = []
for _ in range(2):
    for step in lm.stream([prompt], **chosen):
        graphs.append(counters["stats"]["unique_graphs"])
print(json.dumps([graphs, step.canvas.tokens[0, len(prompt):].tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "shapes"), [(CHOSEN, 2), (WHOLE, 1)], ids=["exact cache", "whole canvas"])
def test_a_compiled_generation_has_the_same_tokens_and_compiles_each_shape_once(chosen, shapes):
    chosen = chosen | {"temperature": 0.7}
    command = [sys.executable, "-c", SCRIPT, json.dumps([PROMPT, chosen])]  # apart: checks of shapes do not compile
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tests)
    graphs, tokens = json.loads(done.stdout.splitlines()[-1])
    assert graphs[3] == graphs[-1] == shapes  # a block of 3 steps, and the step that finishes it
    assert tokens == tiny_lm().generate([PROMPT], **chosen).tokens[0].tolist()


def test_static_forwards_equal_those_that_look_at_what_is_needed_alone():
    lm = tiny_lm()
    rows = [list(range(5, 15)), [7, 8, 9]]
    expected = [tokens.tolist() for tokens in lm.generate(rows, temperature=0.7, **CHOSEN).tokens]
    denoiser = denoiser_module.Denoiser(lm.model, lm.denoiser.settings, is_compiled=True)  # static, and run eagerly
    static = LanguageModel(denoiser=denoiser, eos_token_ids=(1,))
    assert [tokens.tolist() for tokens in static.generate(rows, temperature=0.7, **CHOSEN).tokens] == expected
    alone = [static.generate([row], temperature=0.7, **CHOSEN).tokens[0].tolist() for row in rows]
    assert alone == expected


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(denoiser_module, "can_compile", lambda: False)
    with pytest.raises(ValueError, match="compile=True needs a GPU with Triton or a C"):
        tiny_lm().denoiser.compiled()
