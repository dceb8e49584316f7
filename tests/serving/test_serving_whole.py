"""The whole server, with a model: whoever else is served, a client gets what `generate` gives."""

import asyncio
import gc
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai.types.chat import ChatCompletion
from server_doubles import call, serving, wait_for

import redraft
from redraft.constraints.kinds import Choice, JsonSchema
from redraft.serving.app import Backend
from redraft.serving.compiling import Compiler
from redraft.serving.engine import Engine

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def lm(model_folder):
    return redraft.load(model_folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def server(lm):
    def load():
        engine = Engine(lm, max_rows=4, max_queue=100)
        engine.start()
        engine.warm_up()
        return Backend(engine=engine, models={"tiny": lm}, max_model_len=128, compiler=Compiler())

    with serving(load) as server:
        yield server


CASES = [
    ({"max_tokens": 12}, {"max_new_tokens": 12}),
    ({"max_tokens": 16, "temperature": 0.8, "n": 3}, {"max_new_tokens": 16, "temperature": 0.8, "num_samples": 3}),
    ({"max_tokens": 16, "redraft": {"steps": 4}}, {"max_new_tokens": 16, "steps": 4}),
    ({"max_tokens": 24, "ignore_eos": True, "redraft": {"preset": "fast-dllm", "block_size": 8, "threshold": 0.5}},
     {"max_new_tokens": 24, "stop": None, "preset": "fast-dllm", "block_size": 8, "threshold": 0.5}),
    ({"max_tokens": 16, "redraft": {"preset": "mdlm", "forwards": 6}},
     {"max_new_tokens": 16, "preset": "mdlm", "forwards": 6}),
    ({"max_tokens": 32, "stop": ["e", "x"], "temperature": 1, "redraft": {"preset": "bd3lm", "block_size": 4}},
     {"max_new_tokens": 32, "stop": ("e", "x"), "temperature": 1, "preset": "bd3lm", "block_size": 4}),
    ({"max_tokens": 8, "redraft": {"choice": ["yes", "no"]}},
     {"max_new_tokens": 8, "constraint": Choice(["yes", "no"])}),
    ({"max_tokens": 16, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
     {"max_new_tokens": 16, "constraint": JsonSchema(SCHEMA)}),
]  # fmt: skip


def texts_of(server, path, body):
    """Return the texts, their ends and the usage of a request, streamed or not."""
    answer = call(server, path, body)[1]
    if not body.get("stream"):
        choices, usage = answer["choices"], answer["usage"]
    else:
        chunks = [json.loads(part[6:]) for part in answer.decode().split("\n\n") if part.startswith("data: {")]
        usage, choices = chunks[-1]["usage"], [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    texts, ends = {}, {}
    for choice in choices:
        text = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + text
        ends[choice["index"]] = choice["finish_reason"]
    return [texts[i] for i in sorted(texts)], ends, usage


@pytest.mark.usefixtures("unchecked")
def test_every_client_gets_what_generate_gives(lm, server):
    jobs = [(case, seed, is_streamed) for case in CASES for seed, is_streamed in ((1, True), (2, False), (3, True))]
    random.Random(0).shuffle(jobs)

    def serve(job):
        (body, _), seed, is_streamed = job
        options = {"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {}
        return texts_of(server, "/v1/completions", {"prompt": "def f(x)", "seed": seed} | body | options)

    with ThreadPoolExecutor(12) as pool:
        served = list(pool.map(serve, jobs))
    for ((_, settings), seed, _), (texts, _, usage) in zip(jobs, served, strict=True):
        wanted = lm.generate("def f(x)", seed=seed, **settings)
        assert texts == wanted.texts
        assert usage["completion_tokens"] == sum(map(len, wanted.tokens))
        assert usage["redraft"]["forwards"] == max(wanted.forwards)


def test_a_chat_is_what_generate_gives(lm, server):
    messages = [{"role": "user", "content": "stop<eos>go"}]
    wanted = lm.generate(messages, max_new_tokens=12, seed=4).texts
    assert texts_of(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 12, "seed": 4})[0] == wanted


def test_infilling_is_what_infill_gives(lm, server):
    wanted = lm.infill("a[MASK:3]b[MASK:2]", seed=2).texts[0]
    answer = call(server, "/v1/infill", {"segments": ["a", {"mask": 3}, "b", {"mask": 2}], "seed": 2})[1]
    assert answer["text"] == wanted
    assert [len(hole["tokens"]) for hole in answer["holes"]] == [3, 2]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 5)
    wanted = lm.infill("a[MASK:4]b", seed=2).texts[0]
    for stream in (False, True):
        body = {"prompt": "a", "suffix": "b", "max_tokens": 4, "seed": 2}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        assert texts_of(server, "/v1/completions", body | options)[0] == [wanted[1:-1]]


def decided(server, **extras):
    body = {"messages": [{"role": "user", "content": "which?"}], "seed": 3, "redraft": {"decide": True} | extras}
    return call(server, "/v1/chat/completions", body)


def test_a_decision_tells_the_likelihood_of_each_option(lm, server):
    status, answer, _ = decided(server, choice=["a", "b", "c"])
    assert status == 200
    ChatCompletion.model_validate(answer, strict=True)
    options = answer["usage"]["redraft"]["options"]
    assert [one["text"] for one in options] == ["a", "b", "c"]
    assert sum(one["probability"] for one in options) == pytest.approx(1)
    assert [one["standard_error"] for one in options] == [0, 0, 0]  # one token each
    best = max(options, key=lambda one: one["probability"])["text"]
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (best, "stop")
    assert answer["usage"]["completion_tokens"] == answer["usage"]["redraft"]["forwards"] == 1
    masked = torch.cat([lm.encode([{"role": "user", "content": "which?"}]), torch.tensor([2])])
    log_p = lm.logits(masked[None])[0, -1, [lm.encode(one)[0] for one in "abc"]].log_softmax(0)
    assert [one["log_p"] for one in options] == pytest.approx(log_p.tolist(), abs=1e-5)


def test_a_decision_between_longer_options_has_an_error(server):
    choice = ["yes, of course", "no, by no means"]
    first, again = (decided(server, choice=choice)[1]["usage"]["redraft"] for _ in range(2))
    assert all(one["standard_error"] > 0 for one in first["options"])
    assert first["forwards"] >= 1
    assert first == again


def test_a_decision_streams_its_answer(server):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 22]}}}
    body = {"prompt": "x", "response_format": schema, "redraft": {"decide": True}, "stream": True}
    texts, ends, usage = texts_of(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert texts[0] in ("1", "22")
    assert ends == {0: "stop"}
    assert [one["text"] for one in usage["redraft"]["options"]] == ["1", "22"]


def test_bombs_in_schemas_are_refused_while_others_are_served(server):
    body = {"prompt": "x", "max_tokens": 8}
    with ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(call, server, "/v1/completions", body | {"redraft": {"regex": p}})
                 for p in ("(a{0,99}){0,99}", "(.{0,500}x){0,9}")]  # fmt: skip
        assert [call(server, "/v1/completions", body)[0] for _ in range(4)] == [200] * 4
        for bomb in bombs:
            status, answer, _ = bomb.result()
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_a_deadline_ends_a_text_with_what_is_decided(server):
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "redraft": {"deadline_ms": 1}}
    texts, ends, _ = texts_of(server, "/v1/completions", body)
    assert len(texts[0]) < 100
    assert ends == {0: "length"}


