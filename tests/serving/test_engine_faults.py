"""Faults of one request end it with an error; all other requests go on, and the engine never dies silently."""

from dataclasses import dataclass, replace

import pytest
import torch
from serving_tools import check_served, running, send
from tiny import tiny_lm

from redraft.models.denoiser import Denoiser
from redraft.sampling import policies as p

BAD = 13
"""Rows whose prompt has this token fail. The models do not write it in these tests."""
PROMPTS = ([5, 6, 7], [8, BAD], [5, 9], [4, 5, 6, 7, 8, 9, BAD], [6, 6, 6, 6, 6])


@pytest.fixture(params=[None, 4], ids=["full", "block-causal"])
def lm(request):
    return tiny_lm(block_size=request.param)


def served(engine, lm, **changes):
    """Serve all prompts at once, twice; return the clients of bad prompts. The others get what `generate` gives."""
    bad = []
    for _ in range(2):
        prepared = [lm.prepare([prompt], max_new_tokens=12, stop=None) for prompt in PROMPTS]
        prepared = [replace(one, sampler=replace(one.sampler, **changes)) for one in prepared]
        clients = [send(engine, one, id=str(i)) for i, one in enumerate(prepared)]
        for prompt, client in zip(PROMPTS, clients, strict=True):
            if BAD in prompt:
                bad.append(client.wait())
        for prompt, client in zip(PROMPTS, clients, strict=True):
            if BAD not in prompt:
                check_served(client.wait(), expected(lm, prompt))
    assert engine.is_alive
    return bad


def expected(lm, prompt):
    return lm.generate([prompt], max_new_tokens=12, stop=None)


@dataclass(frozen=True)
class Broken:
    """A policy that raises where it sees a row with one of these keys."""

    keys: tuple[int, ...]

    def __call__(self, score, candidates):
        if set(self.keys) & set(candidates.window.row_keys.tolist()):
            raise RuntimeError("this policy is broken")
        return p.Quota()(score, candidates)


def test_a_policy_that_raises_ends_its_own_row_alone(lm):
    keys = tuple(int(lm.prepare([prompt], max_new_tokens=12).row_keys) for prompt in PROMPTS if BAD in prompt)
    with running(lm, max_rows=5) as engine:
        bad = served(engine, lm, unmask=Broken(keys))
    assert [client.last().error for client in bad] == ["RuntimeError: this policy is broken"] * 4
    assert {client.last().finish_reason for client in bad} == {"error"}


def test_a_forward_that_raises_is_tried_row_by_row(lm, monkeypatch):
    call = Denoiser.__call__

    def broken(self, query):
        if (query.input_ids == BAD).any() and len(query.input_ids) > 0:
            raise RuntimeError("no kernel for this")
        return call(self, query)

    monkeypatch.setattr(Denoiser, "__call__", broken)
    with running(lm, max_rows=5, chunk=4) as engine:
        bad = served(engine, lm)
    assert [client.last().error for client in bad] == ["RuntimeError: no kernel for this"] * 4


def test_logits_that_are_nan_end_their_row_and_leave_nothing_behind(lm):
    head = lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer that of the embeddings
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[BAD] = torch.nan
    with running(lm, max_rows=5, chunk=4) as engine:
        bad = served(engine, lm)
        assert all("holds NaN or infinity" in client.last().error for client in bad)
        assert all(states.isfinite().all() for batch in engine._batches.values() for forward in batch._forwards.values()
                   for pair in forward.slots.layers for states in pair)  # fmt: skip


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_want_of_memory_halves_the_rows_and_loses_nothing(lm, monkeypatch, error):
    call = Denoiser.__call__

    def small(self, query):
        if len(query.input_ids) > 2:
            raise error
        return call(self, query)

    monkeypatch.setattr(Denoiser, "__call__", small)
    prompts = [prompt for prompt in PROMPTS if len(prompt) != 2]
    with running(lm, max_rows=5, chunk=4) as engine:
        clients = [
            send(engine, lm.prepare([prompt], max_new_tokens=12, stop=None), id=str(i))
            for i, prompt in enumerate(prompts)
        ]
        for prompt, client in zip(prompts, clients, strict=True):
            check_served(client.wait(), expected(lm, prompt))
        assert engine.stats()["max_rows"] <= 2


def test_a_row_that_fits_no_memory_ends_with_an_error(lm, monkeypatch):
    def full(self, query):
        raise MemoryError

    with running(lm) as engine:
        monkeypatch.setattr(Denoiser, "__call__", full)
        client = send(engine, lm.prepare([[5]], max_new_tokens=4)).wait()
        monkeypatch.undo()
        assert client.last().error == "MemoryError: "
        check_served(send(engine, lm.prepare([[5]], max_new_tokens=4)).wait(), lm.generate([[5]], max_new_tokens=4))


def test_a_client_that_cannot_be_told_is_forgotten(lm):
    def gone():
        raise RuntimeError("the loop is closed")

    with running(lm) as engine:
        send(engine, lm.prepare([[5]], max_new_tokens=12), on_delta=gone)
        check_served(
            send(engine, lm.prepare([[6]], max_new_tokens=4), id="b").wait(), lm.generate([[6]], max_new_tokens=4)
        )
        assert engine.stats()["undelivered"] >= 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_tells_everybody(lm, monkeypatch):
    with running(lm, max_rows=1) as engine:
        monkeypatch.setattr(engine, "_tick", lambda: 1 / 0)
        clients = [send(engine, lm.prepare([[5]], max_new_tokens=4), id=str(i)) for i in range(1)]
        assert clients[0].wait().last().error == "the engine has failed: ZeroDivisionError."
        engine._thread.join(10)
        assert not engine.is_alive
