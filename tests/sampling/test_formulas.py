"""Scores, clocks, budgets and revisions against their formulas, worked out by hand or over thousands of draws."""

import math

import pytest
import torch
from tiny import tiny_lm

from redraft.sampling import policies as p
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Canvas, Status, build_canvas
from redraft.sampling.guidance import Reward
from redraft.sampling.propose import propose
from redraft.sampling.sampler import Sampler

MASK, TOKEN, VOCAB = 2, 7, 10
STATES = {"N": Status.NOISE, "D": Status.DRAFT, "c": Status.COMMITTED}


def candidates(probability, *, status=None, tokens=None, placed=None, step=0, num_steps=1, rows=1):
    """Equal rows that draw apart; their proposals are token 7 with these probabilities."""
    size = len(probability)
    status = torch.tensor([[int(STATES[s]) for s in status or "N" * size]] * rows, dtype=torch.uint8)
    tokens = torch.full((rows, size), MASK) if tokens is None else torch.tensor([tokens] * rows)
    confidence = torch.zeros(rows, size) if placed is None else torch.tensor([placed] * rows)
    canvas = Canvas(tokens=tokens, status=status, confidence=confidence)
    is_open = canvas.is_noise | canvas.is_draft
    where = is_open.flatten().nonzero()[:, 0]
    sure = torch.tensor([probability] * rows).flatten()[where]
    logits = ((1 - sure) / (VOCAB - 1))[:, None].expand(-1, VOCAB).log()
    logits = logits.scatter(1, torch.full((len(where), 1), TOKEN), sure.log()[:, None])
    number = torch.zeros(rows, dtype=torch.int64)
    return p.Candidates(
        canvas=canvas,
        window=p.Window(
            is_open=is_open, step=number + step, num_steps=number + num_steps, block_size=number + size,
            steps_since_filled=number, row_keys=torch.arange(rows), age=number + step, where=where,
            rows=where // size, positions=where % size, columns=torch.arange(size)[None],
            opens_block=number == 0,
        ),
        proposal=propose(logits, never=None),
        previous=torch.full_like(tokens, -1),
    )  # fmt: skip


def setting(is_set, at):
    return p.Action(kind=is_set.to(torch.uint8), tokens=at.x_0, closes_block=torch.zeros_like(is_set[:, 0]))


def test_perturbed_scores_draw_without_replacement_by_their_softmax():
    """P(first = i) = softmax(score / T)_i, and P(i, then j) = p_i p_j / (1 - p_i)."""
    rows, temperature = 20_000, 0.2
    at = candidates([0.7, 0.5, 0.3], rows=rows)
    score = at.spread(p.GumbelScore(score=p.confidence, temperature=temperature)(at))
    share = (torch.tensor([0.7, 0.5, 0.3]) / temperature).softmax(dim=0)
    first, second = score.argsort(dim=1, descending=True)[:, :2].unbind(dim=1)
    for i in range(3):
        assert abs(float((first == i).float().mean()) - share[i]) < 0.015
        for j in {0, 1, 2} - {i}:
            expected = share[i] * share[j] / (1 - share[i])
            assert abs(float(((first == i) & (second == j)).float().mean()) - expected) < 0.015


def steps_of(lm, sampler, *, prompts=((5,),), length=12):
    rows = [torch.tensor([*prompt] + [0] * length) for prompt in prompts]
    is_noise = [torch.arange(len(row)) >= len(row) - length for row in rows]
    canvas = build_canvas(rows, is_noise, noise_token_id=MASK)
    return list(denoise(lm.denoiser, canvas, sampler, row_keys=torch.arange(len(rows))))


