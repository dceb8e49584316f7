"""Rows that join and leave a running batch: each is at every step what it is alone."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import tiny_lm
from tiny_gemma import CANVAS, tiny_gemma

import redraft
from redraft.language_model import LanguageModel
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.settings import DiffusionSettings
from redraft.prompts import row_keys
from redraft.sampling import policies as p
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import build_canvas
from redraft.sampling.config import SamplingConfig
from redraft.sampling.constrain import Constrained
from redraft.sampling.presets import PRESETS

MASK, NEW = 2, 12
MODELS = ("full", "block-causal", "shifted", "encoder-decoder")
WORDS = [
    None,
    None,
    None,
    *(chr(ord("a") + i).encode() for i in range(26)),
    *(str(i).encode() for i in range(10)),
    b"-",
]


@cache
def load(name):
    if name == "encoder-decoder":
        return LanguageModel(
            denoiser=EncoderDecoder(tiny_gemma(), DiffusionSettings(mask_token_id=0, block_size=CANVAS))
        )
    return tiny_lm(block_size=None if name == "full" else 4, shift_logits=name == "shifted")


@cache
def constraint():
    compiled = redraft.Regex("[a-m]{2,5}(-[0-9]{1,3}){0,2}").compile(WORDS, eos_token_id=1, leading_space="text")
    return Constrained(compiled=compiled, num_tokens=NEW)


def some_sampler(rng, lm):
    """Draw a preset with settings of its own, or policies that no preset combines."""
    ends = rng.choice([(), (1,)])
    settings = {"max_new_tokens": NEW, "temperature": rng.choice([0.0, 0.0, 0.7])}
    if lm.denoiser.is_self_conditioned:
        config = SamplingConfig(
            preset="diffusion-gemma", steps_per_block=rng.randint(1, 6), block_size=CANVAS, **settings
        )
        sampler = config.sampler(lm.denoiser.settings, eos_token_ids=ends)
        return replace(sampler, cache=rng.choice(["exact", "none"]))
    settings["cfg_scale"] = rng.choice([0.0, 0.0, 0.0, 1.5])
    if rng.random() < 0.3:
        settings[rng.choice(["forwards", "steps"])] = rng.randint(1, 14)
    elif rng.random() < 0.5:
        settings["steps_per_block"] = rng.randint(1, 5)
    if rng.random() < 0.3:
        settings |= {"top_p": 0.9} if rng.random() < 0.5 else {"top_k": 5}
    if rng.random() < 0.3:
        settings["blocks_in_flight"] = 2
    settings["block_size"] = 4
    preset = rng.choice(sorted(PRESETS))
    sampler = SamplingConfig(preset=preset, **settings).sampler(lm.denoiser.settings, eos_token_ids=ends)
    has_blocks = (sampler.layout or lm.denoiser.settings.layout).block_size is not None
    kinds = ("exact", "exact", "none") if has_blocks else ("none", "prefix", "dual")
    sampler = replace(sampler, cache=rng.choice(kinds), refresh=rng.choice([None, 2]))
    if rng.random() < 0.15 and sampler.noise == "mask":
        sampler = replace(sampler, constraint=constraint())
    if rng.random() < 0.15 and sampler.revise is None:
        sampler = replace(sampler, score=p.Perturbed(score=p.Margin(), temperature=0.3), unmask=p.Bernoulli())
    return sampler


def some_rows(rng, prompts):
    """Draw prompts, some of which begin as others do, as a canvas with the keys of its rows."""
    found = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        old = rng.choice(prompts) if prompts and rng.random() < 0.6 else []
        prompt = old[: rng.randint(0, len(old))] + [rng.randint(0, 39) for _ in range(rng.randint(1, 6))]
        found += [prompt] * rng.choice([1, 1, 1, 3])
    prompts += found
    rows = [torch.tensor([*prompt] + [0] * NEW) for prompt in found]
    is_noise = [torch.arange(len(row)) >= len(row) - NEW for row in rows]
    keys = row_keys([torch.tensor(prompt) for prompt in found], seed=rng.randint(0, 3))
    return build_canvas(rows, is_noise, noise_token_id=MASK), keys


def of_row(step, place, length):
    return step.canvas.tokens[place, :length].tolist(), step.canvas.status[place, :length].tolist()


def alone(lm, canvas, sampler, keys, row):
    """Return a row's canvas after each of its steps, and its number of forwards by then."""
    length = int((canvas.status[row] != 4).sum())
    one = build_canvas([canvas.tokens[row, :length]], [canvas.is_noise[row, :length]], noise_token_id=MASK)
    steps = denoise(lm.denoiser, one, sampler, row_keys=keys[row : row + 1])
    return [(*of_row(step, 0, length), int(step.num_forwards[0])) for step in steps]


def run(seed):
    """Let rows join and leave at random, and compare each of their steps with what they are alone."""
    rng = random.Random(seed)
    lm = load(rng.choice(MODELS))
    samplers = [some_sampler(rng, lm) for _ in range(rng.randint(1, 3))]
    batch = Batch(
        lm.denoiser,
        chunk=rng.choice([None, None, 4, 7]),
        max_rows=rng.choice([0, 3]),
        max_positions=rng.choice([0, 40]),
    )
    prompts, expected, running, num_steps = [], {}, set(), 0
    to_join = rng.randint(2, 6)
    while to_join or len(batch):
        if to_join and (not len(batch) or rng.random() < 0.4):
            canvas, keys = some_rows(rng, prompts)
            sampler = rng.choice(samplers)
            to_join -= 1
            reference = [alone(lm, canvas, sampler, keys, row) for row in range(len(keys))]
            ids = batch.join(canvas, sampler, row_keys=keys)
            expected |= dict(zip(ids, reference, strict=True))
            running |= {id for id in ids if expected[id]}
        if running and rng.random() < 0.1:
            leaving = rng.sample(sorted(running), rng.randint(1, min(2, len(running))))
            batch.leave(leaving)
            running -= set(leaving)
        for step in batch.tick():
            for place, id in enumerate(step.rows.tolist()):
                assert id in running
                age, trajectory = int(step.age[place]), expected[id]
                length = len(trajectory[age][0])
                assert (*of_row(step, place, length), int(step.num_forwards[place])) == trajectory[age]
                assert bool(step.is_done[place]) == (age == len(trajectory) - 1)
                running -= {id} if step.is_done[place] else set()
                num_steps += 1
        assert len(batch) == len(running)
    return num_steps


@pytest.mark.parametrize("seed", range(150))
def test_rows_that_join_and_leave_in_any_order_are_what_they_are_alone(seed):
    assert run(seed) > 0


@pytest.mark.slow
def test_rows_that_join_and_leave_in_any_order_are_what_they_are_alone_thousands_of_times():
    assert sum(run(seed) for seed in range(1000, 3500)) > 100_000