def test_log_probabilities_are_those_of_the_steps(server):
    body = {"prompt": "x", "max_tokens": 6, "logprobs": 2, "ignore_eos": True}
    found = call(server, "/v1/completions", body)[1]["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 6
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[token] == pytest.approx(logprob, abs=1e-5)  # at temperature 0 it is the likeliest


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_left_behind(server):
    wide = {"prompt": "x", "max_tokens": 4, "n": 2}
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: call(server, "/v1/completions", wide)[0], range(60)))
    assert set(statuses) == {200}
    stats = server.service.backend.engine.stats
    wait_for(lambda: not (stats()["rows_running"] or stats()["rows_waiting"] or server.service.num_open))


async def posted(server, body):
    """Send a request, and return the two ends of its connection."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return reader, writer


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_thousand_clients_at_once_are_answered_or_told_to_come_again(server):
    async def client():
        reader, writer = await posted(server, {"prompt": "x", "max_tokens": 8})
        answer = await reader.read()
        writer.close()
        return answer.split(b" ", 2)[1], b"retry-after:" in answer.lower()

    async def crowd():
        return Counter(await asyncio.gather(*(client() for _ in range(1000))))

    found = asyncio.run(crowd())
    assert set(found) <= {(b"200", False), (b"429", True)}
    assert found[b"200", False] >= 100  # as many as may wait
    wait_for(lambda: not server.service.num_open)
    stats = server.service.backend.engine.stats()
    assert (stats["rows_running"], stats["rows_waiting"]) == (0, 0)


MANY = (200, 800)
SMALL = {"prompt": "x", "max_tokens": 4, "redraft": {"steps": 1}}
KINDS = [
    (SMALL, 200),
    (SMALL | {"stream": True, "seed": 1, "temperature": 1}, 200),
    (SMALL | {"n": 2, "logprobs": 1}, 200),
    (SMALL | {"max_tokens": 0}, 400),
    (SMALL | {"unknown": 1}, 400),
    (SMALL | {"redraft": {"choice": ["a", "b"], "decide": True}}, 200),
]


def state_of(server):
    """Wait until nobody is served, and count what would grow if something were left."""
    engine, loop = server.service.backend.engine, server.service.loop
    wait_for(lambda: not (server.service.num_open or engine.stats()["rows_running"] or engine.stats()["rows_waiting"]))
    wait_for(lambda: len(asyncio.all_tasks(loop)) < 8)  # uvicorn's own, and connections that close
    gc.collect()
    held = [engine._queues, engine._spent, engine._cancelled, engine._calls, engine._news, *engine._running.values()]
    batches = [len(batch) for batch in engine._batches.values()]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "held": [*map(len, held), *batches],
        "tasks": len(asyncio.all_tasks(loop)),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }, resident / 2**20


async def crowd(server, count):
    """Send requests of all kinds, 16 at a time; some clients go before they have the whole answer."""

    async def client(numbers):
        for number in numbers:
            body, status = KINDS[number % len(KINDS)]
            reader, writer = await posted(server, body)
            first = await reader.readline()
            assert int(first.split()[1]) == status
            if number % 7:
                await reader.read()
            writer.close()

    numbers = iter(range(count))
    await asyncio.gather(*(client(numbers) for _ in range(16)))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and files are read from /proc")
def test_a_thousand_requests_leave_no_slot_no_task_and_no_memory_behind(server):
    asyncio.run(crowd(server, MANY[0]))
    before, mib = state_of(server)
    asyncio.run(crowd(server, MANY[1]))
    wait_for(lambda: state_of(server)[0] == before)  # the last connections take a moment to close
    assert not any(before["held"])
    assert state_of(server)[1] - mib < 16
