"""Families whose open tokens attend or are decided in an order of their own: SDLM, WeDLM and Fast-dLLM v2.

Logits reach 20 here, and another order of a sum moves them by 1.5e-5.
"""

import json
from dataclasses import replace
from functools import cache as remembered
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import redraft
from redraft.models.query import Query
from redraft.sampling.canvas import Status
from redraft.sampling.presets import PRESETS

DATA = Path(__file__).parent / "data"
MASK = 255
TOLERANCE = 5e-5


@remembered
def loaded(name):
    family = {"sdlm": "sdlm"}.get(name)  # its config.json says Qwen2
    return redraft.load(DATA / name, family=family, mask_token_id=MASK, dtype="float32", device="cpu")


def load(name, **settings):
    lm = loaded(name)
    of_case = replace(lm.denoiser.settings, **settings)
    return replace(lm, denoiser=replace(lm.denoiser, settings=of_case))


def cases(name):
    listed = json.loads((DATA / name / "cases.json").read_text())
    return [pytest.param(index, case, id=f"{name}-{index}") for index, case in enumerate(listed)]


def read(name, index):
    golden = load_file(DATA / name / "golden.safetensors")
    prompts = []
    while f"case{index}.input{len(prompts)}" in golden:
        prompts.append(golden[f"case{index}.input{len(prompts)}"].long())
    history = golden.get(f"case{index}.history")
    return prompts, golden[f"case{index}.output"].long(), None if history is None else history[:, 0].long()


def steps_of(lm, prompts, row=0, **settings):
    """Run prompts together, and return the canvas (seq,) of one row after each of its steps."""
    seen = []
    for step in lm.stream(prompts, stop=None, **settings):
        for place in (step.rows == row).nonzero()[:, 0]:
            length = int((step.canvas.status[place] != Status.PAD).sum())
            seen.append((step.canvas.tokens[place, :length], step.canvas.status[place, :length]))
    return seen


def companies(prompt, cache):
    """In a batch with a shorter and a longer one; with a cache also alone."""
    yield [prompt, prompt[:3], torch.cat([prompt, prompt])]
    if cache != "none":
        yield [prompt]


# --- Logits -----------------------------------------------------------------------------------------------------------


def window_order(length, window):
    positions = torch.arange(length)
    return torch.where(positions >= length - window, length - window, positions)


@pytest.mark.parametrize("name", ["sdlm", "wedlm", "fast_dllm_v2"])
def test_logits_equal_the_reference(name):
    golden = load_file(DATA / name / "golden.safetensors")
    ids, lm, length = golden["input_ids"], load(name), golden["input_ids"].shape[1]
    how = {
        "sdlm": {"order": window_order(length, int(golden.get("window", 0))).expand(len(ids), -1)},
        "wedlm": {"layout": redraft.layouts.Layout(block_size=1)},
        "fast_dllm_v2": {"layout": redraft.layouts.Layout(block_size=8)},
    }[name]
    grid = torch.zeros(len(ids), dtype=torch.int64)
    logits = lm.denoiser(Query.everywhere(ids, shift=False, grid_origin=grid, **how)).view_as(golden["logits"])
    assert (logits - golden["logits"]).abs().max() <= TOLERANCE
    full = lm.denoiser.logits(ids, shift=False, layout=redraft.layouts.Layout())
    assert (full - golden["logits"]).abs().max() > 1e-2
    if name == "sdlm":
        causal = lm.denoiser.logits(ids, shift=False, layout=redraft.layouts.Layout(block_size=1))
        assert (causal - golden["logits"]).abs().max() > 1e-2


def test_the_families_say_how_they_attend():
    blocks = {name: load(name).denoiser.settings for name in ("sdlm", "wedlm", "fast_dllm_v2")}
    said = {name: (s.block_size, s.context, s.within, s.shift_logits) for name, s in blocks.items()}
    assert said == {
        "sdlm": (4, "causal", "with-last", True),
        "wedlm": (32, "causal", "reordered", False),
        "fast_dllm_v2": (8, "block", None, True),
    }


# --- SDLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize(("index", "case"), cases("sdlm"))
def test_sdlm_accepts_the_same_prefixes(index, case, cache):
    prompts, expected, _ = read("sdlm", index)
    preset = {"prob_conf": "sdlm", "entropy_conf": "sdlm-entropy"}[case["alg"]]
    lm = load("sdlm", block_size=case["window"])
    chosen = {"max_new_tokens": case["max_new_tokens"], "threshold": case["threshold"], "cache": cache}
    for company in companies(prompts[0], cache):
        seen = steps_of(lm, company, preset=preset, **chosen)
        accepted = [int((status == Status.COMMITTED).sum()) for _, status in seen]
        assert accepted == case["accepted"]
        for (tokens, _), num in zip(seen, accepted, strict=True):
            assert torch.equal(tokens[: len(prompts[0]) + num], expected[0, : len(prompts[0]) + num])
    text = lm.generate(prompts[0], preset=preset, stop=None, **chosen)
    assert torch.equal(text.sequences[0], expected[0, : len(prompts[0]) + case["max_new_tokens"]])
    assert text.forwards == [len(accepted)]


