"""What the tests of the engine share: clients that collect what they are told."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from redraft.serving.engine import Engine
from redraft.serving.request import Delta, Request


def nothing():
    """Do nothing."""


@dataclass
class Client:
    """Collects the deltas of one request, as a client of the server would."""

    num_rows: int
    on_delta: object = nothing
    on_end: object = nothing
    deltas: list[Delta] = field(default_factory=list)
    is_done: threading.Event = field(default_factory=threading.Event)

    def deliver(self, news):
        self.deltas.extend(news)
        self.on_delta()
        if sum(delta.finish_reason is not None for delta in self.deltas) == self.num_rows:
            self.on_end()
            self.is_done.set()

    def wait(self):
        assert self.is_done.wait(60), "the engine did not answer"
        return self

    def of(self, index):
        return [delta for delta in self.deltas if delta.index == index]

    def tokens(self, index=0):
        return [token for delta in self.of(index) for token in delta.token_ids]

    def text(self, index=0):
        return "".join(delta.text for delta in self.of(index))

    def last(self, index=0):
        return self.of(index)[-1]


def check_served(client, expected):
    """A client has got what `generate` gives: tokens, text and counts."""
    for index, tokens in enumerate(expected.tokens):
        last = client.last(index)
        assert last.error is None
        assert client.tokens(index) == tokens.tolist()
        assert expected.texts is None or client.text(index) == expected.texts[index]
        assert last.usage.forwards == expected.forwards[index]
        assert last.usage.completion_tokens == len(tokens)


def send(engine, prepared, *, id="a", on_delta=nothing, on_end=nothing, **fields):
    client = Client(len(prepared.rows), on_delta, on_end)
    engine.submit(Request(id=id, prepared=prepared, deliver=client.deliver, **fields))
    return client


@contextmanager
def running(lm, **settings):
    engine = Engine(lm, **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.drain(0)
