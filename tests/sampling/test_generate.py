"""The loop as users meet it: rows are independent, only open positions change, nothing stays undecided."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_lm

from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Status
from redraft.sampling.sampler import build_sampler

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
prompt = st.lists(st.integers(0, 39), min_size=0, max_size=9)
choices = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["llada", "llada-random"]),
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "steps": st.integers(1, 14),
        "block_size": st.sampled_from([None, 3, 4, 12]),
        "top_p": st.sampled_from([None, 0.9]),
        "top_k": st.sampled_from([None, 5]),
        "seed": st.integers(0, 5),
        "stop": st.sampled_from([None, "eos"]),
    }
)


def tokens(lm, prompts, **chosen):
    return [row.tolist() for row in lm.generate(prompts, max_new_tokens=12, **chosen).tokens]


@settings(few, max_examples=6)
@given(prompts=st.lists(prompt, min_size=2, max_size=4), chosen=choices, order=st.randoms())
def test_a_rows_tokens_do_not_depend_on_its_batch(lm, prompts, chosen, order):
    alone = [tokens(lm, [row], **chosen)[0] for row in prompts]
    distinct = [i for i, row in enumerate(prompts) if row not in prompts[:i]]  # equal prompts draw apart, by design
    shuffled = distinct.copy()
    order.shuffle(shuffled)
    assert tokens(lm, [prompts[i] for i in distinct], **chosen) == [alone[i] for i in distinct]
    assert tokens(lm, [prompts[i] for i in shuffled], **chosen) == [alone[i] for i in shuffled]
    assert tokens(lm, [prompts[distinct[0]], [7] * 30], **chosen)[0] == alone[distinct[0]]  # padded


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("preset", ["llada", "dream-margin", "dream-entropy", "eb", "fast-dllm", "p2", "llada2.1"])
def test_an_empty_prompt_gets_the_same_tokens_beside_a_long_one(preset, block_size):
    lm = tiny_lm(dtype=torch.float32, seed=3, vocab_size=500, block_size=block_size)
    chosen = {"preset": preset, "temperature": 0.0, "max_new_tokens": 8, "stop": None}
    alone = lm.generate([[]], **chosen).tokens[0]
    for length in (5, 100):
        assert torch.equal(lm.generate([[], [7] * length], **chosen).tokens[0], alone)


@few
@given(row=prompt, chosen=choices)
def test_only_open_positions_change_and_every_step_commits(lm, row, chosen):
    before = None
    for step in lm.stream([row], max_new_tokens=12, **chosen):
        canvas = step.canvas
        assert step.is_committed.any()
        assert canvas.tokens[0, : len(row)].tolist() == row
        assert (canvas.tokens[0][step.is_committed[0]] != 2).all()
        if before is not None:
            assert (before.status[step.is_committed] == Status.NOISE).all()
            is_old = ~step.is_committed
            assert torch.equal(canvas.tokens[is_old], before.tokens[is_old])
        before = canvas
    if chosen["stop"] is None:
        assert not before.is_noise.any()


@few
@given(chosen=choices)
def test_steps_are_kept_and_forwards_counted(lm, chosen):
    out = lm.generate([[5, 6]], max_new_tokens=12, **(chosen | {"stop": None}))
    num_blocks = 12 // (chosen["block_size"] or 12)
    assert out.forwards[0] <= max(chosen["steps"] + num_blocks - 1, num_blocks)
    assert len(out.tokens[0]) == 12


def test_equal_prompts_in_a_batch_draw_differently_and_the_seed_reproduces(lm):
    first = tokens(lm, [[5, 6], [5, 6]], temperature=1.5, stop=None)
    assert first[0] != first[1]
    assert tokens(lm, [[5, 6], [5, 6]], temperature=1.5, stop=None) == first
    assert tokens(lm, [[5, 6]], temperature=1.5, stop=None) == first[:1]
    assert tokens(lm, [[5, 6]], temperature=1.5, stop=None, seed=1) != first[:1]


def test_blocks_are_decoded_from_left_to_right(lm):
    trace = lm.generate([[5, 6, 7]], max_new_tokens=12, block_size=4, stop=None, trace=True).trace[0]
    blocks = [(event.position - 3) // 4 for event in trace.events]
    assert blocks == sorted(blocks)


def test_a_literal_mask_token_in_the_prompt_is_a_token(lm):
    out = lm.generate([[2, 5, 2]], max_new_tokens=4, stop=None)
    assert out.sequences[0][:3].tolist() == [2, 5, 2]
    assert (out.tokens[0] != 2).all()


def test_infilling_changes_the_holes_alone(lm):
    out = lm.infill([[5, 2, 2, 8, 9, 2], [2, 4]])
    for row, filled in zip([[5, 2, 2, 8, 9, 2], [2, 4]], out.sequences, strict=True):
        for before, after in zip(row, filled.tolist(), strict=True):
            assert before == after if before != 2 else after != 2
    assert [len(new) for new in out.tokens] == [3, 1]


def eos_third(logits, canvas, where):
    """Make EOS certain at the third new position of a prompt of one token, and impossible elsewhere."""
    logits[:, 1] = torch.where(where % canvas.tokens.shape[1] == 3, 1e4, -1e4).to(logits.dtype)
    return logits


def test_generation_ends_at_eos_and_not_without_being_asked(lm):
    chosen = {"max_new_tokens": 8, "block_size": 1, "guides": [eos_third]}
    ended, whole = lm.generate([[5]], stop="eos", **chosen), lm.generate([[5]], stop=None, **chosen)
    assert (ended.forwards, whole.forwards) == ([3], [8])  # it is ended there, and not only cut
    assert (len(ended.tokens[0]), len(whole.tokens[0])) == (3, 8)
    assert ended.tokens[0].tolist() == whole.tokens[0][:3].tolist()
    assert (whole.tokens[0] == 1).nonzero()[:, 0].tolist() == [2]


def test_an_eos_that_is_decided_before_its_left_neighbours_ends_nothing_until_they_are(lm):
    order = torch.tensor([0, 7, 6, 8, 5, 4, 3, 2, 1])  # EOS first, then from left to right

    class Order:
        def __call__(self, candidates):
            return order[candidates.window.positions].to(candidates.proposal.confidence.dtype)

    config = lm.sampling_config(max_new_tokens=8)
    sampler = replace(build_sampler(config, lm.denoiser.settings, eos_token_ids=(1,)), score=Order())
    canvas = lm._canvas_after([torch.tensor([5])], 8, sampler)
    sampler = replace(sampler, guides=(eos_third,))
    steps = list(denoise(lm.denoiser, canvas, sampler, row_keys=torch.tensor([0])))
    assert [step.is_done.tolist() for step in steps] == [[False], [False], [True]]


def test_a_row_that_has_ended_is_cut_behind_its_eos():
    lm = tiny_lm(seed=3)
    ended = [
        (row, forwards)
        for seed in range(10)
        for out in [lm.generate([[5]], max_new_tokens=16, temperature=2.0, block_size=1, seed=seed)]
        for row, forwards in zip(out.tokens, out.forwards, strict=True)
        if 1 in row
    ]
    assert ended, "no seed drew an EOS: the test shows nothing"
    for row, forwards in ended:
        assert row.tolist().index(1) == len(row) - 1
        assert forwards == len(row)


def test_a_trace_tells_every_decision(lm):
    out = lm.generate([[5, 6], [7]], max_new_tokens=8, steps=4, trace=True, stop=None)
    for trace, sequence in zip(out.trace, out.sequences, strict=True):
        assert trace.token_ids == sequence.tolist()
        assert trace.num_steps == 4
        decided = {event.position: event.token_id for event in trace.events}
        assert len(decided) == len(trace.events) == 8
        assert all(sequence[position] == token for position, token in decided.items())
        assert all(0 <= event.confidence <= 1 for event in trace.events)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"steps": -1}, "steps must lie in .1, 1048576.; got -1"),
        ({"block_size": 5}, "block_size must divide max_new_tokens; got 5 and 12. Use 3, 4, 6"),
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"top_p": 0.0}, "top_p must lie in .0, 1.; got 0.0"),
        ({"top_k": 0}, "top_k must lie in .1, 1048576.; got 0"),
        ({"preset": "lada"}, "unknown preset 'lada'.*Did you mean 'llada'"),
        ({"stop": "bos"}, "stop strings need a tokenizer"),
        ({"stop": ("",)}, "must not be empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must lie in .1, 1048576.; got 0"),
        ({"max_new_tokens": 200}, "context of 128 tokens; got 201"),
        ({"temprature": 1.0}, "unknown setting 'temprature'.*Did you mean 'temperature'"),
    ],
)
def test_settings_that_do_not_fit_are_told(lm, chosen, message):
    with pytest.raises(ValueError, match=message):
        lm.generate([[5]], **({"max_new_tokens": 12} | chosen))


def test_prompts_that_do_not_fit_are_told(lm):
    with pytest.raises(ValueError, match="there is no prompt"):
        lm.generate([])
    with pytest.raises(ValueError, match="no tokenizer, so prompts must be token ids; got text"):
        lm.generate("text")
    with pytest.raises(ValueError, match="nothing to fill"):
        lm.infill([[5, 6]])
