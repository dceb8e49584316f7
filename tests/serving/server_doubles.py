"""A server in a thread, and a stand-in for its engine that keeps the contract of `Engine` and runs no model."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field

from redraft.cli.serve import listen
from redraft.sampling.canvas import Status
from redraft.serving.app import DrainingServer, Service
from redraft.serving.request import Delta, Draft, DraftToken, Draining, Full, TokenLogprob, Usage

ANSWER = "the answer is forty two, and that is all there is to say about it"


@dataclass
class FakeEngine:
    """Writes `answer` token by token, `per_tick` of them every `tick_seconds`, once it is not `is_held`."""

    tokenizer: object
    answer: str = ANSWER
    per_tick: int = 4
    tick_seconds: float = 0.0
    max_running: int = 64
    is_held: bool = False
    fails_with: str | None = None
    is_alive: bool = True
    is_draining: bool = False
    requests: list = field(default_factory=list)
    cancelled: list = field(default_factory=list)
    threads: list = field(default_factory=list)
    ends: float | None = None

    def submit(self, request):
        if self.is_draining:
            raise Draining
        if sum(thread.is_alive() for thread in self.threads) >= self.max_running:
            raise Full(7)
        self.requests.append(request)
        self.threads.append(threading.Thread(target=self._run, args=[request], daemon=True))
        self.threads[-1].start()

    def cancel(self, id):
        self.cancelled.append(id)

    def drain(self, grace):
        self.is_draining, self.ends = True, time.monotonic() + grace
        for thread in self.threads:
            thread.join()

    def stats(self):
        return {"rows_running": len(self.requests), "ticks": 3}

    def _run(self, request):
        config = request.prepared.config
        if request.prepared.is_infilling:
            mask = self.tokenizer.mask_token_id
            ids = [self.tokenizer.encode("x")[0]] * int((request.prepared.rows[0] == mask).sum())
        else:
            ids = self.tokenizer.encode(self.answer, add_special_tokens=False)[: config.max_new_tokens]
        for done in range(self.per_tick, len(ids) + self.per_tick, self.per_tick):
            while self.is_held and request.id not in self.cancelled and self.ends is None:
                time.sleep(0.002)
            time.sleep(self.tick_seconds)
            if request.id in self.cancelled:
                return
            if self.fails_with or (self.ends is not None and time.monotonic() > self.ends):
                error = self.fails_with or "the server is shutting down."
                request.deliver([Delta(index=0, finish_reason="error", error=error)])
                return
            new, is_last = ids[done - self.per_tick : done], done >= len(ids)
            end = ("length" if len(ids) == config.max_new_tokens else "stop") if is_last else None
            request.deliver([self._delta(request, i, new, ids, done, end) for i in range(len(request.prepared.rows))])

    def _delta(self, request, index, new, ids, done, end):
        prepared, top = request.prepared, request.top_logprobs
        before = int((prepared.canvas.status[index] == Status.GIVEN).sum())
        tokens = tuple(DraftToken(one, self.tokenizer.decode([one]), "draft", 0.5) for one in ids[done:])
        tops = tuple((one, -1.0 - i) for i, one in enumerate(range(3, 3 + (top or 0))))
        return Delta(
            index=index,
            token_ids=tuple(new),
            text="" if prepared.is_infilling else self.tokenizer.decode(new),
            logprobs=None if top is None else tuple(TokenLogprob(token_id=t, logprob=-0.5, top=tops) for t in new),
            draft=Draft(revision=done, start=done, end=len(ids), tokens=tokens) if request.wants_drafts else None,
            finish_reason=end,
            usage=Usage(
                prompt_tokens=before,
                completion_tokens=min(done, len(ids)),
                forwards=done // self.per_tick,
                query_tokens=done,
            ),
        )


@contextmanager
def started(backend, *, grace=5.0, **options):
    """Run a server, and yield it with its address; `backend` may be a function that makes one."""
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # a client that reads nothing is noticed soon
    service = Service(backend if callable(backend) else lambda: backend, **options)
    server = DrainingServer(service, grace=grace)
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if thread.is_alive():
            for _ in range(2):
                service.loop.call_soon_threadsafe(server.end)
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(backend, **options):
    """Run a server until it has loaded, and yield it."""
    with started(backend, **options) as server:
        while not (server.service.backend or server.service.failure):
            time.sleep(0.005)
        yield server


@contextmanager
def connected(server, body=b"", *, length=None, headers="", path="/v1/completions"):
    """Open a connection, send a request, and yield the socket."""
    host, port = server.url.removeprefix("http://").split(":")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = headers or f"content-length: {len(data) if length is None else length}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.settimeout(20)
        client.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{size}\r\n"
        client.sendall(head.encode() + data)
        yield client


def wait_for(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)


def call(server, path, body=None, *, raw=None, **headers):
    """Send a request, and return the status, the body as JSON (or bytes), and the headers."""
    data = raw if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data=data, headers=given)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text, kind = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            status, text, kind = error.code, error.read(), error.headers
    return status, json.loads(text) if kind.get_content_type() == "application/json" else text, kind
