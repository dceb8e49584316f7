import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.sampling.canvas import Canvas, Status, build_canvas
from redraft.sampling.policies import (
    Action,
    Blocks,
    Candidates,
    EndOfSequence,
    EntropyBound,
    Factor,
    Kind,
    LinearAnneal,
    Quota,
    Rerank,
    Threshold,
    TokenEdit,
    TopK,
    Window,
    filled,
    fixed_quota,
    leftmost,
)
from redraft.sampling.policies.unmask import best
from redraft.sampling.propose import propose
from redraft.schedules import SCHEDULES, schedule_from_name


def candidates(score, *, status=None, step=0, num_steps=1, tokens=None, since_filled=0):
    """Candidates of one row: its proposals are token 7 with these probabilities; N and D in `status` are open."""
    states = {"N": Status.NOISE, "D": Status.DRAFT, "g": Status.GIVEN, "c": Status.COMMITTED}
    status = torch.tensor([[int(states[s]) for s in (status or "N" * len(score))]], dtype=torch.uint8)
    tokens = torch.full(status.shape, 2) if tokens is None else torch.tensor([tokens])
    canvas = Canvas(tokens=tokens, status=status, confidence=torch.zeros(status.shape))
    is_open = canvas.is_noise | canvas.is_draft
    where = is_open.flatten().nonzero()[:, 0]
    confidence = torch.tensor(score)[where]
    rest = ((1 - confidence) / 9)[:, None].expand(-1, 10).log()
    logits = rest.scatter(1, torch.full((len(where), 1), 7), confidence.log()[:, None])
    number = torch.tensor([0])
    return Candidates(
        canvas=canvas,
        window=Window(
            is_open=is_open, step=number + step, num_steps=number + num_steps, block_size=number + len(score),
            steps_since_filled=number + since_filled, row_keys=number, age=number + step, where=where,
            rows=torch.zeros_like(where), positions=where, columns=torch.arange(len(score))[None],
            opens_block=number == 0,
        ),
        proposal=propose(logits, never=2),
        previous=torch.full_like(tokens, -1),
    )  # fmt: skip


def chosen(unmask, score, **others):
    at = candidates(score, **others)
    return unmask(at.confidence, at)[0].int().tolist()


def counts(unmask, num_open, num_steps):
    """Commit step by step and list how many each step took."""
    status, taken = "N" * num_open, []
    score = torch.linspace(0.2, 0.8, num_open).tolist()
    for step in range(num_steps):
        committed = chosen(unmask, score, status=status, step=step, num_steps=num_steps)
        taken.append(sum(committed))
        assert all(s == "N" for s, c in zip(status, committed, strict=True) if c)
        status = "".join("c" if c else s for s, c in zip(status, committed, strict=True))
        if "N" not in status:
            break
    return taken


@given(num_open=st.integers(1, 60), num_steps=st.integers(1, 60), name=st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=40, deadline=None)
def test_a_quota_fills_every_position_in_no_more_steps_than_asked(num_open, num_steps, name):
    taken = counts(Quota(schedule=schedule_from_name(name)), num_open, num_steps)
    assert sum(taken) == num_open
    assert min(taken) >= 1
    assert len(taken) <= num_steps


