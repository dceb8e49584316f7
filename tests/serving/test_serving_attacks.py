"""What an attack on the server found: each of these was answered late, wrongly or not at all."""

import hashlib
import socket
import sys

import pytest
from server_doubles import call, connected, serving

from redraft.cli.serve import GONE_SECONDS, listen, read_keys
from redraft.serving import app
from redraft.serving.api import ApiError, check_size, read_call

HI = [{"role": "user", "content": "hi"}]
OPTIONS = {"choice": ["a", "b"], "decide": True}


@pytest.mark.parametrize(
    "prompt",
    ["a" * 321, [5] * 11, [{"role": "user", "content": "a" * 321}], ["a" * 320, 1, "b"]],
    ids=["text", "ids", "messages", "segments"],
)
def test_what_cannot_fit_is_refused_without_being_tokenized(prompt):
    with pytest.raises(ApiError, match=r"at most (320 characters|10 tokens) in .*; got (321|11)\.") as refused:
        check_size(prompt, 10)
    assert refused.value.body["error"]["code"] == "context_length_exceeded"
    check_size(prompt, None)
    check_size(prompt, 11)


def test_long_texts_are_refused_at_every_endpoint(server):
    text = "a" * 5000
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": text, "redraft": OPTIONS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/infill", {"segments": [text, {"mask": 1}]}),
        ("/tokenize", {"prompt": text}),
        ("/detokenize", {"tokens": [1] * 5000}),
    ):
        status, answer, _ = call(server, path, body)
        assert (status, "at most" in answer["error"]["message"]) == (400, True), path


def test_a_client_that_is_still_sending_sees_why_its_body_is_refused(server, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    assert call(server, "/v1/completions", raw=b" " * 3_000_000)[0] == 413
    with connected(server, headers="expect: 100-continue\r\ncontent-length: 5000\r\n") as client:
        assert b" 413 " in client.recv(100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["x", "y"]}, "one prompt"),
        ({"redraft": OPTIONS | {"regex": "a"}}, "one constraint"),
        ({"redraft": OPTIONS | {"deadline_ms": 5}}, "leave deadline_ms out"),
        ({"redraft": OPTIONS | {"drafts": True}, "stream": True}, "leave drafts out"),
        ({"n": 2}, "leave n out"),
    ],
)
def test_a_decision_ignores_nothing(fields, message):
    with pytest.raises(ApiError, match=message):
        read_call("completions", {"prompt": "x", "redraft": OPTIONS} | fields)


def test_a_decision_fills_no_holes():
    with pytest.raises(ApiError, match="fills no holes"):
        read_call("infill", {"segments": ["a", {"mask": 2}], "redraft": OPTIONS})


def test_messages_use_the_names_of_the_fields(server):
    for path, body, name in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 9999}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 9999}, "max_completion_tokens"),
    ):
        message = call(server, path, body)[1]["error"]["message"]
        assert f"lower {name}." in message


def test_infilling_checks_the_size_of_blocks(server):
    for size in (0, False, "", []):
        body = {"segments": ["a", {"mask": 2}], "redraft": {"block_size": size}}
        assert call(server, "/v1/infill", body)[1]["error"]["param"] == "redraft.block_size"


def test_no_redirect_is_made_of_the_host_header(server):
    assert call(server, "/v1/completions/", {"prompt": "x"})[0] == 404


def test_keys_may_be_any_text(backend, tmp_path):
    path, key = tmp_path / "keys", "kéy of Zoë, à"
    path.write_text("\ufeff" + key + "à" * 8 + "\n", encoding="utf-8")
    hashes = read_keys(path)
    assert hashes == [hashlib.sha256((key + "à" * 8).encode()).digest()]
    sent = "Bearer " + (key + "à" * 8).encode().decode("latin-1")
    with serving(backend, key_hashes=hashes) as server:
        assert call(server, "/v1/models", authorization=sent)[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
def test_connections_of_clients_that_take_nothing_end():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * GONE_SECONDS
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
