"""One clear error to whoever caused it; everybody else is served, nothing leaks, and the end breaks no stream."""

import hashlib
import json
import logging
import threading
from dataclasses import replace

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_doubles import ANSWER, call, connected, serving, started, wait_for

from redraft.serving import app
from redraft.serving.app import Backend

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 60}
KEY = "a-key-of-many-characters"


def read_until(client, end):
    found = b""
    while end not in found:
        piece = client.recv(65536)
        assert piece, found
        found += piece
    return found


# Keys


def test_keys(backend):
    hashes = [hashlib.sha256(key.encode()).digest() for key in ("another-key-of-many", KEY)]
    with serving(backend, key_hashes=hashes) as server:
        for path in ("/health", "/ready", "/"):
            assert call(server, path)[0] == 200
        for path in ("/v1/models", "/metrics", "/tokenizer_info"):
            status, answer, headers = call(server, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for wrong in (KEY, f"Basic {KEY}", "Bearer", "Bearer  ", f"Bearer {KEY}x", "Bearer \xff"):
            assert call(server, "/v1/completions", BODY, authorization=wrong)[0] == 401
        assert call(server, "/v1/completions", BODY, authorization=f"Bearer {KEY}")[0] == 200
        assert call(server, "/v1/completions", BODY, authorization=f"bearer {KEY}")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="x").models.list()
    assert backend.engine.requests[0].key == hashlib.sha256(KEY.encode()).hexdigest()


# Bodies


def test_bodies_that_are_refused(server, monkeypatch):
    assert call(server, "/v1/completions", raw=b"{}", content_type="text/plain")[0] == 415
    assert call(server, "/v1/completions", raw=b"{}", content_type="application/x-www-form-urlencoded")[0] == 415
    assert call(server, "/v1/completions", raw=b'{"prompt": NaN}')[0] == 400
    assert call(server, "/v1/nothing", BODY)[1]["error"]["type"] == "invalid_request_error"
    assert call(server, "/v1/completions")[0] == 405
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(app, "MAX_READ_BYTES", 1000)
    with connected(server, b"x" * 10, length=5000) as client:
        assert b" 413 " in client.recv(100)
    pieces = b"3e8\r\n" + b" " * 1000 + b"\r\n5\r\n     \r\n"
    with connected(server, pieces, headers="transfer-encoding: chunked\r\n") as client:
        assert b" 413 " in client.recv(100)
    with connected(server, length=0):
        pass
    assert call(server, "/v1/completions", BODY)[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with connected(server, b'{"prompt', length=500) as client:
        assert b" 408 " in read_until(client, b"within")
        wait_for(lambda: server.service.num_open == 0)
        while client.recv(100):  # the connection ends
            pass


def test_headers_without_end(server):
    with connected(server, headers="a: " + "x" * 300_000) as client:
        assert b" 400 " in client.recv(100)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.text(max_size=30).map(lambda text: json.dumps({"prompt": text, "max_tokens": 3}).encode())
)
def test_any_bytes_get_an_answer(server, raw):  # fmt: skip
    status, answer, _ = call(server, "/v1/completions", raw=raw)
    assert status in (200, 400)
    assert ("error" in answer) == (status == 400)


# The engine


def test_a_full_queue(server, engine):
    engine.is_held, engine.max_running = True, 1
    with connected(server, BODY) as first:
        wait_for(lambda: engine.requests)
        status, answer, headers = call(server, "/v1/completions", BODY)
        assert (status, answer["error"]["type"], headers["retry-after"]) == (429, "rate_limit_exceeded", "7")
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0).completions.create(**BODY)
        engine.is_held = False
        assert ANSWER[:60].encode() in read_until(first, b"}}}")
    assert 'redraft_rejected_total{reason="full"} 2.0' in call(server, "/metrics")[1].decode()


def test_an_engine_that_has_died(server, engine):
    engine.is_alive = False
    status, answer, headers = call(server, "/v1/completions", BODY)
    assert (status, answer["error"]["type"], headers["x-should-retry"]) == (500, "server_error", "false")
    assert call(server, "/health")[0] == 503
    engine.is_alive = engine.is_draining = True  # it died after the server had looked
    assert call(server, "/v1/completions", BODY)[0] == 500


def test_holes_that_are_not_filled_in_time(server, engine, monkeypatch):
    tick = engine._delta
    monkeypatch.setattr(engine, "_delta", lambda *rest: replace(tick(*rest), token_ids=(), finish_reason="length"))
    status, answer, _ = call(server, "/v1/infill", {"segments": ["a", {"mask": 2}]})
    assert (status, answer["error"]["message"][:24]) == (504, "the time ended before al")


def test_a_row_that_fails(server, engine):
    engine.fails_with = "the model computes numbers that are not finite."
    status, answer, headers = call(server, "/v1/completions", BODY)
    assert (status, answer["error"]["type"], headers["x-should-retry"]) == (500, "server_error", "false")
    assert "not finite" in answer["error"]["message"]
    events = call(server, "/v1/completions", BODY | {"stream": True})[1].decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"
    assert events[1:] == ["data: [DONE]", ""]
    with pytest.raises(openai.APIError, match="not finite"):
        list(openai.OpenAI(base_url=server.url + "/v1", api_key="x").completions.create(**BODY, stream=True))


def test_a_request_that_waits_hears_pings(server, engine, monkeypatch):
    monkeypatch.setattr(app, "PING_SECONDS", 0.02)
    engine.is_held = True
    with connected(server, BODY | {"stream": True}) as client:
        assert b"data:" not in read_until(client, b": ping\n\n")
        engine.is_held = False
        read_until(client, b"[DONE]")