@given(num_open=st.integers(1, 60), num_steps=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_linear_quota_rounds_what_is_left_by_the_steps_left(num_open, num_steps):
    left, expected = num_open, []
    for step in range(num_steps):
        n = round(left / (num_steps - step))  # Python rounds half to even
        left -= n
        if n:
            expected.append(n)
    assert counts(Quota(), num_open, num_steps) == expected


def test_the_surest_are_committed_first_and_of_equals_the_leftmost():
    score = [0.2, 0.9, 0.9, 0.5]
    assert chosen(TopK(k=1), score) == [0, 1, 0, 0]
    assert chosen(TopK(k=3), score) == [0, 1, 1, 1]
    assert chosen(TopK(k=1), score, status="NcgN") == [0, 0, 0, 1]


NEAR = 0.4 * (1 + 4e-7)  # equal to 0.4 but for rounding
CLOSE = 0.4 * (1 + 4e-6)  # larger


@pytest.mark.parametrize(
    "unmask", [TopK(), Quota(), Threshold(threshold=0.9), Factor(factor=0.1), EntropyBound(bound=0.0), Rerank().unmask]
)
@pytest.mark.parametrize(
    ("score", "expected"),
    [([0.3, 0.4, NEAR], [0, 1, 0]), ([0.3, 0.4, CLOSE], [0, 0, 1]), ([NEAR, 0.4, NEAR, 0.3], [1, 0, 0, 0])],
    ids=["equal", "larger", "several"],
)
def test_scores_within_a_millionth_are_equal_and_the_leftmost_wins(unmask, score, expected):
    assert chosen(unmask, score, num_steps=len(score)) == expected


@pytest.mark.parametrize(
    ("score", "count", "expected"),
    [
        ([0.4, NEAR, 0.4, 0.9], 3, [1, 1, 0, 1]),
        ([0.4 * (1 + 7e-7 * i) for i in range(6)], 1, [0, 0, 0, 0, 1, 0]),  # neighbours do not chain
        ([0.2, torch.inf, 0.4, torch.inf], 2, [0, 1, 0, 1]),
        ([0.2, torch.inf, 0.4, NEAR], 2, [0, 1, 1, 0]),
        ([-torch.inf, 0.1, 0.2], 3, [1, 1, 1]),
        ([0.2, 0.1], 0, [0, 0]),
        ([0.2, 0.1], 10**6, [1, 1]),
    ],
)
def test_exactly_as_many_are_picked_as_are_asked_for(score, count, expected):
    at = candidates([0.4] * len(score))
    assert best(torch.tensor([score]), at, torch.tensor([count]))[0].int().tolist() == expected


def test_differences_near_zero_are_equal_within_a_millionth_of_the_probability():
    at = candidates([0.4, 0.4])
    assert best(torch.tensor([[1e-5, 1.03e-5]]), at, torch.tensor([1]))[0].tolist() == [True, False]
    assert best(torch.tensor([[1e-5, 1.10e-5]]), at, torch.tensor([1]))[0].tolist() == [False, True]


def test_a_threshold_takes_all_that_pass_it_and_at_least_one():
    score = [0.2, 0.9, 0.7, 0.5]
    assert chosen(Threshold(threshold=0.6), score) == [0, 1, 1, 0]
    assert chosen(Threshold(threshold=0.95), score) == [0, 1, 0, 0]
    assert chosen(Threshold(threshold=0.85, at_least="quota"), score, num_steps=2) == [0, 1, 1, 0]
    assert chosen(Threshold(threshold=0.5), [0.5, 0.5]) == [1, 1]
    assert chosen(Threshold(threshold=0.5, strict=True), [0.5, 0.5]) == [1, 0]
    assert chosen(Threshold(threshold=1.0, strict=True, at_least="quota"), [1.0, 1.0, 0.9, 0.8], num_steps=4) == [
        1,
        0,
        0,
        0,
    ]


def test_a_fixed_quota_is_a_share_of_the_block_whatever_is_left_of_it():
    score = [0.9, 0.5, 0.2, 0.7, 0.8]
    assert [sum(chosen(fixed_quota, score, num_steps=3, step=step)) for step in range(4)] == [2, 2, 1, 1]
    assert chosen(fixed_quota, score, num_steps=2, status="gggNN") == [0, 0, 0, 1, 1]
    assert chosen(fixed_quota, score, num_steps=8, step=7, status="gNgNN") == [0, 0, 0, 0, 1]
    assert leftmost(candidates(score)).argsort(descending=True).tolist() == [0, 1, 2, 3, 4]


@given(score=st.lists(st.floats(0.15, 0.99), min_size=1, max_size=12), factor=st.floats(0.1, 3.0))
@settings(max_examples=40, deadline=None)
def test_the_factor_rule_equals_its_definition(score, factor):
    ordered = sorted(torch.tensor(score).tolist(), reverse=True)
    passing = [r for r in range(1, len(score) + 1) if candidates([ordered[r - 1]]).confidence >= 1 - factor / (r + 1)]
    assert sum(chosen(Factor(factor=factor), score)) == max(passing, default=1)


@given(score=st.lists(st.floats(0.15, 0.99), min_size=1, max_size=12), bound=st.floats(0.0, 5.0))
@settings(max_examples=40, deadline=None)
def test_the_entropy_bound_equals_its_definition(score, bound):
    entropy = sorted(candidates(score).proposal.entropy().tolist())
    allowed = [r for r in range(1, len(score) + 1) if sum(entropy[:r]) - max(entropy[:r]) <= bound]
    assert abs(sum(chosen(EntropyBound(bound=bound), score)) - max(allowed)) == 0
    strict = [r for r in range(1, len(score) + 1) if sum(entropy[:r]) < bound]
    assert sum(chosen(EntropyBound(bound=bound, has_all=True), score)) == max(strict, default=1)


def nothing(at):
    kind = torch.zeros_like(at.canvas.status)
    return Action(kind=kind, tokens=at.x_0, closes_block=torch.zeros(len(kind), dtype=torch.bool))


def test_an_edit_replaces_drafts_that_the_model_now_doubts():
    at = candidates([0.9, 0.9, 0.3, 0.9], status="DDDN", tokens=[7, 5, 5, 2])
    action = TokenEdit(threshold=0.5, max_post_steps=3)(nothing(at), at)
    assert (action.kind == Kind.EDIT)[0].int().tolist() == [0, 1, 0, 0]
    assert not action.closes_block.any()  # noise is left, and something was edited


@pytest.mark.parametrize(
    ("tokens", "since_filled", "closes"), [([7, 7], 0, True), ([7, 5], 0, False), ([7, 5], 2, True)]
)
def test_a_block_closes_when_a_pass_edits_nothing_or_the_passes_are_over(tokens, since_filled, closes):
    at = candidates([0.9, 0.9], status="DD", tokens=tokens, since_filled=since_filled)
    action = TokenEdit(threshold=0.5, max_post_steps=3)(nothing(at), at)
    assert action.closes_block.tolist() == [closes]


def canvas(*rows):
    """Rows as strings: p prompt, . noise, e a committed EOS."""
    tokens = [torch.tensor([{"e": 1}.get(c, 5) for c in row]) for row in rows]
    built = build_canvas(tokens, [torch.tensor([c in ".e" for c in row]) for row in rows], noise_token_id=2)
    is_eos = torch.zeros_like(built.is_noise)
    for i, row in enumerate(rows):
        is_eos[i, : len(row)] = torch.tensor([c == "e" for c in row])
    return built.place(is_eos, torch.ones_like(built.tokens), built.confidence)


def test_blocks_begin_at_each_rows_prompt_end():
    built = canvas("ppp....", "p....")
    assert Blocks(size=2).blocks(built.status)[0, 3:].tolist() == [0, 0, 1, 1]
    assert Blocks(size=2).blocks(built.status)[1, 1:5].tolist() == [0, 0, 1, 1]
    assert not Blocks().blocks(built.status).any()


def test_a_row_ends_at_an_eos_with_everything_before_it_decided():
    built = canvas("pe..", "p.e.", "pp..", "pee")
    assert EndOfSequence(eos_token_ids=(1,))(built, built).tolist() == [True, False, False, True]
    assert filled(built, built).tolist() == [False, False, False, True]


def test_an_eos_in_the_prompt_ends_nothing():
    built = build_canvas([torch.tensor([1, 5, 2])], [torch.tensor([False, False, True])], noise_token_id=2)
    assert EndOfSequence(eos_token_ids=(1,))(built, built).tolist() == [False]


@pytest.mark.parametrize("build", [lambda: TopK(k=0), lambda: Blocks(size=0)])
def test_mistakes_are_told(build):
    with pytest.raises(ValueError, match="must lie in .1, 1048576.; got 0"):
        build()


def test_a_temperature_falls_in_even_steps_and_stops_one_short_of_its_end():
    step = torch.arange(4)
    window = Window(
        is_open=torch.ones(4, 1, dtype=torch.bool), step=step, num_steps=torch.full_like(step, 4),
        block_size=torch.ones_like(step), steps_since_filled=torch.zeros_like(step), row_keys=step, age=step,
        where=step, rows=step, positions=torch.zeros_like(step), columns=torch.zeros(1, 1, dtype=torch.int64),
        opens_block=step == 0,
    )  # fmt: skip
    assert torch.allclose(LinearAnneal(start=0.8, end=0.4)(window), torch.tensor([0.8, 0.7, 0.6, 0.5]))
    for chosen_ in ({"start": 0.0}, {"end": -0.1}):
        with pytest.raises(ValueError, match="must be positive"):
            LinearAnneal(**chosen_)
