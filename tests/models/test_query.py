"""Queries over slots of keys and values, against forwards of whole rows."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Barrier, BrokenBarrierError

import pytest
import torch
from tiny import tiny_lm

from redraft.layouts import Layout
from redraft.models.cache import Slots, SlotSpans
from redraft.models.query import Query

CPU, SIZE, LENGTHS = torch.device("cpu"), 4, (16, 8, 12)


@pytest.fixture(params=[False, True], ids=["plain", "shifted"])
def denoiser(request):
    return tiny_lm(shift_logits=request.param, scale=4.0).denoiser


def draw(*shape, seed=0):
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


def feed(denoiser, slots, ids, *, starts, ends, **chosen):
    """Feed a span of each row; return the logits of all that is fed, (row, query, vocabulary)."""
    spans = SlotSpans(starts=starts, ends=ends, key_ends=ends, reads_all=False)
    positions = spans.positions(CPU)
    query = Query.everywhere(
        ids.gather(1, positions), layout=Layout(block_size=SIZE), shift=False, view=slots.view(spans, CPU, **chosen)
    )
    with torch.no_grad():
        return denoiser(query).view(*positions.shape, -1)


def whole(denoiser, ids, length):
    with torch.no_grad():
        return denoiser.logits(ids[None, :length], layout=Layout(block_size=SIZE), shift=False)[0]


@pytest.mark.parametrize(
    ("chosen", "others"),
    [({}, [3, 4, 5]), ({"first": 2}, [0, 1, 5]), ({"rows": [4, 1, 3]}, [0, 2, 5]), ({"is_static": True}, [3, 4, 5])],
    ids=["all", "later", "any", "static"],
)
def test_logits_over_slots_are_those_of_whole_rows(denoiser, chosen, others):
    ids, slots = draw(3, 16), Slots(6, 16)
    expected = [whole(denoiser, row, length) for row, length in zip(ids, LENGTHS, strict=True)]
    for start in range(0, 16, SIZE):  # a row that is done feeds its last block again
        ends = [min(start + SIZE, length) for length in LENGTHS]
        starts = [end - SIZE for end in ends]
        found = feed(denoiser, slots, ids, starts=starts, ends=ends, **chosen)
        for row in range(3):
            assert (found[row] - expected[row][starts[row] : ends[row]]).abs().max() < 1e-10
    assert not any(states[others].any() for pair in slots.layers for states in pair)


def test_spans_of_unequal_length_write_into_no_others_slots(denoiser):
    ids, slots = draw(3, 16), Slots(3, 16)
    feed(denoiser, slots, ids, starts=[0, 0, 0], ends=[12, 4, 8])
    before = [[states.clone() for states in pair] for pair in slots.layers]
    starts, ends = [12, 4, 8], [16, 8, 8]  # the last row feeds nothing
    found = feed(denoiser, slots, ids, starts=starts, ends=ends)
    for row in (0, 1):
        expected = whole(denoiser, ids[row], ends[row])[starts[row] :]
        assert (found[row] - expected).abs().max() < 1e-10
    is_fed = (torch.arange(17) >= torch.tensor(starts)[:, None]) & (torch.arange(17) < torch.tensor(ends)[:, None])
    is_fed[:, 16] = True  # the spare slot
    for pair, old in zip(slots.layers, before, strict=True):
        for states, was in zip(pair, old, strict=True):
            moved = (states != was).any(dim=3).any(dim=1)
            assert not (moved & ~is_fed).any()
            assert moved[0, 12:16].all()


def test_a_shift_counts_from_what_is_fed(denoiser):
    """The first position of a row has no neighbour; any other's must be fed."""
    ids, slots = draw(1, 8), Slots(1, 8)
    feed(denoiser, slots, ids, starts=[0], ends=[4])
    spans = SlotSpans(starts=[3], ends=[8], key_ends=[8], reads_all=False)
    query = Query(
        input_ids=ids[:, 3:], where=torch.arange(1, 5), positions=torch.arange(3, 8)[None],
        layout=Layout(block_size=SIZE), view=slots.view(spans, CPU),
    )  # fmt: skip
    with torch.no_grad():
        expected = denoiser.logits(ids, layout=Layout(block_size=SIZE))
        assert (denoiser(query) - expected[0, 4:]).abs().max() < 1e-10
        first = Query(
            input_ids=ids[:, :4], where=torch.arange(4), positions=torch.arange(4)[None],
            layout=Layout(block_size=SIZE),
            view=slots.view(SlotSpans(starts=[0], ends=[4], key_ends=[4], reads_all=True), CPU),
        )  # fmt: skip
        assert (denoiser(first) - expected[0, :4]).abs().max() < 1e-10


