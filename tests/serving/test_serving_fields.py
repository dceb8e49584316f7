"""Each field of a body is honoured, accepted because its value changes nothing, or refused by its name."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.constraints.kinds import All, Choice, JsonSchema, Regex
from redraft.serving.api import ApiError, parse_json, read_call

BASE = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "infill": {"segments": ["a", {"mask": 2}, "b"]},
}
BOTH = ("chat", "completions")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}}


def read(endpoint="chat", template="'user' 'assistant'", **fields):
    return read_call(endpoint, BASE[endpoint] | fields, template=template)


def refusal(endpoint="chat", **fields):
    with pytest.raises(ApiError) as caught:
        read(endpoint, **fields)
    assert caught.value.status == 400
    return caught.value.body["error"]


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"seed": -3}, {"seed": -3}),
        ({"n": 3}, {"num_samples": 3}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"ignore_eos": True}, {"stop": None}),
        ({"redraft": {"preset": "fast-dllm", "threshold": 0.8}}, {"preset": "fast-dllm", "threshold": 0.8}),
        ({"redraft": {"steps": 4, "block_size": 8, "top_k": 5}}, {"steps": 4, "block_size": 8, "top_k": 5}),
        ({"redraft": {"budget": 0.5}}, {"budget": 0.5}),
        ({"redraft": {"forwards": 3, "steps": None}}, {"forwards": 3}),
    ],
    ids=str,
)
def test_settings_are_honoured(endpoint, fields, settings):
    found = read(endpoint, **fields).settings
    assert {name: found[name] for name in settings} == settings
    assert set(found) == {"seed", *settings}


def test_what_is_absent_is_left_to_the_checkpoint_but_a_seed_is_drawn():
    first, second = read().settings, read().settings
    assert set(first) == {"seed"}
    assert first["seed"] != second["seed"]


def test_both_names_of_the_length_may_be_given_if_they_agree():
    assert read(max_tokens=5, max_completion_tokens=5).settings["max_new_tokens"] == 5
    assert read(max_completion_tokens=5).settings["max_new_tokens"] == 5
    assert refusal(max_tokens=5, max_completion_tokens=6)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (endpoint, fields)
        for endpoint in BOTH
        for fields in [
            {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
            {"min_p": 0, "min_tokens": 0, "stop_token_ids": [], "bad_words": [], "prompt_logprobs": None},
            {"best_of": 1},
            {"best_of": 2, "n": 2},
            {"tools": [], "tool_choice": "auto", "functions": []},
            {"tools": [{"type": "function"}], "tool_choice": "none"},
            {"modalities": ["text"], "store": False, "service_tier": "auto"},
            {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
            {"parallel_tool_calls": True, "chat_template_kwargs": {}},
            {"stop": None, "ignore_eos": False, "stream": False, "stream_options": None, "logprobs": None, "n": 1},
            {"response_format": {"type": "text"}, "redraft": {}},
            {"redraft": {"drafts": False}},
        ]
    ],
    ids=str,
)
def test_values_that_change_nothing_are_accepted(endpoint, fields):
    plain, changed = read(endpoint, seed=1), read(endpoint, seed=1, **fields)
    plain.settings.setdefault("num_samples", fields.get("n", 1))
    changed.settings.setdefault("num_samples", 1)
    assert plain == changed


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("presence_penalty", False),
        ("frequency_penalty", 1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"50256": -100}),
        ("min_p", 0.1),
        ("min_tokens", 3),
        ("stop_token_ids", [1]),
        ("bad_words", ["x"]),
        ("prompt_logprobs", 1),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "flex"),
        ("best_of", 2),
        ("user", 7),
        ("metadata", "x"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", 10**9),
        ("max_tokens", "12"),
        ("n", 0),
        ("n", 10**9),
        ("n", True),
        ("temperature", -1),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 2),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stream", "yes"),
        ("response_format", {"type": "xml"}),
        ("response_format", "json"),
        ("model", 3),
        ("redraft", []),
    ],
    ids=str,
)
def test_values_that_would_change_the_output_are_refused_by_name(endpoint, field, value):
    error = refusal(endpoint, **{field: value})
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"redraft": {"presett": "llada"}}, "redraft.presett"),
        ({"redraft": {"preset": "os:system"}}, "redraft.preset"),
        ({"redraft": {"preset": "nonsense"}}, "redraft.preset"),
        ({"redraft": {"cfg_scale": 2}}, "redraft.cfg_scale"),
        ({"redraft": {"blocks_in_flight": 2}}, "redraft.blocks_in_flight"),
        ({"redraft": {"cache": "dual"}}, "redraft.cache"),
        ({"redraft": {"deadline_ms": 0}}, "redraft.deadline_ms"),
        ({"redraft": {"drafts": True}}, "redraft.drafts"),
        ({"redraft": {"regex": "a" * 5000}}, "redraft.regex"),
        ({"redraft": {"choice": []}}, "redraft.choice"),
        ({"redraft": {"choice": ["x" * 70_000]}}, "redraft.choice"),
        ({"redraft": {"decide": True}}, "redraft.decide"),
        ({"redraft": {"decide": True, "choice": ["a"]}}, "redraft.decide"),
        ({"redraft": {"decide": True, "choice": ["a", "a"]}}, "redraft.decide"),
        ({"redraft": {"decide": True, "choice": ["a", "b"]}, "n": 2}, "redraft.decide"),
        ({"redraft": {"decide": True}, "response_format": SCHEMA}, "redraft.decide"),
        ({"stop": "x", "ignore_eos": True}, "stop"),
        ({"stop": "x", "redraft": {"regex": "a+"}}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"includeusage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"x": "y" * 70_000}}}},
         "response_format"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_whole_name(fields, param):
    assert refusal(**fields)["param"] == param


def test_an_unknown_field_is_refused_with_the_nearest_name():
    error = refusal(temprature=1)
    assert "Did you mean 'temperature'?" in error["message"]
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert refusal("completions", messages=[])["param"] == "messages"
    assert refusal("infill", stop="x")["param"] == "stop"
    assert "Did you mean 'steps'?" in refusal(redraft={"step": 1})["message"]


def test_log_probabilities_have_the_bounds_of_each_endpoint():
    assert read(logprobs=True).top_logprobs == 0
    assert read(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert read(logprobs=False).top_logprobs is None
    assert read("completions", logprobs=0).top_logprobs == 0
    assert refusal(top_logprobs=2)["param"] == "top_logprobs"
    assert refusal(logprobs=True, top_logprobs=21)["param"] == "top_logprobs"
    assert refusal("completions", logprobs=6)["param"] == "logprobs"
    assert refusal("completions", logprobs=True)["param"] == "logprobs"
    error = refusal("completions", echo=True, logprobs=1, max_tokens=1)
    assert error["param"] == "echo"
    assert "redraft eval" in error["message"]
    assert read("completions", echo=True).does_echo


def test_constraints():
    assert read(response_format=SCHEMA).constraint == JsonSchema({"type": "integer"})
    assert read(response_format={"type": "json_object"}).constraint == JsonSchema({"type": "object"})
    assert read(redraft={"regex": "a+"}).constraint == Regex("a+")
    both = read(redraft={"choice": ["a", "b"]}, response_format=SCHEMA).constraint
    assert both == All(parts=(Choice(["a", "b"]), JsonSchema({"type": "integer"})))
    assert read("infill", constraint={"schema": True}).constraint == JsonSchema(True)
    assert refusal("infill", constraint={"schemas": True})["param"] == "constraint"
    deep = {"type": "integer"}
    for _ in range(20):
        deep = {"items": deep}
    error = refusal(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": deep}})
    assert "16 deep" in error["message"]


def test_what_is_decided_between():
    assert read(redraft={"decide": True, "choice": ["a", "b"]}).options == ("a", "b")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", None, 1.5]}}}
    assert read(redraft={"decide": True}, response_format=schema).options == ('"a"', "null", "1.5")
    schema["json_schema"]["schema"] = {"type": "boolean"}
    assert read(redraft={"decide": True}, response_format=schema).options == ("false", "true")


def test_streams_say_what_they_were_asked_for():
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = read(stream=True, stream_options=options, redraft={"drafts": True, "deadline_ms": 1500})
    assert (call.is_streamed, call.has_usage, call.has_running_usage, call.wants_drafts) == (True,) * 4
    assert call.deadline_seconds == 1.5


@pytest.mark.parametrize(
    ("message", "read_as"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ("user", "ab")),
        ({"role": "developer", "content": "x"}, ("system", "x")),
        ({"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}, ("assistant", "x")),
        ({"role": "assistant", "content": None}, ("assistant", "")),
    ],
)
def test_messages(message, read_as):
    (read_message,) = read(messages=[message]).prompts[0]
    assert (read_message["role"], read_message["content"]) == read_as


def test_a_role_stays_where_the_template_knows_it():
    template = "{% if m.role == 'developer' or m.role == 'tool' %}"
    for role in ("developer", "tool"):
        call = read(messages=[{"role": role, "content": "x"}], template=template)
        assert call.prompts[0][0]["role"] == role


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user", "content": "x"}] * 1025, "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": "bob"}], "messages[0]"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0]"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_messages_that_are_refused(messages, param):
    assert refusal(messages=messages)["param"] == param


@pytest.mark.parametrize(
    ("prompt", "count"), [("x", 1), ("", 1), (["x", "y"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ([[]], 1)]
)
def test_prompts(prompt, count):
    assert len(read("completions", prompt=prompt).prompts) == count


@pytest.mark.parametrize("prompt", [[], [1, -2], [1.5], [True], ["x", 3], {"a": 1}, None, 7, [[1], "x", None], [2**31]])
def test_prompts_that_are_refused(prompt):
    assert refusal("completions", prompt=prompt)["param"] == "prompt"


def test_many_texts_for_one_request_are_refused():
    assert refusal("completions", prompt=["x"] * 129)["param"] == "n"
    assert refusal("completions", prompt=["x"] * 3, n=64)["param"] == "n"
    assert refusal("completions", prompt=["x", "y"], suffix="z")["param"] == "suffix"


@pytest.mark.parametrize(
    ("segments", "param"),
    [
        (["a"], "segments"),
        ([{"mask": 2**20}, {"mask": 2**20}], "segments"),
        ([{"mask": 1, "id": "x"}, {"mask": 1, "id": "x"}], "segments"),
        (["a", {"mask": 0}], "segments[1]"),
        (["a", {"mask": True}], "segments[1]"),
        (["a", {"hole": 3}], "segments[1]"),
        (["a", {"mask": 3, "id": 7}], "segments[1]"),
        (["a", 3], "segments[1]"),
    ],
)
def test_segments_that_are_refused(segments, param):
    assert refusal("infill", segments=segments)["param"] == param
    assert refusal("infill", stream=True)["param"] == "stream"


def test_a_body_that_lacks_its_prompt():
    for endpoint, name in (("chat", "messages"), ("completions", "prompt"), ("infill", "segments")):
        with pytest.raises(ApiError, match=f"{name} is missing"):
            read_call(endpoint, {})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b"\xff\xfe{\x00}\x00",
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_bodies_that_are_no_json_object(raw):
    with pytest.raises(ApiError, match="the body must be"):
        parse_json(raw)


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json(rb'{"prompt": "\ud83d\ude00"}') == {"prompt": "\U0001f600"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos", "n", "stream",
    "stream_options", "response_format", "redraft", "logprobs", "top_logprobs", "best_of", "logit_bias", "tools",
    "tool_choice", "messages", "prompt", "suffix", "echo", "segments", "constraint", "store", "metadata", "anything",
])  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(list(BASE)), st.dictionaries(NAMES, JSON, max_size=4))
def test_any_json_is_read_or_refused(endpoint, fields):
    with suppress(ApiError):  # anything else is our mistake
        read_call(endpoint, parse_json(json.dumps(BASE[endpoint] | fields).encode()))
