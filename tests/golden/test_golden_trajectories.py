"""Every preset takes the very steps of its reference implementation, alone and in a batch, cached exactly or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redraft
from redraft.sampling.presets import PRESETS

DATA = Path(__file__).parent / "data"
WEIGHTS = {"fast_dllm_llada": "llada"}
ELSEWHERE = {"sdlm", "wedlm", "fast_dllm_v2"}  # test_golden_orders.py
LEFT_PADDED = {"Dream", "BD3LM"}
DREAM = {"maskgit_plus": "dream-confidence", "topk_margin": "dream-margin", "entropy": "dream-entropy"}
MASK = 255


def short_edits(policies, config):
    """Edit as LLaDA2.1 does, at most 4 times."""
    edit = policies.TokenEdit(threshold=config.editing_threshold, max_post_steps=4)
    return PRESETS["llada2.1"].build(policies, config) | {"revise": edit}


SHORT_EDITS = replace(PRESETS["llada2.1"], build=short_edits)


def cases():
    for folder in sorted(path.parent for path in DATA.glob("*/cases.json")):
        if folder.name in ELSEWHERE:
            continue
        for index, case in enumerate(json.loads((folder / "cases.json").read_text())):
            name = f"{folder.name}-{index}-{case['sampler'].replace(' ', '_')}"
            yield pytest.param(folder.name, index, case, id=name)


SETTINGS = (
    "max_new_tokens", "steps", "steps_per_block", "block_size", "cfg_scale", "threshold", "factor",
    "editing_threshold",
)  # fmt: skip


def settings(case):
    """The reference sampler by our name, with the settings of the case."""
    chosen = {name: case[name] for name in SETTINGS if case.get(name) is not None}
    if case["sampler"].startswith("MDLM"):
        name = "llada"
    elif case["sampler"] == "Dream":
        name = DREAM[case["alg"]]
    elif case["sampler"] == "Fast-dLLM LLaDA":
        name, chosen["cache"] = "fast-dllm", case["use_cache"] or "none"
        if "threshold" not in case and "factor" not in case:
            name = "llada"
    else:
        name = {"BD3LM": "bd3lm", "LLaDA2.0": "llada2", "LLaDA2.1": f"{__name__}:SHORT_EDITS"}[case["sampler"]]
    return chosen | {"preset": name, "stop": None, "temperature": 0.0, "top_p": None, "alg_temperature": None}


def load(family, case):
    lm = redraft.load(DATA / WEIGHTS.get(family, family), mask_token_id=MASK, dtype="float32", device="cpu")
    if "shift_logits" not in case:
        return lm
    of_case = replace(lm.denoiser.settings, shift_logits=case["shift_logits"])
    return replace(lm, denoiser=replace(lm.denoiser, settings=of_case))


def read(family, index):
    golden = load_file(DATA / family / "golden.safetensors")
    prompts = []
    while f"case{index}.input{len(prompts)}" in golden:
        prompts.append(golden[f"case{index}.input{len(prompts)}"].long())
    return prompts, golden[f"case{index}.output"].long(), golden.get(f"case{index}.history")


def run(lm, case, prompts, **others):
    act = lm.infill if case["sampler"] == "MDLM infill" else lm.generate
    return act(prompts, **settings(case) | others)


def of_row(case, canvas, prompts, row):
    """Cut the padding off a reference's row."""
    length = len(prompts[row]) + case.get("max_new_tokens", 0)
    if case["sampler"] not in LEFT_PADDED:
        return canvas[row, :length]
    return canvas[row, canvas.shape[1] - length :]


@pytest.mark.parametrize(("family", "index", "case"), list(cases()))
def test_the_reference_is_reproduced_token_for_token(family, index, case):
    prompts, expected, _ = read(family, index)
    lm = load(family, case)
    assert not (expected == MASK).any()
    together = run(lm, case, prompts)
    for row, sequence in enumerate(together.sequences):
        assert torch.equal(sequence, of_row(case, expected, prompts, row))
        assert torch.equal(run(lm, case, prompts[row]).sequences[0], sequence)


@pytest.mark.parametrize(
    ("family", "index", "case"), [c for c in cases() if c.values[2]["sampler"] in ("BD3LM", "LLaDA2.0", "LLaDA2.1")]
)
def test_the_exact_cache_changes_nothing(family, index, case):
    prompts, _, _ = read(family, index)
    prompts.append(prompts[0][:3])  # rows at different blocks
    lm = load(family, case)
    cached, uncached = run(lm, case, prompts, cache="exact"), run(lm, case, prompts, cache="none")
    assert cached.forwards == uncached.forwards
    for a, b in zip(cached.tokens, uncached.tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("family", "index", "case"), [c for c in cases() if c.values[2]["sampler"] not in ("BD3LM", "MDLM infill")]
)
def test_the_reference_is_followed_step_by_step(family, index, case):
    prompts, _, history = read(family, index)
    lm, steps_of = load(family, case), [0] * len(prompts)
    for step in lm.stream(prompts, **settings(case)):
        for place, row in enumerate(step.rows.tolist()):
            expected = of_row(case, history[int(step.age[0]) + 1].long(), prompts, row)
            assert torch.equal(step.canvas.tokens[place, : len(expected)], expected)
            steps_of[row] += 1
    for row, steps in enumerate(steps_of):
        rest = [of_row(case, canvas.long(), prompts, row) for canvas in history[steps:]]
        assert steps > 0
        assert all(torch.equal(canvas, rest[0]) for canvas in rest)  # the reference changes nothing after our last step


def test_another_order_of_commits_is_told_apart():
    case = json.loads((DATA / "llada" / "cases.json").read_text())[0]
    prompts, expected, _ = read("llada", 0)
    out = run(load("llada", case), case, prompts, preset="llada-random")
    assert any(not torch.equal(row, expected[i, : len(row)]) for i, row in enumerate(out.sequences))
