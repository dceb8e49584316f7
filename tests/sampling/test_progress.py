"""Every generation ends: a policy that makes no progress is named."""

from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from tiny import tiny_lm

from redraft.sampling import policies as p
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Canvas, Status, build_canvas
from redraft.sampling.sampler import Sampler

LENGTH, MASK = 8, 2


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def steps_of(lm, sampler, prompts=((5, 6), (7,))):
    """Denoise eight tokens behind each prompt."""
    rows = [torch.tensor([*prompt] + [0] * LENGTH) for prompt in prompts]
    is_noise = [torch.arange(len(row)) >= len(row) - LENGTH for row in rows]
    canvas = build_canvas(rows, is_noise, noise_token_id=MASK)
    return denoise(lm.denoiser, canvas, sampler, row_keys=torch.arange(len(rows)))


def nothing(canvas):
    return torch.zeros_like(canvas.is_noise)


class Never:
    """A stop, an unmask or a revise that never says yes."""

    looks_at_drafts = False
    needs_all_steps = False

    def __call__(self, *args):
        if isinstance(args[0], Canvas):
            return nothing(args[0])[:, 0]
        score_or_action, candidates = args
        return score_or_action if isinstance(score_or_action, p.Action) else nothing(candidates.canvas)


@dataclass(frozen=True)
class ClosesNothing(Never):
    in_flight: int = 0

    def blocks(self, status):
        return torch.zeros_like(status, dtype=torch.int64)


class OnlyTheFirstRow(Never):
    def __call__(self, score, candidates):
        return candidates.is_open_noise & (candidates.window.row_keys == 0)[:, None]


class Closed:
    """Commits what is not open."""

    def __call__(self, score, candidates):
        return ~candidates.is_open_noise


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"stop": Never()}, "Never makes no progress in row 0: everything is decided, and it is not done"),
        ({"unmask": Never()}, "Never makes no progress in row 0: noise is left after a block's last step"),
        ({"unmask": OnlyTheFirstRow()}, "OnlyTheFirstRow makes no progress in row 1: noise is left"),
        ({"unmask": Closed()}, "Closed makes no progress in row 0: noise is left"),
        ({"unmask": lambda score, candidates: score < 0}, "<lambda> makes no progress in row 0: noise is left"),
        ({"revise": Never()}, "Never makes no progress in row 0: a block stays open after its last step"),
        ({"frontier": ClosesNothing()}, "ClosesNothing makes no progress in row 0: no block is open"),
        ({"unmask": Never(), "frontier": p.Blocks(size=4), "steps_per_block": 3}, "Never makes no progress"),
    ],
)
def test_a_policy_that_makes_no_progress_is_named(lm, policies, message):
    with pytest.raises(ValueError, match=message):
        list(islice(steps_of(lm, Sampler(**{"steps": 4} | policies)), 20))


@dataclass(frozen=True)
class Reopens:
    """Makes noise of everything that was placed."""

    of: str
    looks_at_drafts: bool = True
    needs_all_steps: bool = False

    def __call__(self, action, candidates):
        where = action.kind == p.Kind.SET if self.of == "committed" else candidates.is_open_draft
        return action.with_kind(p.Kind.REOPEN, where)


@dataclass(frozen=True)
class EditsForEver(Reopens):
    def __call__(self, action, candidates):
        flipped = torch.where(candidates.canvas.tokens == 5, 6, 5)
        return replace(action.with_kind(p.Kind.EDIT, candidates.is_open_draft), tokens=flipped)


@pytest.mark.parametrize(
    "revise", [Reopens("committed"), Reopens("drafts"), EditsForEver("drafts")], ids=["at once", "later", "edits"]
)
def test_revisions_that_never_end_are_ended(lm, revise, monkeypatch):
    monkeypatch.setattr("redraft.sampling.rows.MAX_POST_STEPS", 30)
    sampler = Sampler(steps=2, unmask=p.TopK(k=3), revise=revise)
    with pytest.raises(ValueError, match=f"{type(revise).__name__} makes no progress in row 0: a block stays open"):
        list(islice(steps_of(lm, sampler), 50))


@pytest.mark.parametrize("kind", [kind for kind in p.Kind if kind != p.Kind.KEEP])
def test_what_is_decided_stays_decided_whatever_a_revision_asks(lm, kind):
    @dataclass(frozen=True)
    class ChangesAll:
        looks_at_drafts: bool = False
        needs_all_steps: bool = False

        def __call__(self, action, candidates):
            is_fixed = ~candidates.is_open_draft & (action.kind == p.Kind.KEEP)
            seven = torch.full_like(action.tokens, 7)
            closes_block = torch.ones_like(action.closes_block)
            return replace(action.with_kind(kind, is_fixed), closes_block=closes_block, noise=seven)

    sampler = Sampler(steps=4, frontier=p.Blocks(size=4), revise=ChangesAll())
    *_, last = steps_of(lm, sampler, prompts=[(5, 6)])
    assert last.canvas.tokens[0, :2].tolist() == [5, 6]
    assert last.canvas.status[0].tolist() == [Status.GIVEN] * 2 + [Status.COMMITTED] * LENGTH


def test_steps_that_change_nothing_are_allowed_while_the_clock_runs(lm):
    index = [int(step.age[0]) for step in steps_of(lm, Sampler(steps=40, unmask=p.at_the_end))]
    assert index == list(range(40))