def test_forwards_of_a_compiled_model_go_one_at_a_time():
    """What is run without compiling sets torch's stance for the whole process, and another thread's must not see it."""
    lm, ids, slots, met = tiny_lm(), draw(2, 4), Slots(2, 4), Barrier(2)
    denoiser, stances = replace(lm.denoiser, is_compiled=True), []

    def wait(*_):
        with suppress(BrokenBarrierError):
            met.wait(timeout=0.3)
        stances.append(torch._dynamo.eval_frame._stance.stance)

    lm.model.base_model.layers[0].register_forward_hook(wait)
    ask = partial(feed, denoiser, slots, starts=[0], ends=[4])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda row: ask(ids[row : row + 1], first=row), range(2)))
    assert met.broken  # nobody met inside
    assert stances == ["force_eager", "force_eager"]
    assert torch._dynamo.eval_frame._stance.stance == "default"
    for row, logits in zip(ids, found, strict=True):
        assert (logits[0] - whole(lm.denoiser, row, 4)).abs().max() < 1e-10


def test_a_position_fed_twice_gives_each_copy_what_it_gets_alone(denoiser):
    """A clean block, then two drafts of the next one, each of which sees the clean block and itself."""
    clean, drafts = draw(4), draw(2, 4, seed=1)
    slots = Slots(1, 16)
    copy = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    position = torch.cat([torch.arange(4), torch.arange(4, 8), torch.arange(4, 8)])
    spans = SlotSpans(starts=[0], ends=[12], key_ends=[12], reads_all=False)
    query = Query.everywhere(
        torch.cat([clean, *drafts])[None], positions=position[None], shift=False, view=slots.view(spans, CPU),
        sees=((copy == 0) | (copy[:, None] == copy))[None], slot_positions=position[None],
    )  # fmt: skip
    with torch.no_grad():
        found = denoiser(query)
    for draft, logits in zip(drafts, (found[4:8], found[8:]), strict=True):
        expected = whole(denoiser, torch.cat([clean, draft]), 8)
        assert (logits - expected[4:]).abs().max() < 1e-10
    with torch.no_grad():  # the test can fail
        assert (denoiser(replace(query, sees=torch.ones(1, 12, 12).bool())) - found)[4:].abs().max() > 1e-3


def test_room_that_is_reserved_keeps_what_is_there_and_a_row_can_be_copied(denoiser):
    ids, slots = draw(2, 16), Slots(2, 8)
    feed(denoiser, slots, ids, starts=[0, 0], ends=[8, 8])
    slots.reserve(1, 4)
    assert (slots.num_rows, slots.num_positions) == (2, 8)
    slots.reserve(4, 16)
    assert (slots.num_rows, slots.num_positions) == (4, 16)
    slots.copy(1, 3, 8)
    found = feed(denoiser, slots, ids[[0, 1, 1]], starts=[8] * 3, ends=[16] * 3, rows=[0, 1, 3])
    for row, logits in zip((0, 1, 1), found, strict=True):
        assert (logits - whole(denoiser, ids[row], 16)[8:]).abs().max() < 1e-10
