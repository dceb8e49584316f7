"""The `llada` preset takes the very steps of the reference implementations (greedy, low-confidence remasking)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redraft

DATA = Path(__file__).parent / "data"
FAMILIES = ["llada", "llada_moe", "a2d_qwen3"]


def cases(family):
    """Cases of the sampler that redraft has so far: no guidance, no blocks on the absolute grid."""
    listed = json.loads((DATA / family / "cases.json").read_text())
    return [
        (i, case)
        for i, case in enumerate(listed)
        if case["sampler"] == "MDLM low_confidence" and not case.get("cfg_scale")
    ]


def load(family, case):
    lm = redraft.load(DATA / family, mask_token_id=255, dtype="float32", device="cpu")
    return lm if not case["shift_logits"] else with_shift(lm)


def with_shift(lm):
    from dataclasses import replace

    settings = replace(lm.denoiser.settings, shift_logits=True)
    return replace(lm, denoiser=replace(lm.denoiser, settings=settings))


@pytest.mark.parametrize(("family", "index", "case"), [(f, i, c) for f in FAMILIES for i, c in cases(f)])
def test_every_step_of_the_reference_is_taken(family, index, case):
    golden = load_file(DATA / family / "golden.safetensors")
    prompts = []
    while f"case{index}.input{len(prompts)}" in golden:
        prompts.append(golden[f"case{index}.input{len(prompts)}"].long())
    chosen = {name: case[name] for name in ("max_new_tokens", "steps", "block_size")} | {"stop": None}
    lm = load(family, case)
    expected = golden[f"case{index}.output"].long()
    out = lm.generate(prompts, **chosen)
    for row, sequence in enumerate(out.sequences):
        assert torch.equal(sequence, expected[row, : len(sequence)])
    alone = lm.generate(prompts[0], **chosen)
    assert torch.equal(alone.sequences[0], out.sequences[0])
    if (history := golden.get(f"case{index}.history")) is None:
        return
    for step in lm.stream(prompts, **chosen):
        for place, row in enumerate(step.rows.tolist()):
            length = len(prompts[row]) + case["max_new_tokens"]
            assert torch.equal(step.canvas.tokens[place, :length], history[step.index + 1, row, :length].long())


def test_another_order_of_commits_is_told_apart():
    index, case = cases("llada")[0]
    golden = load_file(DATA / "llada" / "golden.safetensors")
    prompts = [golden[f"case{index}.input{i}"].long() for i in range(2)]
    settings = {name: case[name] for name in ("max_new_tokens", "steps", "block_size")}
    out = load("llada", case).generate(prompts, preset="llada-random", stop=None, **settings)
    expected = golden[f"case{index}.output"].long()
    assert any(not torch.equal(sequence, expected[i, : len(sequence)]) for i, sequence in enumerate(out.sequences))
