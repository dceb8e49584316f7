"""What clients get: the openai package works unchanged, and every object validates against its types."""

import asyncio
import json

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from server_doubles import ANSWER, call, serving

HI = [{"role": "user", "content": "hi"}]


def client(server, **options):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, **options)


def events(server, path, body):
    """Stream, and return the data of the events; the last must be [DONE]."""
    status, text, headers = call(server, path, body | {"stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    *found, last = [part for part in text.decode().split("\n\n") if part and not part.startswith(":")]
    assert last == "data: [DONE]"
    assert all(part.startswith("data: {") for part in found)
    return [json.loads(part.removeprefix("data: ")) for part in found]


def joined(chunks, get):
    return "".join(get(choice) or "" for chunk in chunks for choice in chunk["choices"])


def test_a_chat(server, engine):
    answer = client(server).chat.completions.create(model="tiny", messages=HI, max_tokens=100, seed=5)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == len(ANSWER)
    extras = answer.usage.model_extra["redraft"]
    assert extras["forwards"] == -(-len(ANSWER) // 4)
    assert extras["seed"] == 5
    assert engine.requests[0].prepared.config.max_new_tokens == 100
    cut = client(server).chat.completions.create(model="tiny", messages=HI, max_tokens=10)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (ANSWER[:10], "length")


def test_a_stream_says_what_the_whole_answer_says(server):
    body = {"model": "tiny", "messages": HI, "max_tokens": 30, "n": 2, "seed": 3}
    whole = call(server, "/v1/chat/completions", body)[1]
    chunks = events(server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in choices) == whole["choices"][index]["message"]["content"]
        assert [c["delta"].get("role") for c in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    usage, of_whole = chunks[-1]["usage"], whole["usage"]
    del usage["redraft"]["queue_ms"], of_whole["redraft"]["queue_ms"]
    assert usage == of_whole


def test_completions_of_several_prompts(server):
    body = {"model": "tiny", "prompt": ["a", "bc"], "n": 2, "max_tokens": 12, "echo": True}
    whole = call(server, "/v1/completions", body)[1]
    Completion.model_validate(whole, strict=True)
    assert [choice["text"] for choice in whole["choices"]] == [one + ANSWER[:12] for one in ("a", "a", "bc", "bc")]
    assert whole["usage"]["prompt_tokens"] == 3  # each prompt once
    assert whole["usage"]["completion_tokens"] == 48
    chunks = events(server, "/v1/completions", body)
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # the type forgets the null of every stream
        Completion.model_validate(chunk, strict=True)
        assert "usage" not in chunk
    texts = ["".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == i) for i in range(4)]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_usage_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server, "/v1/completions", {"prompt": "a", "max_tokens": 12, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_log_probabilities(server):
    body = {"model": "tiny", "messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = call(server, "/v1/chat/completions", body)[1]
    ChatCompletion.model_validate(whole, strict=True)
    content = whole["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == ANSWER[:6]
    assert content[0]["logprob"] == -0.5
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert [len(one["top_logprobs"]) for one in content] == [2] * 6
    chunks = events(server, "/v1/chat/completions", body)
    streamed = [one for chunk in chunks for choice in chunk["choices"] for one in choice["logprobs"]["content"]]
    assert streamed == content
    texts = call(server, "/v1/completions", {"prompt": "a", "max_tokens": 6, "logprobs": 1})[1]
    Completion.model_validate(texts, strict=True)
    logprobs = texts["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == ANSWER[:6]
    assert logprobs["text_offset"] == list(range(6))
    assert logprobs["token_logprobs"] == [-0.5] * 6


def test_drafts_come_as_events_without_choices(server):
    body = {"messages": HI, "max_tokens": 24, "redraft": {"drafts": True}}
    chunks = events(server, "/v1/chat/completions", body)
    drafts = [chunk["draft"] for chunk in chunks if "draft" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "draft" in chunk)
    revisions = [draft["revision"] for draft in drafts]
    assert revisions == sorted(set(revisions))
    assert drafts[-1]["start"] == 24
    for draft in drafts:  # a slow reader skips some of them
        assert [token[1:] for token in draft["tokens"]] == [[c, "draft", 0.5] for c in ANSWER[draft["start"] : 24]]
    assert joined(chunks, lambda choice: choice["delta"].get("content")) == ANSWER[:24]


def test_infilling(server):
    body = {"model": "tiny", "segments": ["a", {"mask": 3}, {"mask": 2, "id": "b"}, "<mask>[MASK:9]", {"mask": 1}]}
    status, answer, _ = call(server, "/v1/infill", body)
    assert status == 200
    assert answer["text"] == "axxxxx<mask>[MASK:9]x"
    assert [(hole["id"], hole["text"], len(hole["tokens"])) for hole in answer["holes"]] == [
        ("0", "xxx", 3), ("b", "xx", 2), ("2", "x", 1),
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 6


def test_a_suffix(server):
    body = {"model": "tiny", "prompt": "def f(", "suffix": "): pass", "max_tokens": 4}
    assert call(server, "/v1/completions", body)[1]["choices"][0]["text"] == "xxxx"
    chunks = events(server, "/v1/completions", body)
    assert joined(chunks, lambda choice: choice["text"]) == "xxxx"
    refused = call(server, "/v1/completions", body | {"prompt": [2, 3]})
    assert refused[0] == 400
    assert "mask tokens" in refused[1]["error"]["message"]


def test_a_special_token_in_a_message_is_text(server, engine, text_lm):
    sent = [{"role": "user", "content": "stop<eos>go<mask>[MASK:9]"}]
    call(server, "/v1/chat/completions", {"messages": sent, "max_tokens": 4})
    row = engine.requests[0].prepared.rows[0].tolist()
    assert text_lm.tokenizer.decode(row) == "stop<eos>go<mask>[MASK:9]\n"
    assert not {0, 1, 2} & set(row)


def test_models(server):
    assert [model.id for model in client(server).models.list()] == ["tiny", "tuned"]
    Model.model_validate(call(server, "/v1/models/tuned")[1], strict=True)
    status, answer, _ = call(server, "/v1/models/../../etc/passwd")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer, _ = call(server, "/v1/completions", {"model": "gpt-4", "prompt": "x"})
    assert (status, answer["error"]["param"]) == (404, "model")


def test_a_model_is_an_adapter_by_name(server, engine):
    for name in ("tiny", "tuned"):
        client(server).completions.create(model=name, prompt="x", max_tokens=4)
    assert [request.adapter for request in engine.requests] == [None, "tuned"]


def test_tokens(server, text_lm):
    status, answer, _ = call(server, "/tokenize", {"prompt": "abc", "add_special_tokens": False})
    assert (status, answer["count"], answer["max_model_len"]) == (200, 3, 128)
    assert call(server, "/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "abc"}
    assert call(server, "/tokenize", {"messages": HI})[1]["count"] == 3
    info = call(server, "/tokenizer_info")[1]
    assert info["eos_token"] == "<eos>"
    assert "chat_template" not in info
    for body in ({}, {"prompt": "a", "messages": HI}, {"prompt": "a", "add_special_tokens": True}):
        assert call(server, "/tokenize", body)[0] == 400
    for tokens in ([10**6], [-1], ["a"], None):
        assert call(server, "/detokenize", {"tokens": tokens})[1]["error"]["param"] == "tokens"


def test_errors_of_the_sampler_name_the_field(server):
    for extras, param in (
        ({"redraft": {"threshold": 0.5, "preset": "llada"}}, "redraft.preset"),
        ({"redraft": {"block_size": 7}, "max_tokens": 12}, "redraft.block_size"),
        ({"redraft": {"steps": -1}}, "redraft.steps"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "("}}}}, "response_format"),
        ({"redraft": {"regex": "a{50}"}, "max_tokens": 8}, "redraft"),
    ):
        status, answer, _ = call(server, "/v1/completions", {"prompt": "x"} | extras)
        assert status == 400
        assert answer["error"]["param"] == param
    with pytest.raises(openai.BadRequestError, match="context of 128"):
        client(server).completions.create(model="tiny", prompt="x", max_tokens=1000)


def test_the_asynchronous_client(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
            whole = await one.chat.completions.create(model="tiny", messages=HI, max_tokens=9)
            stream = await one.chat.completions.create(model="tiny", messages=HI, max_tokens=9, stream=True)
            pieces = [chunk.choices[0].delta.content async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(talk()) == (ANSWER[:9], ANSWER[:9])


def test_the_request_id_comes_back(server):
    assert call(server, "/health", x_request_id="abc-1")[2]["x-request-id"] == "abc-1"
    made = call(server, "/health", x_request_id="no spaces")[2]["x-request-id"]
    assert len(made) == 32


def test_the_page_runs_its_own_script_only(server):
    status, text, headers = call(server, "/")
    policy = headers["content-security-policy"]
    assert status == 200
    assert policy.startswith("default-src 'self'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert b"innerHTML" not in text
    assert b"http" not in text.replace(b"http-equiv", b"")


def test_metrics_add_up(backend):
    with serving(backend) as server:
        for _ in range(3):
            call(server, "/v1/completions", {"prompt": "ab", "max_tokens": 10})
        call(server, "/v1/completions", {"prompt": 3})
        lines = call(server, "/metrics")[1].decode().splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers["redraft_completion_tokens_total"]) == 30
    assert float(numbers["redraft_prompt_tokens_total"]) == 6
    assert float(numbers['redraft_requests_total{endpoint="completions",status="200"}']) == 3
    assert float(numbers['redraft_requests_total{endpoint="completions",status="400"}']) == 1
    assert float(numbers["redraft_ticks_total"]) == 3
    assert "# TYPE redraft_rows_running gauge" in lines
    assert float(numbers["redraft_ttfb_seconds_count"]) == 3
