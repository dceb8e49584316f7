"""`redraft serve`: every mistake is one line and exit code 2; a signal ends it cleanly."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import redraft
from redraft.cli import _dispatch
from redraft.cli.serve import model_name, read_keys


def refused(capsys, *arguments):
    assert _dispatch(["serve", *arguments]) == 2
    out, message = capsys.readouterr()
    assert (out, message.count("\n")) == ("", 1)
    return message


def test_mistakes_are_one_line(capsys, tmp_path, model_folder):
    keys = tmp_path / "keys"
    assert "cannot read the keys" in refused(capsys, "m", "--api-key-file", str(keys))
    keys.write_text("# none\n\n")
    assert "got no key" in refused(capsys, "m", "--api-key-file", str(keys))
    keys.write_text("short\n")
    message = refused(capsys, "m", "--api-key-file", str(keys))
    assert "a key of 5 characters" in message
    assert "short" not in message
    keys.write_bytes(b"\xff\xff")
    assert "not UTF-8" in refused(capsys, "m", "--api-key-file", str(keys))
    assert "give --api-key-file, or --insecure" in refused(capsys, "m", "--host", "0.0.0.0")
    assert "--adapter must be NAME=FOLDER" in refused(capsys, "m", "--adapter", "x")
    assert "holds no adapter" in refused(capsys, "m", "--adapter", f"x={tmp_path}")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "that is the name of the model" in refused(capsys, "org/m", "--adapter", f"org/m={tmp_path}")
    assert "at most 65535" in refused(capsys, "m", "--port", "70000")
    assert "cannot listen at 203.0.113.1" in refused(capsys, "m", "--host", "203.0.113.1", "--insecure")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in refused(capsys, str(model_folder), "--port", port)


def test_what_is_found_while_the_model_loads_is_one_line_too(capsys, tmp_path, model_folder):
    assert "nowhere" in refused(capsys, str(tmp_path / "nowhere"), "--port", "0")
    arguments = [str(model_folder), "--port", "0", "--max-model-len", "100000"]
    assert "max_model_len must be at most the model's context of 128 tokens" in refused(capsys, *arguments)
    arguments[-1] = "4"
    assert "max_model_len must be at least 18" in refused(capsys, *arguments)


def test_more_rows_than_the_memory_holds_are_refused_before_they_are_allocated(capsys, model_folder, monkeypatch):
    monkeypatch.setattr("redraft.models.device.free_bytes", lambda device: 2**20)
    message = refused(capsys, str(model_folder), "--port", "0", "--max-rows", "50")
    assert "--max-rows 50 needs 2.4 MiB for keys, values and logits" in message
    assert "1.0 MiB are free. Lower --max-rows (to 20) or --max-model-len." in message


def test_keys_and_names(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# mine\n  0123456789abcdef  \nfedcba9876543210\n")
    assert len(read_keys(path)) == 2
    assert model_name("org/name") == "org/name"
    assert model_name(str(tmp_path)) == tmp_path.name


def status(url):
    try:
        with urllib.request.urlopen(url) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_a_process_serves_until_a_signal(model_folder, tmp_path, flags):
    command = [sys.executable, "-m", "redraft.cli", "serve", str(model_folder), "--port", "0", *flags]
    command += ["--max-rows", "2", "--max-model-len", "64"]  # few shapes to compile
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        url = server.stdout.readline().split()[-1]
        body = json.dumps({"prompt": "a", "max_tokens": 8}).encode()
        request = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        server.send_signal(signal.SIGTERM)
        out, errors = server.communicate(timeout=60)
    assert (server.returncode, errors) == (0, "")
    assert "completions 200" in out
    assert answer["usage"]["completion_tokens"] == 8
    offline = redraft.load(model_folder).generate(["a"], max_new_tokens=8)
    assert answer["choices"][0]["text"] == offline.texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_drains_at_once(model_folder, second):
    command = [sys.executable, "-m", "redraft.cli", "serve", str(model_folder), "--port", "0", "--grace", "600"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        url = server.stdout.readline().split()[-1]
        body = {"prompt": "a", "max_tokens": 120, "n": 128, "stream": True, "ignore_eos": True}  # takes long
        request = urllib.request.Request(
            url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            assert response.readline().startswith(b"data: {")
            server.send_signal(signal.SIGTERM)
            while status(url + "/ready") != 503:
                assert server.poll() is None
            server.send_signal(second)
            *_, last = [line for line in response if line.strip()]
        errors = server.communicate(timeout=60)[1]
    assert (server.returncode, errors, last.strip()) == (-second, "", b"data: [DONE]")
