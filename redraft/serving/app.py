"""The HTTP side of the server: routes, keys, limits, streams of events, disconnects, and its end. No torch."""

import asyncio
import base64
import functools
import hashlib
import hmac
import json
import logging
import math
import os
import re
import signal
import threading
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from redraft.constraints.kinds import JsonSchema
from redraft.prompts import encode_as_text, text_after
from redraft.serving import api
from redraft.serving.api import ApiError, Call, Reply, parse_json, read_call, read_messages, retry_later, server_error
from redraft.serving.compiling import Compiler, LimitedConstraint
from redraft.serving.metrics import Metrics
from redraft.serving.request import Delta, Draining, Full, Request, Usage

if TYPE_CHECKING:
    from redraft.language_model import LanguageModel, Prepared

log = logging.getLogger("redraft.serving")
MAX_BODY_BYTES = 4 << 20
MAX_READ_BYTES = 64 << 20
"""Of a larger body so much is read and dropped: a client that is still sending would not see why it is refused."""
BODY_SECONDS = 30.0
SEND_SECONDS = 60.0
"""A client that reads nothing for so long is gone."""
REQUEST_SECONDS = 600.0
"""Longest time of a request; then it ends with what is decided."""
PING_SECONDS = 15.0
END_SECONDS = 5.0
"""What streams get to send their last events when the server ends."""
SECOND_SECONDS = 1.0
"""What they get after a second signal."""
MAX_OPEN = 2048
"""Requests that are open at once, those included whose bodies are being read."""
MAX_HEADER_BYTES = 64 << 10
_ID = re.compile(r"[!-~]{1,128}")
_OPEN = {"health", "ready", "page"}
"""Endpoints that need no key: they tell nothing, and probes and browsers send none."""


_FAILED = server_error("the server failed on this request.")
_STOPPED = "the engine has stopped; the server must be started again."


class ClientGone(Exception):  # noqa: N818
    """The client has closed the connection, or reads nothing."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What answers: an engine, and its models by name. The first is the base; the others are it with an adapter."""

    engine: Any
    models: Mapping[str, "LanguageModel"]
    max_model_len: int | None = None
    compiler: Compiler | None = None

    @property
    def base(self) -> str:
        return next(iter(self.models))

    def prepare(self, call: Call, lm: "LanguageModel") -> "Prepared":
        """Tokenize and check: what can be refused is refused before it is queued."""
        constraint = call.constraint
        if constraint is not None and self.compiler is not None:
            constraint = LimitedConstraint(constraint=constraint, compiler=self.compiler)
        prompts, holes = call.prompts, call.endpoint == "infill" or bool(call.suffix)
        for prompt in prompts:
            api.check_size(prompt, self.max_model_len)
        if holes:
            prompts = [self._with_holes(call, lm)]
        try:
            return lm.prepare(prompts, constraint=constraint, holes=holes, **call.settings)
        except ValueError as error:
            message = str(error).replace("max_new_tokens", _length_of(call)).replace("num_samples", "n")
            raise ApiError(message[:2000], param=_param_of(str(error), call)) from error

    def _with_holes(self, call: Call, lm: "LanguageModel") -> list[int]:
        """Lay out token ids and masks. A mask token that is spelled in a text is text, no hole."""
        tokenizer, settings = lm.tokenizer, lm.denoiser.settings
        segments = call.prompts[0]
        if call.endpoint == "completions":
            if settings.block_size is not None:
                problem = "this model decodes blocks from left to right: they cannot see a suffix. Leave it out."
                raise ApiError(problem, param="suffix")
            length = api.checked("max_tokens", functools.partial(lm.sampling_config, **call.settings)).max_new_tokens
            segments = [call.prompts[0], length, call.suffix]
        ids: list[int] = []
        for i, segment in enumerate(segments):
            if isinstance(segment, int):
                ids += [settings.mask_token_id] * segment
            else:
                is_text = isinstance(segment, str)
                ids += encode_as_text(tokenizer, segment, is_inside=i > 0).tolist() if is_text else segment
            if len(ids) > (self.max_model_len or len(ids)):
                raise ApiError(f"the text must have at most {self.max_model_len} tokens, its holes included.")
        if call.endpoint == "completions" and ids.count(settings.mask_token_id) > segments[1]:
            raise ApiError("a prompt with a suffix must not hold mask tokens.", param="prompt")
        return ids


