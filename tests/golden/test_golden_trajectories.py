"""Every preset takes the very steps of its reference implementation, alone and in a batch, cached exactly or not."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redraft
from redraft.sampling.presets import PRESETS

DATA = Path(__file__).parent / "data"
WEIGHTS = {"fast_dllm_llada": "llada"}
ELSEWHERE = {"sdlm", "wedlm", "fast_dllm_v2"}  # test_golden_orders.py
LEFT_PADDED = {"Dream", "BD3LM", "OPDLM bd3lm_sample"}
UNSTATED = {"sdar_moe": 4, "a2d_qwen3_block": 4}
"""Tokens in the blocks of families whose config.json does not say it."""
ON_PROMPTS = {"BD3LM", "OPDLM bd3lm_sample"}
"""Samplers whose blocks begin at each prompt's end: no history is recorded."""
SDAR = {"low_confidence_static": {"preset": "sdar", "threshold": 1.0}, "sequential": {"preset": "sdar-sequential"}}
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
    "editing_threshold", "entropy_bound",
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
    elif "strategy" in case:
        chosen = {"preset": "sdar"} | chosen | SDAR.get(case["strategy"], {})
        name = chosen["preset"]
    else:
        names = {"LLaDA2.0": "llada2", "LLaDA2.1": f"{__name__}:SHORT_EDITS"} | dict.fromkeys(ON_PROMPTS, "bd3lm")
        name = names[case["sampler"]]
    return chosen | {"preset": name, "stop": None, "temperature": 0.0, "top_p": None, "alg_temperature": None}


@cache
def load_once(family):
    return redraft.load(
        DATA / family, mask_token_id=MASK, block_size=UNSTATED.get(family), dtype="float32", device="cpu"
    )


def load(family, case):
    lm = load_once(WEIGHTS.get(family, family))
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
    """Cut a reference's row to the text: its padding off, and what its last block holds beyond it."""
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
        if len(prompts) > 1:
            assert torch.equal(run(lm, case, prompts[row]).sequences[0], sequence)


@pytest.mark.parametrize(
    ("family", "index", "case"),
    [c for c in cases() if c.values[2]["sampler"] in (*ON_PROMPTS, "LLaDA2.0", "LLaDA2.1")],
)
def test_the_exact_cache_changes_nothing(family, index, case):
    prompts, _, _ = read(family, index)
    prompts.append(prompts[0][:3])  # rows at different blocks
    lm = load(family, case)
    cached, uncached = run(lm, case, prompts, cache="exact"), run(lm, case, prompts, cache="none")
    assert cached.forwards == uncached.forwards
    for a, b in zip(cached.tokens, uncached.tokens, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "index", "case"),
    [c for c in cases() if c.values[2]["sampler"] not in (*ON_PROMPTS, "MDLM infill")],
)
def test_the_reference_is_followed_step_by_step(family, index, case):
    prompts, _, history = read(family, index)
    lm, steps_of = load(family, case), [0] * (len(prompts) + 1)
    has_strategy = "strategy" in case  # then without a cache, and beside another row
    rows, given = ([*prompts, prompts[0][:2]], {"cache": "none"}) if has_strategy else (prompts, {})
    for step in lm.stream(rows, **given | settings(case)):
        for place, row in enumerate(step.rows.tolist()):
            steps_of[row] += 1
            if row < len(prompts):
                expected = history[steps_of[row]].long()
                expected = expected[row] if has_strategy else of_row(case, expected, prompts, row)  # the whole blocks
                assert torch.equal(step.canvas.tokens[place, : len(expected)], expected)
    for row, steps in enumerate(steps_of[: len(prompts)]):
        rest = [of_row(case, canvas.long(), prompts, row) for canvas in history[steps:]]
        assert steps > 0
        assert all(torch.equal(canvas, rest[0]) for canvas in rest)  # the reference changes nothing after our last step


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        (14, {"preset": "llada", "threshold": None}),  # an even share of what is left, not of the block
        (0, {"preset": "sdar-sequential", "threshold": None}),
        (9, {"preset": "eb"}),  # without the largest entropy in the sum
        (2, {"threshold": 0.85}),
    ],
)
def test_another_strategy_is_told_apart(index, changes):
    case = json.loads((DATA / "sdar" / "cases.json").read_text())[index]
    prompts, _, _ = read("sdar", index)
    lm = load("sdar", case)
    theirs, ours = (list(lm.stream(prompts, **settings(case) | given)) for given in ({}, changes))
    same = [torch.equal(a.canvas.tokens, b.canvas.tokens) for a, b in zip(theirs, ours, strict=False)]
    assert len(theirs) != len(ours) or not all(same)


def test_another_order_of_commits_is_told_apart():
    case = json.loads((DATA / "llada" / "cases.json").read_text())[0]
    prompts, expected, _ = read("llada", 0)
    out = run(load("llada", case), case, prompts, preset="llada-random")
    assert any(not torch.equal(row, expected[i, : len(row)]) for i, row in enumerate(out.sequences))
