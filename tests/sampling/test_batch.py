"""Rows that join and leave a running batch: each is at every step what it is alone."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_lm
from tiny_gemma import CANVAS, tiny_gemma

import redraft
from redraft.language_model import LanguageModel
from redraft.layouts import Layout
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.settings import DiffusionSettings
from redraft.prompts import row_keys
from redraft.sampling import policies as p
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import build_canvas
from redraft.sampling.config import SamplingConfig
from redraft.sampling.constrain import TextConstraint
from redraft.sampling.presets import PRESETS
from redraft.sampling.sampler import Sampler, build_sampler

MASK, NEW = 2, 12
MODELS = ("full", "block-causal", "shifted", "encoder-decoder")
CAUSAL = {
    "causal context": {"within": "full"},
    "causal context, shifted": {"within": "full", "shift_logits": True},
    "all causal": {"within": "causal"},
    "decided tokens first": {"within": "reordered"},
    "with the last token": {"within": "with-last", "shift_logits": True},
}
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
    if name in CAUSAL:
        return tiny_lm(block_size=4, **CAUSAL[name])
    return tiny_lm(block_size=None if name == "full" else 4, shift_logits=name == "shifted")


@cache
def constraint():
    compiled = redraft.Regex("[a-m]{2,5}(-[0-9]{1,3}){0,2}").compile(WORDS, eos_token_id=1, leading_space="text")
    return TextConstraint(completion=lambda before: compiled, num_tokens=NEW)


def some_sampler(rng, lm):
    """Draw a preset with settings of its own, or policies that no preset combines."""
    ends = rng.choice([(), (1,)])
    settings = {"max_new_tokens": NEW, "temperature": rng.choice([0.0, 0.0, 0.7])}
    if lm.denoiser.is_self_conditioned:
        config = SamplingConfig(
            preset="diffusion-gemma", steps_per_block=rng.randint(1, 6), block_size=CANVAS, **settings
        )
        sampler = build_sampler(config, lm.denoiser.settings, eos_token_ids=ends)
        return replace(sampler, cache=rng.choice(["exact", "none"]))
    if lm.denoiser.settings.is_causal and rng.random() < 0.4:
        drafts = ("lookup",) if lm.denoiser.settings.layout.has_order else ("lookup", "speculate", "speculate-ahead")
        config = SamplingConfig(preset=rng.choice(["ar", "ar", *drafts]), **settings)
        sampler = build_sampler(config, lm.denoiser.settings, eos_token_ids=ends)
        return sampler if sampler.speculation else replace(sampler, cache=rng.choice(["exact", "none"]))
    settings["cfg_scale"] = rng.choice([0.0, 0.0, 0.0, 1.5])
    if rng.random() < 0.3:
        settings[rng.choice(["forwards", "steps"])] = rng.randint(1, 14)
    elif rng.random() < 0.5:
        settings["steps_per_block"] = rng.randint(1, 5)
    if rng.random() < 0.3:
        settings |= {"top_p": 0.9} if rng.random() < 0.5 else {"top_k": 5}
    in_flight = 2 if rng.random() < 0.3 else 1
    settings["block_size"] = 4
    preset = rng.choice(sorted(name for name, preset in PRESETS.items() if preset.blocks != "token"))
    config = SamplingConfig(preset=preset, **settings)
    sampler = build_sampler(config, lm.denoiser.settings, eos_token_ids=ends)
    sampler = replace(sampler, frontier=replace(sampler.frontier, in_flight=in_flight))
    has_blocks = (sampler.layout or lm.denoiser.settings.layout).block_size is not None
    kinds = ("exact", "exact", "none") if has_blocks else ("none", "prefix", "dual")
    sampler = replace(sampler, cache=rng.choice(kinds))
    if rng.random() < 0.15 and sampler.noise == "mask":
        sampler = replace(sampler, constraint=constraint())
    if rng.random() < 0.15 and sampler.revise is None:
        sampler = replace(sampler, score=p.GumbelScore(score=p.margin, temperature=0.3), unmask=p.Bernoulli())
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
    """Return a row's canvas after each of its steps, and its number of forwards by then; by the row's age."""
    length = int((canvas.status[row] != 4).sum())
    one = build_canvas([canvas.tokens[row, :length]], [canvas.is_noise[row, :length]], noise_token_id=MASK)
    steps = denoise(lm.denoiser, one, sampler, row_keys=keys[row : row + 1])
    return {int(step.age[0]): (*of_row(step, 0, length), int(step.num_forwards[0])) for step in steps}


def run(seed, models=MODELS):
    """Let rows join and leave at random, compare each of their steps with what they are alone, and count the rows."""
    rng = random.Random(seed)
    lm = load(rng.choice(models))
    samplers = [some_sampler(rng, lm) for _ in range(rng.randint(1, 3))]
    batch = Batch(
        lm.denoiser,
        chunk=rng.choice([None, None, 4, 7]),
        max_rows=rng.choice([0, 3]),
        max_positions=rng.choice([0, 40]),
    )
    prompts, expected, running = [], {}, set()
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
                assert bool(step.is_done[place]) == (age == max(trajectory))
                running -= {id} if step.is_done[place] else set()
        assert len(batch) == len(running)
    return len(expected)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.slow if n == 2 or n > 9 else []) for n in range(25)]
)
def test_rows_that_join_and_leave_in_any_order_are_what_they_are_alone(seed):
    assert run(seed) > 0


@pytest.mark.parametrize("seed", range(6))
def test_rows_after_a_causal_context_are_what_they_are_alone(seed):
    assert run(seed, tuple(CAUSAL)) > 0


@pytest.mark.slow
def test_thousands_of_rows_that_join_and_leave_are_what_they_are_alone():
    script = "import test_batch as t; print(sum(t.run(seed) for seed in range(1000, 1300)))"
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # apart: checks of shapes take most of the time
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) > 2000


def canvas_of(*prompts, new=NEW):
    rows = [torch.tensor([*prompt] + [0] * new) for prompt in prompts]
    return build_canvas(rows, [torch.arange(len(row)) >= len(row) - new for row in rows], noise_token_id=MASK)


@pytest.fixture
def fed(monkeypatch):
    """Count the tokens of each forward of the block-causal model, as rows and tokens of a row."""
    counts, forward = [], type(load("block-causal").denoiser).__call__

    def counted(self, query):
        counts.append(tuple(query.input_ids.shape))
        return forward(self, query)

    monkeypatch.setattr(type(load("block-causal").denoiser), "__call__", counted)
    return counts


EXACT = Sampler(cache="exact", frontier=p.Blocks(size=4, on_grid=True), steps_per_block=4)
KEY = torch.tensor([7])


def drain(batch):
    while len(batch):
        batch.tick()


def test_a_prompt_that_joins_is_fed_alone_in_chunks_while_the_others_go_on(fed):
    batch = Batch(load("block-causal").denoiser, chunk=8)
    (first,) = batch.join(canvas_of([5] * 4), EXACT, row_keys=KEY)
    batch.tick()
    (second,) = batch.join(canvas_of(list(range(3, 23))), EXACT, row_keys=KEY)
    fed.clear()
    running = [[step.rows.tolist() for step in batch.tick()] for _ in range(4)]
    assert running == [[[first]], [[first]], [[first, second]], [[first, second]]]
    assert fed == [(1, 8), (1, 4), (1, 8), (1, 4), (1, 4), (2, 4), (2, 8)]  # at last the first row begins a block


def test_what_a_prompt_shares_with_a_row_that_runs_or_left_is_not_fed_again(fed):
    batch = Batch(load("block-causal").denoiser)
    prompt = list(range(3, 19))
    batch.join(canvas_of(prompt), EXACT, row_keys=KEY)
    batch.tick()
    fed.clear()
    later = [*prompt[:12], 30, 31, 32, 33, 34]
    batch.join(canvas_of(later), EXACT, row_keys=KEY)  # the other one runs beside it
    batch.tick()
    assert fed[0] == (1, 4)  # one block of four
    drain(batch)
    fed.clear()
    batch.join(canvas_of([*later, 20]), EXACT, row_keys=KEY)  # both have left
    batch.tick()
    assert fed == [(1, 4)]  # the open block alone
    other = [39, *prompt[1:]]
    fed.clear()
    batch.join(canvas_of(other), EXACT, row_keys=KEY)
    batch.tick()
    assert fed[0] == (1, 16)


@pytest.mark.parametrize("name", ["causal context", "all causal"])
def test_after_a_causal_context_any_common_beginning_is_shared(fed, name):
    batch = Batch(load(name).denoiser)
    prompt = list(range(3, 17))
    batch.join(canvas_of(prompt), EXACT, row_keys=KEY)
    batch.tick()
    fed.clear()
    batch.join(canvas_of([*prompt[:11], 30, 31, 32, 33, 34]), EXACT, row_keys=KEY)
    drain(batch)
    assert fed[0] == (1, 16 - 11)  # of 16 tokens 11 are shared, which end inside of a block


def test_an_open_block_that_is_causal_feeds_no_decided_token_twice(fed):
    lm = load("all causal")
    one_by_one = replace(EXACT, score=lambda candidates: -candidates.window.positions.double())
    fed.clear()
    for _ in denoise(lm.denoiser, canvas_of([5] * 8, new=4), one_by_one, row_keys=KEY):
        pass
    assert fed == [(1, 12), (1, 5), (1, 4), (1, 3)]


def test_conversations_take_turns_in_a_batch_with_room_for_one_more(fed):
    batch = Batch(load("block-causal").denoiser, max_rows=3)
    talks = {name: [first] * 8 for name, first in (("one", 5), ("other", 6))}
    for turn in range(3):
        for name, prompt in talks.items():
            fed.clear()
            *_, last = denoise(batch.denoiser, canvas_of(prompt), EXACT, row_keys=KEY, batch=batch)
            assert turn == 0 or fed[0][1] <= 8  # what was said last, and the open block
            talks[name] = [*last.canvas.tokens[0].tolist(), 7]


def test_a_batch_that_is_given_must_be_idle_and_of_the_model():
    batch = Batch(load("full").denoiser)
    batch.join(canvas_of([5]), Sampler(), row_keys=KEY)
    for other in (batch, Batch(load("shifted").denoiser)):
        with pytest.raises(ValueError, match="have no running rows"):
            next(denoise(load("full").denoiser, canvas_of([5]), Sampler(), row_keys=KEY, batch=other))
    assert len(batch) == 1


def test_prompts_that_wait_together_are_fed_in_one_forward(fed):
    batch = Batch(load("block-causal").denoiser, chunk=8)
    batch.join(canvas_of([5]), EXACT, row_keys=KEY)
    batch.tick()
    for token in (6, 7, 8):
        batch.join(canvas_of([token] * 5), EXACT, row_keys=KEY)
    fed.clear()
    assert [len(step.rows) for step in batch.tick()] == [4]
    assert fed == [(3, 4), (4, 4)]


def test_a_tick_feeds_a_chunk_while_as_many_rows_run_as_wait(fed):
    batch = Batch(load("block-causal").denoiser, chunk=8)
    batch.join(canvas_of([3], [4], [5]), EXACT, row_keys=torch.arange(3))
    batch.tick()
    for token in (6, 7, 8):
        batch.join(canvas_of([token] * 9), EXACT, row_keys=KEY)
    fed.clear()
    assert [len(batch.tick()[0].rows) for _ in range(3)] == [4, 5, 6]
    assert [shape for shape in fed if shape[0] == 1] == [(1, 8), (1, 8), (1, 8)]


@pytest.mark.parametrize("first", [0, 1])
def test_rows_that_wait_together_need_as_many_forwards_as_one_generate(first, fed):
    lm, num_rows = load("block-causal"), 16
    prompts = [[3 + i] * 12 for i in range(num_rows)]
    for _ in denoise(lm.denoiser, canvas_of(*prompts, new=16), EXACT, row_keys=torch.arange(num_rows)):
        pass
    num_generate = len(fed)
    fed.clear()
    batch = Batch(lm.denoiser, max_rows=num_rows, chunk=16)
    for row in range(num_rows):
        if row == first:
            batch.tick()  # with first = 1, a row runs already when the others come
        batch.join(canvas_of(prompts[row], new=16), EXACT, row_keys=torch.tensor([row]))
    drain(batch)
    assert len(fed) == num_generate + 2 * first  # the first row's step, and the others' prompts
    assert batch.counts["padding_tokens"] < batch.counts["query_tokens"] / 4 * first + 1


def test_a_row_waits_for_another_one_that_is_fed_most_of_its_prompt(fed):
    batch = Batch(load("block-causal").denoiser, chunk=16)
    prompt = list(range(3, 19))
    for last in (20, 21, 22):
        batch.join(canvas_of([*prompt, last, last, last, last]), EXACT, row_keys=KEY)
    assert [len(step.rows) for step in batch.tick()] == []
    batch.tick()
    assert fed[0] == (1, 16)  # then each is fed its own last block
    assert sum(rows * width for rows, width in fed if width != 16) <= 3 * 4 + 3 * 4


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_row_that_continues_what_another_one_has_just_decided_waits_a_tick(chunk, fed):
    batch = Batch(load("block-causal").denoiser, chunk=chunk)
    (first,) = batch.join(canvas_of([5] * 4), EXACT, row_keys=KEY)
    while batch.place(first).unfinished < 12:
        (step,) = batch.tick()
    assert batch.place(first).final < 12  # its last block is written by its next step
    batch.join(canvas_of([*step.canvas.tokens[0, :12].tolist(), 6]), EXACT, row_keys=KEY)
    fed.clear()
    assert [len(batch.tick()[0].rows) for _ in range(2)] == [1, 2]
    assert fed[1:] == [(2, 4)]  # nothing of it was fed again


def test_rows_of_one_prompt_are_fed_once_also_when_the_first_of_them_leaves_before(fed):
    batch = Batch(load("block-causal").denoiser, chunk=4)
    batch.join(canvas_of([5]), EXACT, row_keys=KEY)
    batch.tick()
    prompt = list(range(3, 19))
    ids = batch.join(canvas_of(prompt, prompt, prompt), EXACT, row_keys=torch.arange(3))
    batch.tick()
    batch.leave(ids[:1])
    fed.clear()
    drain(batch)
    assert sum(rows * width for rows, width in fed if (rows, width) == (1, 4)) >= 12


def test_a_row_that_leaves_moves_one_row_of_the_slots():
    lm = load("block-causal")
    batch = Batch(lm.denoiser)
    ids = batch.join(canvas_of(*([i] * 8 for i in range(3, 9))), EXACT, row_keys=torch.arange(6))
    batch.tick()
    (forward,) = batch._forwards.values()
    kept = [keys.data_ptr() for keys, _ in forward.slots.layers]
    copied, copy = [], forward.slots.copy
    forward.slots.copy = lambda source, to, num: copied.append((source, to, num)) or copy(source, to, num)
    batch.leave([ids[1], ids[5]])
    batch.tick()
    assert copied == [(4, 1, 8)]  # the last row took the place of the first that left
    assert [keys.data_ptr() for keys, _ in forward.slots.layers] == kept


def test_rows_of_unlike_samplers_share_a_forward(fed):
    batch = Batch(load("block-causal").denoiser)
    greedy, drawn = replace(EXACT, steps_per_block=2), replace(EXACT, temperature=0.7, score=p.margin)
    batch.join(canvas_of([5] * 4), greedy, row_keys=KEY)
    batch.join(canvas_of([6] * 4, [7] * 4), drawn, row_keys=torch.arange(2))
    batch.tick()
    fed.clear()
    assert [len(step.rows) for step in batch.tick()] == [1, 2]
    assert len(fed) == 1
    assert fed[0][0] == 3


def test_a_row_that_cannot_join_leaves_the_batch_as_it_was():
    lm = load("full")
    batch = Batch(lm.denoiser)
    with pytest.raises(ValueError, match="needs block-causal attention"):
        batch.join(canvas_of([5]), EXACT, row_keys=KEY)
    with pytest.raises(ValueError, match="too short"):
        batch.join(canvas_of([5], new=1), Sampler(constraint=constraint()), row_keys=KEY)
    assert len(batch) == 0
    assert batch.tick() == []
    batch.leave([0, 17])


def test_a_row_with_nothing_to_decide_is_done_when_it_joins():
    batch = Batch(load("full").denoiser)
    canvas = canvas_of([5, 6, 7], new=0)
    assert batch.join(canvas, Sampler(), row_keys=KEY) == [0]
    assert len(batch) == 0
    assert list(denoise(load("full").denoiser, canvas, Sampler(), row_keys=KEY)) == []


def test_an_error_in_one_tick_leaves_the_rows_in_the_batch():
    lm, calls = load("full"), []

    def fails_once(logits, canvas, where):
        calls.append(len(where))
        if len(calls) == 2:
            raise RuntimeError("a guide of one's own")
        return logits

    plain, guided = Sampler(steps=4), Sampler(steps=4, guides=(fails_once,))
    expected = [step.canvas.tokens for step in denoise(lm.denoiser, canvas_of([5, 6]), plain, row_keys=KEY)]
    batch = Batch(lm.denoiser)
    batch.join(canvas_of([5, 6]), guided, row_keys=KEY)
    seen = [*batch.tick()]
    with pytest.raises(RuntimeError, match="one's own"):
        batch.tick()
    while len(batch):
        seen += batch.tick()
    assert [step.canvas.tokens.tolist() for step in seen] == [tokens.tolist() for tokens in expected]


def test_a_generator_that_is_closed_lets_its_rows_go():
    lm = load("block-causal")
    batch = Batch(lm.denoiser)
    steps = denoise(lm.denoiser, canvas_of([5] * 4), EXACT, row_keys=KEY, batch=batch)
    next(steps)
    assert len(batch) == 1
    steps.close()
    assert len(batch) == 0


@pytest.mark.parametrize("preset", ["llada", "duo", "p2", "mdlm"])
def test_a_forward_that_was_interrupted_is_made_again(preset):
    lm, fails = load("full"), []
    sampler = build_sampler(SamplingConfig(preset=preset, max_new_tokens=NEW, steps=6), lm.denoiser.settings)
    expected = [of_row(step, 0, 15) for step in denoise(lm.denoiser, canvas_of([5, 6, 7]), sampler, row_keys=KEY)]

    def interrupt(*_):
        fails.append(None)
        if len(fails) % 2 == 0:
            raise KeyboardInterrupt

    batch, seen = Batch(lm.denoiser), []
    batch.join(canvas_of([5, 6, 7]), sampler, row_keys=KEY)
    handle = lm.model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        while len(batch):
            try:
                seen += [of_row(step, 0, 15) for step in batch.tick()]
            except KeyboardInterrupt:
                continue
    finally:
        handle.remove()
    assert len(fails) > 3
    assert seen == expected


@pytest.mark.parametrize("when", [1, 2])
def test_a_copy_of_slots_that_was_interrupted_is_not_taken_for_done(when):
    """The first copy seats a row beside one with the same beginning, the second closes the gap that another left."""
    lm = load("block-causal")
    prompts, keys = [[5] * 16, [6] * 16, [6] * 8 + [7] * 8], torch.arange(3)
    expected = [
        [of_row(step, 0, 28) for step in denoise(lm.denoiser, canvas_of(prompt), EXACT, row_keys=keys[i : i + 1])]
        for i, prompt in enumerate(prompts)
    ]
    batch, seen, copies = Batch(lm.denoiser), {1: [], 2: []}, []
    batch.join(canvas_of(*prompts[:2]), EXACT, row_keys=keys[:2])
    seen[1] += [of_row(step, 1, 28) for step in batch.tick()]
    (forward,) = batch._forwards.values()
    copy = forward.slots.copy

    def interrupted(*args):
        copies.append(args)
        if len(copies) == when:
            raise KeyboardInterrupt
        copy(*args)

    forward.slots.copy = interrupted
    batch.join(canvas_of(prompts[2]), EXACT, row_keys=keys[2:])
    for _ in range(30):
        try:
            for step in batch.tick():
                for place, id in enumerate(step.rows.tolist()):
                    if id:
                        seen[id].append(of_row(step, place, 28))
        except KeyboardInterrupt:
            continue
        batch.leave([0])
    assert len(copies) > when
    assert [seen[1], seen[2]] == expected[1:]


def test_memory_that_was_not_there_leaves_the_slots_as_they_were(monkeypatch):
    lm = load("block-causal")
    expected = [step.canvas.tokens for step in denoise(lm.denoiser, canvas_of([5] * 4), EXACT, row_keys=KEY)]
    batch = Batch(lm.denoiser)
    batch.join(canvas_of([5] * 4), EXACT, row_keys=KEY)
    seen = [*batch.tick()]
    (late,) = batch.join(canvas_of([6] * 40), EXACT, row_keys=KEY)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            batch.tick()
    batch.leave([late])
    batch.join(canvas_of([7] * 40), EXACT, row_keys=KEY)  # now there is memory
    while len(batch):
        seen += [step for step in batch.tick() if 0 in step.rows]
    mine = [step.canvas.tokens[step.rows.tolist().index(0), :16] for step in seen if 0 in step.rows]
    assert torch.equal(torch.stack(mine), torch.cat(expected))


def test_a_policy_that_fails_takes_no_steps_from_the_rows_of_others():
    lm = load("full")

    def fails(logits, canvas, where):
        raise RuntimeError("a guide of one's own")

    batch = Batch(lm.denoiser)
    (good,) = batch.join(canvas_of([5]), Sampler(steps=1), row_keys=KEY)
    (bad,) = batch.join(canvas_of([6]), Sampler(steps=1, guides=(fails,)), row_keys=KEY)
    with pytest.raises(RuntimeError, match="one's own"):
        batch.tick()
    batch.leave([bad])
    (step,) = batch.tick()
    assert (step.rows.tolist(), step.is_done.tolist()) == ([good], [True])


def test_a_row_that_is_stuck_leaves_its_neighbours_running():
    lm = load("full")

    class Some:
        def __call__(self, score, candidates):
            return candidates.is_open_noise & (candidates.window.row_keys != 99)[:, None]

    batch = Batch(lm.denoiser)
    sampler = Sampler(frontier=p.Blocks(size=4, on_grid=True), steps_per_block=2, unmask=Some())
    _, bad = batch.join(canvas_of([5] * 4, [6] * 4), sampler, row_keys=torch.tensor([1, 99]))
    with pytest.raises(ValueError, match="Some makes no progress in row 1"):
        drain(batch)
    batch.leave([bad])
    drain(batch)
    assert len(batch) == 0


def test_feeding_prompts_is_no_forward_of_those_that_run(fed):
    batch = Batch(load("block-causal").denoiser)
    batch.join(canvas_of([5] * 4), EXACT, row_keys=KEY)
    for _ in range(3):
        batch.tick()
    batch.join(canvas_of([6] * 40), EXACT, row_keys=KEY)
    fed.clear()
    (step,) = batch.tick()
    assert len(fed) == 2  # the prompt, and the step of both rows
    assert step.num_forwards.tolist() == [4, 1]


def test_conversations_that_begin_alike_keep_what_they_have(fed):
    batch = Batch(load("block-causal").denoiser, max_rows=4)
    talks = {"one": [5] * 4 + [6] * 8, "other": [5] * 4 + [7] * 8}
    for turn in range(3):
        for name, prompt in talks.items():
            fed.clear()
            *_, last = denoise(batch.denoiser, canvas_of(prompt), EXACT, row_keys=KEY, batch=batch)
            assert turn == 0 or fed[0][1] <= 12  # the last block, what is new, and the open block
            talks[name] = [*last.canvas.tokens[0].tolist(), 8, 9, 10, 11]


def test_slots_of_a_kind_that_no_row_needs_are_given_back():
    lm = load("full")
    batch = Batch(lm.denoiser, max_rows=4, max_positions=40)
    for size in range(1, 9):
        frontier = p.Blocks(size=4, on_grid=True)
        sampler = Sampler(cache="exact", layout=Layout(block_size=size), frontier=frontier, steps_per_block=1)
        list(denoise(lm.denoiser, canvas_of([5]), sampler, row_keys=KEY, batch=batch))
    assert len(batch._forwards) == 1


def test_a_key_that_is_missing_is_told():
    with pytest.raises(ValueError, match="row_keys must be one for each row; got 1 for 2 rows"):
        Batch(load("full").denoiser).join(canvas_of([5], [6]), Sampler(), row_keys=KEY)


def test_a_position_that_was_filled_and_reopened_between_forwards_is_no_new_input():
    """What counts is the input of the last forward, not whether anything changed since."""
    lm = load("full")

    class Blinks:
        looks_at_drafts, needs_all_steps = False, True

        def unmask(self, score, candidates):
            return candidates.is_open_noise

        def __call__(self, action, candidates):
            is_reopened = candidates.canvas.is_draft & ~candidates.window.is_last[:, None]
            return replace(action.with_kind(p.Kind.REOPEN, is_reopened), closes_block=candidates.window.is_last)

    both = Blinks()
    sampler = Sampler(steps=7, unmask=both.unmask, revise=both)
    steps = list(denoise(lm.denoiser, canvas_of([5]), sampler, row_keys=KEY))
    assert [int(step.num_forwards[0]) for step in steps] == [1] * 7


def test_logits_are_known_for_the_same_rows_and_positions_alone():
    """One row asks again what it asked before, and another no more: as many logits as the last forward gave."""
    lm, both = load("full"), p.Remasking(kind="conf", eta=0.3)
    sampler = Sampler(steps=14, frontier=p.Blocks(size=4, on_grid=True), unmask=both.unmask, revise=both)
    prompts = [[13, 0, 12], [34, 0, 18, 38, 0, 21, 0]]
    keys = row_keys([torch.tensor(prompt) for prompt in prompts], seed=3)
    together = list(denoise(lm.denoiser, canvas_of(*prompts), sampler, row_keys=keys))
    for row in range(2):
        expected = alone(lm, canvas_of(*prompts), sampler, keys, row)
        length = len(expected[0][0])
        mine = [(step, step.rows.tolist().index(row)) for step in together if row in step.rows]
        assert [(*of_row(s, i, length), int(s.num_forwards[i])) for s, i in mine] == list(expected.values())