def test_an_unexpected_error_tells_no_text(backend, monkeypatch, caplog):
    def broken(self, call, lm):
        raise KeyError(f"secret {call.prompts}")

    monkeypatch.setattr(Backend, "prepare", broken)
    caplog.set_level(logging.INFO, logger="redraft.serving")
    with serving(backend) as server:
        status, answer, headers = call(server, "/v1/completions", BODY | {"prompt": "my-prompt"})
    assert (status, headers["x-should-retry"]) == (500, "false")
    assert "KeyError at test_serving_faults.py" in caplog.text
    assert "secret" not in caplog.text + json.dumps(answer)
    assert "my-prompt" not in caplog.text + json.dumps(answer)


def test_logs_hold_no_text(server, caplog):
    caplog.set_level(logging.DEBUG)
    call(server, "/v1/completions", BODY | {"prompt": "my-prompt"})
    call(server, "/v1/completions", BODY | {"prompt": "my-prompt", "redraft": {"regex": "my-prompt("}})
    call(server, "/v1/completions", BODY | {"my-prompt": "my-prompt"})
    assert "completions 200" in caplog.text
    assert "my-prompt" not in caplog.text
    assert ANSWER[:20] not in caplog.text


# Clients that go


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_is_cancelled(server, engine, is_streamed):
    engine.is_held = True
    with connected(server, BODY | {"stream": is_streamed}):
        wait_for(lambda: engine.requests)
    wait_for(lambda: engine.cancelled == [engine.requests[0].id])
    wait_for(lambda: server.service.num_open == 0)
    assert 'endpoint="completions",status="499"} 1.0' in call(server, "/metrics")[1].decode()


def test_a_client_that_goes_in_the_middle_of_a_stream(server, engine):
    engine.tick_seconds = 0.02
    with connected(server, BODY | {"stream": True}) as client:
        read_until(client, b"data:")
    wait_for(lambda: engine.cancelled == [engine.requests[0].id])


def test_a_client_that_reads_nothing(server, engine, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.2)
    engine.tick_seconds = 0.02
    wide = {"stream": True, "n": 32, "logprobs": 5}
    with connected(server, BODY | wide):
        wait_for(lambda: engine.cancelled)
        wait_for(lambda: server.service.num_open == 0)


def test_nobody_is_cancelled_who_was_answered(server, engine):
    for is_streamed in (True, False):
        call(server, "/v1/completions", BODY | {"stream": is_streamed})
    wait_for(lambda: server.service.num_open == 0)
    assert engine.cancelled == []


# The end


def stream(server, found):
    with connected(server, BODY | {"stream": True}) as client:
        found.append(read_until(client, b"[DONE]"))


def ended(server, engine):
    """Begin a stream, and tell the server to end. Return the thread, and where what it reads will be."""
    found = []
    thread = threading.Thread(target=stream, args=[server, found])
    thread.start()
    wait_for(lambda: engine.requests)
    server.handle_exit(15, None)
    wait_for(lambda: engine.is_draining)
    return thread, found


def test_what_runs_is_finished_and_what_is_new_is_refused(backend, engine):
    engine.is_held = True
    with serving(backend, grace=30) as server:
        engine.ends = None
        engine.drain = lambda grace: (setattr(engine, "is_draining", True), [t.join() for t in engine.threads])
        thread, found = ended(server, engine)
        for path, body in (("/ready", None), ("/v1/completions", BODY), ("/v1/models", None)):
            status, answer, headers = call(server, path, body)
            assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "server_error", "1")
        assert call(server, "/health")[0] == 200
        engine.is_held = False
        thread.join(20)
        assert found[0].count(b"[DONE]") == 1
        assert b'"error"' not in found[0]
        wait_for(lambda: server.should_exit)


@pytest.mark.parametrize("is_told_twice", [True, False])
def test_what_does_not_finish_in_time_ends_with_an_error(backend, engine, is_told_twice):
    engine.tick_seconds = 0.1
    with serving(backend, grace=60 if is_told_twice else 0.2) as server:
        thread, found = ended(server, engine)
        if is_told_twice:
            server.service.loop.call_soon_threadsafe(server.end)  # a second signal would end the process too
        thread.join(20)
        assert b"shutting down" in found[0]
        assert b"data: [DONE]" in found[0]
        wait_for(lambda: server.should_exit)


# The start


def test_the_model_loads_while_the_server_listens(backend):
    is_allowed = threading.Event()

    def load():
        is_allowed.wait(20)
        return backend

    with started(load) as server:
        assert [call(server, path)[0] for path in ("/health", "/ready", "/v1/models")] == [200, 503, 503]
        is_allowed.set()
        wait_for(lambda: server.service.backend)
        assert call(server, "/ready")[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise ValueError("it does not fit.")

    with serving(load) as server:
        wait_for(lambda: server.should_exit or server.service.failure)
    assert str(server.service.failure) == "it does not fit."


# Browsers


def test_other_origins_are_refused_unless_listed(backend):
    with serving(backend) as server:
        assert "access-control-allow-origin" not in call(server, "/health", origin="https://a.example")[2]
    with serving(backend, cors_origins=["https://a.example"]) as server:
        headers = call(server, "/health", origin="https://a.example")[2]
        assert headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in headers
        assert "access-control-allow-origin" not in call(server, "/health", origin="https://b.example")[2]