def _length_of(call: Call) -> str:
    return "max_completion_tokens" if call.endpoint == "chat" else "max_tokens"


def _param_of(message: str, call: Call) -> str | None:
    """Name the field that an error of the sampler is about."""
    first = message.split(" ", 1)[0]
    names = {"max_new_tokens": _length_of(call), "num_samples": "n", "temperature": "temperature", "top_p": "top_p"}
    if first in call.settings and first not in names:
        return f"redraft.{first}"
    if first in names or call.constraint is None:
        return names.get(first)
    if call.endpoint == "infill":
        return "constraint"
    return "response_format" if isinstance(call.constraint, JsonSchema) else "redraft"


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One HTTP request: what it asks, its id, and whose it is."""

    endpoint: str
    id: str
    key: str


class Outbox:
    """Carries deltas from the engine's thread to the event loop, with one wake-up for all requests of a tick."""

    def __init__(self) -> None:
        self._loop, self._lock = asyncio.get_running_loop(), threading.Lock()
        self._waiting: list[tuple[Inbox, Sequence[Delta]]] = []

    def put(self, inbox: "Inbox", deltas: Sequence[Delta]) -> None:
        """Add deltas. Called by the engine."""
        with self._lock:
            self._waiting.append((inbox, deltas))
            is_first = len(self._waiting) == 1
        if is_first:
            with suppress(RuntimeError):  # the loop has ended, and with it all clients
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for inbox, deltas in waiting:
            inbox.put(deltas)


class Inbox:
    """Deltas of one request that its client has not been told. Its size is bounded by the length of the answer."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._event = asyncio.Event()

    def put(self, deltas: Sequence[Delta]) -> None:
        drafted = {delta.index for delta in deltas if delta.draft is not None}
        if drafted:  # the latest draft replaces those that a slow reader has not seen
            self._deltas = [replace(one, draft=None) if one.index in drafted else one for one in self._deltas]
        self._deltas += deltas
        self._event.set()

    async def take(self, seconds: float) -> list[Delta]:
        """Wait for deltas; none come back after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()
        deltas, self._deltas = self._deltas, []
        return deltas


@dataclass(kw_only=True)
class Flight:
    """A request in the engine."""

    id: str
    visit: Visit
    inbox: Inbox
    reply: Reply
    started: float
    has_text: bool = False


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """Await work; when the client disconnects, cancel it and raise ClientGone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events; the stream ends with its client, and `leave` is called however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], leave: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        finally:
            self._leave()
            await self._events.aclose()


async def read_body(request: HttpRequest) -> bytes:
    """Read a body of limited size in limited time. Raises ApiError."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("the content type must be application/json.", status=415)
    length = request.headers.get("content-length", "0")
    close = {"Connection": "close"}
    too_large = ApiError(f"the body must have at most {MAX_BODY_BYTES >> 20} MiB.", status=413, headers=close)
    if length.isdecimal() and int(length[:20]) > (MAX_BODY_BYTES if "expect" in request.headers else MAX_READ_BYTES):
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= MAX_BODY_BYTES:
                    body += piece
                elif size > MAX_READ_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(f"the body must arrive within {BODY_SECONDS:g} s.", status=408, headers=close) from error
    except ClientDisconnect as error:
        raise ClientGone from error
    if size > MAX_BODY_BYTES:
        raise too_large
    return bytes(body)


def _texts_of_holes(call: Call, lm: "LanguageModel", prepared: "Prepared", token_ids: list[int]) -> list[str]:
    """Decode what fills each hole, as it stands after the tokens before it."""
    row = prepared.rows[0].tolist()
    places = [i for i, token in enumerate(row) if token == lm.denoiser.settings.mask_token_id]
    if len(token_ids) < len(places):
        raise ApiError("the time ended before all holes were filled; allow more.", status=504, kind="server_error")
    for place, token in zip(places, token_ids, strict=True):
        row[place] = token
    sizes = [one for one in call.prompts[0] if isinstance(one, int)] if call.endpoint == "infill" else [len(places)]
    texts, done = [], 0
    for size in sizes:
        start = places[done]
        texts.append(text_after(lm.tokenizer, row[:start], row[start : start + size]))
        done += size
    return texts


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