class Watch:
    """Commits one token and notes which positions were open."""

    def __init__(self):
        self.seen = []

    def __call__(self, score, candidates):
        self.seen.append(candidates.window.columns[0, candidates.window.is_open[0]].tolist())
        leftmost = -candidates.window.columns.expand_as(score).float()
        return p.best(leftmost, candidates, torch.ones_like(candidates.window.step))


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_as_many_blocks_are_open_as_are_in_flight(in_flight):
    watch = Watch()
    steps_of(tiny_lm(), Sampler(frontier=p.Blocks(size=3, in_flight=in_flight), unmask=watch))
    for step, positions in enumerate(watch.seen):  # one token a step, from left to right
        end = min(12, 3 * (step // 3 + in_flight))
        assert positions == list(range(1 + step, 1 + end))


def test_a_budget_shares_what_is_left_over_the_forwards_left_rounded_up():
    steps = steps_of(tiny_lm(), Sampler(unmask=p.TopK(k=1), forwards=5))
    assert [int(step.is_committed.sum()) for step in steps] == [3, 3, 2, 2, 2]


def test_forwards_are_shared_by_the_blocks_that_run_by_a_clock():
    both = p.Rerank()
    sampler = Sampler(frontier=p.Blocks(size=4), unmask=both.unmask, revise=both, forwards=8)
    filled = [
        int((step.canvas.status[0] == Status.COMMITTED).sum()) for step in steps_of(tiny_lm(), sampler, length=16)
    ]
    assert filled == [0, 4, 4, 8, 8, 12, 12, 16]


def share(flags):
    return flags.float().mean(dim=0).tolist()


def test_loop_remasking_happens_while_alpha_rests_and_commits_at_its_pace():
    """t_on = 0.55, t_off = 0.05, alpha(t_on) = 0.9: sigma is min(eta, (1 - 0.9) / 0.9) in between and 0 elsewhere."""
    both = p.Remasking(kind="loop", eta=0.08)
    cases = {  # step of 100 (t = 1 - step / 100, s = t - 0.01): P(draft is reopened), P(noise is committed)
        20: (0.0, (0.42 - 0.4) / (1 - 0.4)),  # alpha = (1 - t) / 0.45 * 0.9
        60: (0.08, (0.9 - 0.92 * 0.9) / 0.1),
        97: (0.0, (0.96 - 0.94) / (1 - 0.94)),  # alpha = 1 - t / 0.05 * 0.1
        99: (0.0, 1.0),
    }
    for step, (reopened, committed) in cases.items():
        at = candidates([0.5, 0.5], status="ND", tokens=[MASK, 5], step=step, num_steps=100, rows=20_000)
        is_committed = both.unmask(at.confidence, at)
        is_reopened = both(setting(is_committed, at), at).kind == p.Kind.REOPEN
        assert abs(share(is_committed)[0] - committed) < 0.012
        assert abs(share(is_reopened)[1] - reopened) < 0.012
        assert not is_reopened[:, 0].any()


def test_conf_remasking_shares_the_bound_by_the_softmax_of_minus_the_confidence_when_placed():
    """sigma_i = (1 - alpha_s) / alpha_t * softmax(-confidence)_i; at t = 0.4, s = 0.3: 0.3 / 0.6 = 0.5."""
    placed = [0.0, 0.1, 0.9]
    both = p.Remasking(kind="conf")
    at = candidates([0.5] * 3, status="NDD", tokens=[MASK, 5, 5], placed=placed, step=6, num_steps=10, rows=20_000)
    action = both(setting(at.is_open_noise & False, at), at)
    weights = torch.tensor([-0.1, -0.9]).softmax(dim=0)
    expected = [0.0, 0.5 * float(weights[0]), 0.5 * float(weights[1])]
    assert share(action.kind == p.Kind.REOPEN) == pytest.approx(expected, abs=0.012)
    assert share(both.unmask(at.confidence, at)) == pytest.approx([(0.7 - 0.6) / (1 - 0.6), 0.0, 0.0], abs=0.012)


def test_a_placed_token_is_kept_by_the_probability_that_it_has_now():
    """Of four tokens two stay (alpha_s = 0.5): drafts are worth their own probability, noise its proposal's."""
    both = p.Rerank()
    chances = [0.9, 0.6, 0.8, 0.5]  # of token 7; another token has (1 - chance) / 9
    at = candidates(chances, status="DDNN", tokens=[5, TOKEN, MASK, MASK], placed=[0.99, 0.1, 0, 0], num_steps=2)
    assert both.unmask(at.confidence, at)[0].tolist() == [False, False, True, False]
    action = both(setting(at.is_open_noise & False, at), at)
    assert (action.kind == p.Kind.REOPEN)[0].tolist() == [True, False, False, False]


def test_a_rewarded_draw_has_log_p_plus_strength_times_reward():
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    row = build_canvas([torch.tensor([1, 0])], [torch.tensor([False, True])], noise_token_id=0)
    liked = Reward(reward=lambda rows: (rows[:, 1] == 2).float(), strength=1.5, top_k=3)
    guided = liked(log_p[None] + 4.0, row, torch.tensor([1]))[0].softmax(dim=0)
    weights = torch.tensor([0.5, 0.3, 0.15 * math.exp(1.5), 0.0])
    assert torch.allclose(guided, weights / weights.sum())