# --- WeDLM ------------------------------------------------------------------------------------------------------------


def with_penalty(penalty):
    """The preset `wedlm` with another penalty."""
    return replace(
        PRESETS["wedlm"],
        build=lambda policies, config: {
            "unmask": policies.LowEntropy(threshold=config.entropy_threshold, penalty=penalty)
        },
    )


PENALTY_0, PENALTY_2, PENALTY_10 = with_penalty(0.0), with_penalty(0.02), with_penalty(0.1)


def wedlm_settings(case):
    chosen = {"max_new_tokens": case["max_new_tokens"]}
    if case["sampler"] == "WeDLM HF blocks":  # its threshold of 0 stands for none: the best token alone
        return chosen | {
            "preset": "wedlm-blocks",
            "block_size": case["block_size"],
            "threshold": case["threshold"] or 1.0,
        }
    name = f"PENALTY_{round(100 * case['pos_penalty_factor'])}"
    threshold = case["entropy_threshold"] or 0.0  # None: the lowest alone
    window = case["window_size"]
    return chosen | {"preset": f"{__name__}:{name}", "block_size": window, "entropy_threshold": threshold}


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize(("index", "case"), cases("wedlm"))
def test_wedlm_decodes_the_same_tokens(index, case, cache):
    prompts, expected, history = read("wedlm", index)
    lm, length = load("wedlm"), expected.shape[1]
    for company in companies(prompts[0], cache):
        seen = steps_of(lm, company, cache=cache, **wedlm_settings(case))
        assert torch.equal(seen[-1][0][:length], expected[0])
        if history is not None:
            assert torch.equal(torch.stack([tokens[:length] for tokens, _ in seen]), history[1:])
    out = lm.generate(prompts[0], cache=cache, stop=None, **wedlm_settings(case))
    assert torch.equal(out.sequences[0], expected[0])
    if "forwards" in case:  # its last forward only reads what is decided
        assert out.forwards == [case["forwards"] - 1]


def test_a_wedlm_of_the_other_architecture_is_told_by_its_config():
    find = redraft.models.families.find_family
    assert find({"model_type": "wedlm", "qk_norm": True, "attention_bias": False}).stock == "qwen3"
    assert find({"model_type": "wedlm", "qk_norm": False, "attention_bias": True}).stock == "qwen2"
    assert find({"model_type": "wedlm"}).stock == "qwen2"


# --- Fast-dLLM v2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "case", "cache"),
    [
        pytest.param(*one.values, cache, id=f"{one.id}-{cache}")
        for one in cases("fast_dllm_v2")
        for cache in (["dual"] if one.values[1]["use_block_cache"] else ["exact", "none"])
    ],
)
def test_fast_dllm_v2_takes_the_same_steps(index, case, cache):
    prompts, expected, history = read("fast_dllm_v2", index)
    lm = load("fast_dllm_v2", block_size=case["block_size"])
    length = expected.shape[1]  # whole blocks, and the first token of the next one
    chosen = {"preset": "fast-dllm-v2", "threshold": case["threshold"], "block_size": case["small_block_size"]}
    for row, prompt in enumerate(prompts):
        others = prompts if len(prompts) > 1 else [*prompts, prompt[:2]]
        for company, place in (([prompt], 0), (others, row)) if cache != "none" else ((others, row),):
            new = length - min(len(one) for one in company)
            seen = steps_of(lm, company, row=place, max_new_tokens=new, cache=cache, **chosen)
            assert torch.equal(seen[-1][0][:length], expected[row])
            if history is not None:
                followed = [tokens[:length] for tokens, _ in seen][: len(history) - 1]
                assert torch.equal(torch.stack(followed), history[1:])


def test_parts_that_do_not_divide_a_block_are_refused():
    with pytest.raises(ValueError, match="must divide the model's blocks of 8; got 3. Use 1"):
        load("fast_dllm_v2").generate([3, 4, 5], preset="fast-dllm-v2", block_size=3, max_new_tokens=9)


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
def test_one_token_at_a_time_they_are_autoregressive(name):
    lm, prompt = load(name), [3, 4, 5, 6]
    theirs = lm.model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=300, bad_words_ids=[[MASK]]
    )
    assert lm.generate(prompt, preset="ar", max_new_tokens=6, stop=None).sequences[0].tolist() == theirs[0].tolist()