class Service:
    """All endpoints of one server. `open_backend` loads the model, in a thread, while /ready says 503."""

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        *,
        key_hashes: Sequence[bytes] = (),
        cors_origins: Sequence[str] = (),
        when_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_backend, self._key_hashes, self._when_ready = open_backend, key_hashes, when_ready
        self._cors_origins = cors_origins
        self.backend: Backend | None = None
        self.failure: BaseException | None = None
        self.is_ending, self.num_open = False, 0
        self.metrics = Metrics(lambda: self.backend.engine.stats() if self.backend else {})
        # Constraints, and texts to tokenize only, wait in threads of their own, so that they hold up nobody else.
        kinds = ("text", "constraint", "tokenize")
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"prepare-{kind}") for kind in kinds]
        self._page, self._policy = _page()

    def app(self) -> Starlette:
        """Build the ASGI application."""
        routes: list[tuple[str, str, str, Any]] = [
            ("GET", "/", "page", self._show_page),
            ("GET", "/health", "health", self._health),
            ("GET", "/ready", "ready", self._is_ready),
            ("GET", "/metrics", "metrics", self._show_metrics),
            ("GET", "/v1/models", "models", self._list_models),
            ("GET", "/v1/models/{id:path}", "models", self._show_model),
            ("GET", "/tokenizer_info", "tokenizer_info", self._tokenizer_info),
            ("POST", "/tokenize", "tokenize", self._tokenize),
            ("POST", "/detokenize", "detokenize", self._detokenize),
            ("POST", "/v1/chat/completions", "chat", self._generate),
            ("POST", "/v1/completions", "completions", self._generate),
            ("POST", "/v1/infill", "infill", self._generate),
        ]
        cors = Middleware(
            CORSMiddleware, allow_origins=list(self._cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.loop, self.outbox = asyncio.get_running_loop(), Outbox()
            threading.Thread(target=self._load, daemon=True, name="load").start()
            yield
            self.close()

        app = Starlette(
            routes=[
                Route(path, _Endpoint(service=self, name=name, handler=handler), methods=[method])
                for method, path, name, handler in routes
            ],
            middleware=[cors] if self._cors_origins else [],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=lifespan,
        )
        app.router.redirect_slashes = False  # the address would be made of the client's Host header
        return app

    def _load(self) -> None:
        try:
            self.backend = self._open_backend()
            self._when_ready()
        except BaseException as error:
            self.failure = error

    def close(self) -> None:
        """End the threads and the worker process."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        if self.backend is not None and self.backend.compiler is not None:
            self.backend.compiler.close()

    async def drain(self, grace: float) -> None:
        """Refuse new requests, let the running ones finish, and return once every answer is sent."""
        self.is_ending = True
        if self.backend is not None:
            await self.loop.run_in_executor(None, self.backend.engine.drain, grace)
        ends = time.monotonic() + grace + END_SECONDS
        while self.num_open and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    def key_of(self, request: HttpRequest) -> str:
        """Return the hash of the request's key. Raises ApiError where there is none or a wrong one."""
        if not self._key_hashes:
            return ""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()  # the bytes that came
        if kind.lower() != "bearer" or True not in [hmac.compare_digest(given, one) for one in self._key_hashes]:
            problem, asked = "a valid key is needed: send `Authorization: Bearer KEY`.", {"WWW-Authenticate": "Bearer"}
            raise ApiError(problem, status=401, code="invalid_api_key", headers=asked)
        return given.hex()

    def _running(self) -> Backend:
        """Return the backend. Raises ApiError while it loads or ends, and once its thread is dead."""
        if self.backend is None or self.is_ending:
            state = "loads the model" if self.backend is None else "is shutting down"
            raise retry_later(f"the server {state}; try again.")
        if not self.backend.engine.is_alive:
            raise server_error(_STOPPED)
        return self.backend

    def _model(self, name: str | None) -> tuple[str, "LanguageModel"]:
        """Find a model by its name, which is compared and never opened."""
        backend = self._running()
        chosen = backend.base if name is None else name
        if chosen not in backend.models:
            problem = f"there is no model {chosen[:200]!r}; there are {', '.join(backend.models)}."
            raise ApiError(problem, status=404, param="model", code="model_not_found")
        return chosen, backend.models[chosen]

    async def _generate(self, request: HttpRequest, visit: Visit) -> Response:
        backend, started = self._running(), time.monotonic()
        body = parse_json(await read_body(request))
        template = getattr(backend.models[backend.base].tokenizer, "chat_template", None)
        if visit.endpoint == "chat" and not template:
            problem = "this model has no chat template: send the text as prompt to /v1/completions."
            raise ApiError(problem, param="messages")
        call = read_call(visit.endpoint, body, template=template if isinstance(template, str) else None)
        name, lm = self._model(call.model)

        async def start() -> Flight:
            if call.options:
                return await self._decide(call, name, lm, visit, started)
            pool = self._pools[call.constraint is not None]
            prepared = await self.loop.run_in_executor(pool, backend.prepare, call, lm)
            return self._submit(call, name, lm, prepared, visit, started)

        if call.is_streamed:
            flight = await start()
            return EventStream(self._events(flight), functools.partial(self._leave, flight))

        async def answer() -> Response:
            flight = await start()
            try:
                while not flight.reply.is_done:
                    for delta in await flight.inbox.take(PING_SECONDS):
                        self._time_first_text(flight, flight.reply.add(delta))
                self._finish(flight)
                return JSONResponse(flight.reply.whole())
            finally:
                self._leave(flight)

        return await unless_gone(request.receive, answer())

    def _submit(
        self, call: Call, name: str, lm: "LanguageModel", prepared: "Prepared", visit: Visit, started: float
    ) -> Flight:
        """Queue a request. Raises ApiError where the engine does not take it."""
        backend, inbox, id = self._running(), Inbox(), uuid.uuid4().hex
        seconds = min(call.deadline_seconds or REQUEST_SECONDS, REQUEST_SECONDS)
        request = Request(
            id=id, prepared=prepared, deliver=functools.partial(self.outbox.put, inbox), key=visit.key,
            adapter=None if name == backend.base else name, deadline=started + seconds,
            wants_drafts=call.wants_drafts, top_logprobs=call.top_logprobs,
        )  # fmt: skip
        try:
            backend.engine.submit(request)
        except Full as full:
            raise retry_later("too many requests wait; try again later.", full.retry_after, status=429) from full
        except Draining as draining:  # `_running` knows when the server ends
            raise server_error(_STOPPED) from draining
        except ValueError as error:
            raise ApiError(str(error)[:2000]) from error
        text_of = functools.lru_cache(4096)(lambda one: text_after(lm.tokenizer, [one], [one], with_special=True))
        echoes = [text_after(lm.tokenizer, [], row) for row in prepared.rows] if call.does_echo else ()
        reply = Reply(
            call, id=id, model=name, num_rows=len(prepared.rows), text_of=text_of, echoes=echoes,
            fill=functools.partial(_texts_of_holes, call, lm, prepared) if prepared.is_infilling else None,
        )  # fmt: skip
        return Flight(id=id, visit=visit, inbox=inbox, reply=reply, started=started)

    async def _decide(self, call: Call, name: str, lm: "LanguageModel", visit: Visit, started: float) -> Flight:
        """Answer with the likeliest of the options, in one or two forwards; there is nothing to wait for then."""
        backend, inbox = self._running(), Inbox()

        def ask() -> Any:
            api.check_size(call.prompts[0], backend.max_model_len)
            context = lm.encode(call.prompts[0])
            options = [encode_as_text(lm.tokenizer, one, is_inside=len(context) > 0) for one in call.options]
            longest = len(context) + max(map(len, options))
            if backend.max_model_len is not None and longest > backend.max_model_len:
                raise ValueError(f"prompt and answer must have at most {backend.max_model_len} tokens; got {longest}.")
            adapter = None if name == backend.base else name
            future = backend.engine.decide(context, options, adapter=adapter, seed=call.settings["seed"])
            return len(context), options, future.result()

        try:
            num, options, found = await self.loop.run_in_executor(None, functools.partial(api.checked, None, ask))
        except Draining as draining:
            raise server_error(_STOPPED) from draining
        best = max(range(len(options)), key=lambda i: found.scores[i].log_p)
        usage = Usage(prompt_tokens=num, completion_tokens=len(options[best]), forwards=found.forwards)
        reply = Reply(call, id=visit.id, model=name, num_rows=1, text_of=str)
        reply.scores = [
            {"text": text, "probability": math.exp(score.log_p)} | vars(score)
            for text, score in zip(call.options, found.scores, strict=True)
        ]
        ids = tuple(options[best].tolist())
        inbox.put([Delta(index=0, token_ids=ids, text=call.options[best], finish_reason="stop", usage=usage)])
        return Flight(id=visit.id, visit=visit, inbox=inbox, reply=reply, started=started)

    async def _events(self, flight: Flight) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream, those of a tick together."""
        reply = flight.reply
        try:
            while not reply.is_done:
                deltas = await flight.inbox.take(PING_SECONDS)
                events = [] if deltas else [b": ping\n\n"]
                for delta in deltas:
                    self._time_first_text(flight, delta.text)
                    events += map(_event, reply.chunks(delta))
                if events:
                    yield b"".join(events)
            self._finish(flight)
            yield b"".join(map(_event, reply.last_chunk())) + b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body) + b"data: [DONE]\n\n"
        except Exception as error:
            _log_error(flight.visit.id, error)
            yield _event(_FAILED.body) + b"data: [DONE]\n\n"

    def _time_first_text(self, flight: Flight, text: str) -> None:
        if text and not flight.has_text:
            flight.has_text = True
            self.metrics.first_text.observe(time.monotonic() - flight.started)

    def _finish(self, flight: Flight) -> None:
        usage, seconds = flight.reply.usage(), time.monotonic() - flight.started
        self.metrics.finish(usage, seconds=seconds)
        log.info("%s: %d tokens in all, %.2f s", flight.visit.id, usage["total_tokens"], seconds)

    def _leave(self, flight: Flight) -> None:
        if not flight.reply.is_done and self.backend is not None:
            self.backend.engine.cancel(flight.id)

    async def _show_page(self, request: HttpRequest, visit: Visit) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})

    async def _health(self, request: HttpRequest, visit: Visit) -> Response:
        is_alive = self.backend is None or self.backend.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the engine has stopped"}, 200 if is_alive else 503)

    async def _is_ready(self, request: HttpRequest, visit: Visit) -> Response:
        self._running()
        return JSONResponse({"status": "ready"})

    async def _show_metrics(self, request: HttpRequest, visit: Visit) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def _list_models(self, request: HttpRequest, visit: Visit) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._running().models]})

    async def _show_model(self, request: HttpRequest, visit: Visit) -> Response:
        return JSONResponse(self._card(self._model(request.path_params["id"])[0]))

    def _card(self, name: str) -> dict[str, Any]:
        length = self._running().max_model_len
        has_chat = bool(getattr(self._model(name)[1].tokenizer, "chat_template", None))
        card = {"id": name, "object": "model", "created": 0, "owned_by": "redraft", "max_model_len": length}
        return card | {"has_chat_template": has_chat}

    async def _tokenizer_info(self, request: HttpRequest, visit: Visit) -> Response:
        tokenizer = self._model(None)[1].tokenizer
        names = ("bos_token", "eos_token", "pad_token", "mask_token")
        return JSONResponse({"tokenizer_class": type(tokenizer).__name__} | {n: getattr(tokenizer, n) for n in names})

    async def _tokenize(self, request: HttpRequest, visit: Visit) -> Response:
        given = api.read_fields(
            parse_json(await read_body(request)),
            {"model": str | None, "prompt": str | None, "messages": list | None, "add_special_tokens": bool | None},
        )
        backend, lm = self._running(), self._model(given.get("model"))[1]
        if (given.get("prompt") is None) == (given.get("messages") is None):
            raise ApiError("give prompt or messages.", param="prompt")
        if given.get("add_special_tokens"):
            raise ApiError("prompts get no special tokens here; set it to false.", param="add_special_tokens")
        template, prompt = getattr(lm.tokenizer, "chat_template", None), given.get("prompt")
        prompt = read_messages(given["messages"], template) if prompt is None else prompt
        api.check_size(prompt, backend.max_model_len)
        encode = functools.partial(api.checked, None, lm.encode, prompt)
        tokens = (await self.loop.run_in_executor(self._pools[2], encode)).tolist()
        return JSONResponse({"count": len(tokens), "max_model_len": backend.max_model_len, "tokens": tokens})

    async def _detokenize(self, request: HttpRequest, visit: Visit) -> Response:
        given = api.read_fields(parse_json(await read_body(request)), {"model": str | None, "tokens": list})
        backend, lm = self._running(), self._model(given.get("model"))[1]
        most = MAX_BODY_BYTES if backend.max_model_len is None else api.MAX_TOKEN_CHARACTERS * backend.max_model_len
        if len(given["tokens"]) > most:
            raise ApiError(f"tokens must hold at most {most} ids; got {len(given['tokens'])}.", param="tokens")
        if not api.is_ids(given["tokens"], len(lm.tokenizer)):
            raise ApiError(f"tokens must be ids that lie in [0, {len(lm.tokenizer)}).", param="tokens")
        text = await self.loop.run_in_executor(self._pools[2], lm.tokenizer.decode, given["tokens"])
        return JSONResponse({"prompt": str(text)})


@dataclass(frozen=True, kw_only=True)
class _Endpoint:
    """One route as an ASGI application: it knows the client, answers errors, and counts."""

    service: Service
    name: str
    handler: Callable[[HttpRequest, Visit], Awaitable[Response]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, service, status = HttpRequest(scope, receive), self.service, 499
        given = request.headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex

        async def send_in_time(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        service.num_open += 1
        try:
            response = await self._respond(request, id)
            response.headers["x-request-id"] = id
            await response(scope, receive, send_in_time)
        except (ClientGone, OSError):
            status = 499
        finally:
            service.num_open -= 1
            service.metrics.requests.labels(self.name, str(status)).inc()
            if self.name not in _OPEN:
                log.info("%s: %s %d", id, self.name, status)

    async def _respond(self, request: HttpRequest, id: str) -> Response:
        try:
            if self.service.num_open > MAX_OPEN:
                raise retry_later("too many connections; try again.", status=429)
            key = "" if self.name in _OPEN else self.service.key_of(request)
            return await self.handler(request, Visit(endpoint=self.name, id=id, key=key))
        except ApiError as error:
            if self.name not in _OPEN:
                self.service.metrics.rejected.labels(_REASONS.get(error.status, "invalid")).inc()
            return JSONResponse(error.body, error.status, headers=error.headers)
        except ClientGone:
            raise
        except Exception as error:
            _log_error(id, error)
            return JSONResponse(_FAILED.body, _FAILED.status, headers=_FAILED.headers)


_REASONS = {401: "key", 429: "full", 500: "failed", 503: "not_running"}


def _log_error(id: str, error: Exception) -> None:
    """Log where an error happened. Its message stays out: it may hold a client's text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    log.error("%s: unexpected %s at %s", id, type(error).__name__, where)


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(f"{request.method} {request.url.path[:200]}: {error.detail}.", status=error.status_code)
    return JSONResponse(problem.body, problem.status, headers=error.headers)


def _page() -> tuple[str, str]:
    """Read the page, and make its content security policy: its own script and style, and this server only."""
    text = files("redraft.serving").joinpath("page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode() + "'"

    none = "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"default-src 'self'; script-src {allowed('script')}; style-src {allowed('style')}; {none}"


class DrainingServer(uvicorn.Server):
    """A server that finishes what runs when it is told to end; a second signal ends it at once, as any process."""

    def __init__(self, service: Service, *, grace: float) -> None:
        config = uvicorn.Config(
            service.app(), loop="asyncio", http="h11", lifespan="on", log_config=None, log_level=logging.CRITICAL,
            access_log=False, proxy_headers=False, server_header=False, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(END_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self.service, self.grace, self._endings, self._num_signals = service, grace, list[asyncio.Task[None]](), 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end. Called by Python in the main thread, so it only tells the event loop.

        At the second signal, streams get a last event; then, and also where a forward takes longer, the process dies of
        the signal, without waiting for threads.
        """
        if self._num_signals:
            signal.signal(sig, signal.SIG_DFL)  # a third one ends it without the last events
            end = threading.Timer(SECOND_SECONDS, os.kill, (os.getpid(), sig))
            end.daemon = True
            end.start()
        self._num_signals += 1
        self.service.loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Drain; at the second call without grace."""
        grace = 0.0 if self._endings else self.grace
        self._endings.append(asyncio.ensure_future(self._end(grace)))

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, ten times a second, whether to end: also where the model cannot be loaded."""
        return await super().on_tick(counter) or self.service.failure is not None

    async def _end(self, grace: float) -> None:
        await self.service.drain(grace)
        self.should_exit = self._num_signals < 2  # else the timer ends the process
