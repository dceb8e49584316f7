import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.sampling.canvas import build_canvas
from redraft.sampling.policies import Blocks, EndOfSequence, Filled, Quota, TopK, WholeCanvas, Window
from redraft.schedules import SCHEDULES, schedule_from_name


def window(is_open, step, num_steps):
    return Window(is_open=is_open, step=torch.tensor([step]), num_steps=torch.tensor([num_steps]))


def counts(unmask, num_open, num_steps):
    """Commit step by step and list how many each step took."""
    is_open, taken = torch.ones(1, num_open, dtype=torch.bool), []
    score = torch.rand(1, num_open)
    for step in range(num_steps):
        chosen = unmask(score, window(is_open, step, num_steps))
        assert (chosen <= is_open).all()
        taken.append(int(chosen.sum()))
        is_open = is_open & ~chosen
        if not is_open.any():
            break
    return taken


@given(num_open=st.integers(1, 60), num_steps=st.integers(1, 60), name=st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=80)
def test_a_quota_fills_every_position_in_no_more_steps_than_asked(num_open, num_steps, name):
    taken = counts(Quota(schedule=schedule_from_name(name)), num_open, num_steps)
    assert sum(taken) == num_open
    assert min(taken) >= 1
    assert len(taken) <= num_steps


@given(num_open=st.integers(1, 60), num_steps=st.integers(1, 60))
@settings(max_examples=80)
def test_the_linear_quota_rounds_what_is_left_by_the_steps_left(num_open, num_steps):
    left, expected = num_open, []
    for step in range(num_steps):
        n = round(left / (num_steps - step))  # Python rounds half to even
        left -= n
        if n:
            expected.append(n)
    assert counts(Quota(), num_open, num_steps) == expected


def test_the_surest_are_committed_first_and_of_equals_the_leftmost():
    score = torch.tensor([[0.2, 0.9, 0.9, 0.5]])
    is_open = torch.tensor([[True, True, True, True]])
    assert TopK(k=1)(score, window(is_open, 0, 4)).int().tolist() == [[0, 1, 0, 0]]
    assert TopK(k=3)(score, window(is_open, 0, 4)).int().tolist() == [[0, 1, 1, 1]]
    closed = torch.tensor([[True, False, False, True]])
    assert TopK(k=1)(score, window(closed, 0, 4)).int().tolist() == [[0, 0, 0, 1]]


def canvas(*rows):
    """Rows as strings: p prompt, . noise, e a committed EOS."""
    tokens = [torch.tensor([{"e": 1}.get(c, 5) for c in row]) for row in rows]
    built = build_canvas(tokens, [torch.tensor([c in ".e" for c in row]) for row in rows], noise_token_id=2)
    is_eos = torch.zeros_like(built.is_noise)
    for i, row in enumerate(rows):
        is_eos[i, : len(row)] = torch.tensor([c == "e" for c in row])
    return built.commit(is_eos, torch.ones_like(built.tokens))


def test_blocks_begin_at_each_rows_prompt_end():
    built = canvas("ppp....", "p....")
    assert Blocks(size=2).blocks(built)[0, 3:].tolist() == [0, 0, 1, 1]
    assert Blocks(size=2).blocks(built)[1, 1:5].tolist() == [0, 0, 1, 1]
    assert not WholeCanvas().blocks(built).any()


def test_a_row_ends_at_an_eos_with_everything_before_it_decided():
    built = canvas("pe..", "p.e.", "pp..", "pee")
    assert EndOfSequence(eos_token_id=1)(built).tolist() == [True, False, False, True]
    assert Filled()(built).tolist() == [False, False, False, True]


def test_an_eos_in_the_prompt_ends_nothing():
    built = build_canvas([torch.tensor([1, 5, 2])], [torch.tensor([False, False, True])], noise_token_id=2)
    assert EndOfSequence(eos_token_id=1)(built).tolist() == [False]


@pytest.mark.parametrize("build", [lambda: TopK(k=0), lambda: Blocks(size=0)])
def test_mistakes_are_told(build):
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        build()
