"""Fields of records and messages: used, refused, or told of once with their number; nothing is dropped in silence."""

import json
import logging

import pandas
import pytest

from redraft.data.chat import encode_conversations
from redraft.data.config import ChatConfig, DataConfig
from redraft.data.prepare import prepare
from redraft.data.sources import read_documents

U, A = {"role": "user", "content": "ba?"}, {"role": "assistant", "content": "lo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(source, **settings):
    return [json.loads(document) for document in read_documents(str(source), kind="chat", **settings)]


@pytest.fixture
def read_one(tmp_path):
    def read_it(record):
        [messages] = read(write(tmp_path / "a.jsonl", [record]))
        return messages

    return read_it


@pytest.fixture
def read_messages(read_one):
    return lambda *messages: read_one({"messages": list(messages)})


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_answer_of_weight_0_is_kept_as_given_whatever_the_framework_calls_it(read_messages, name, value):
    masked = {**A, name: value}
    assert read_messages(U, masked, U, A) == [U, {**A, "weight": 0}, U, A]
    assert read_messages(U, A, U, masked) == [U, A], "after the last answer to be learnt nothing is learnt"
    assert read_messages({**U, name: 0}, {**A, name: 1}) == [U, A]
    with pytest.raises(ValueError, match="line 1: every assistant turn has weight 0, so there is nothing to learn"):
        read_messages(U, masked)
    for other in (0.5, "no", [0, 1]):
        with pytest.raises(ValueError, match=rf"line 1: message 2: {name} must be 0 or 1; got "):
            read_messages(U, {**A, name: other})


def test_weights_decide_what_is_learnt(tmp_path, chat_tokenizer):
    turns = [U, {**A, "weight": 0}, {**U, "content": "mi?"}, {"role": "assistant", "content": "ne", "weight": 1}]
    documents = list(read_documents(str(write(tmp_path / "a.jsonl", [{"messages": turns}])), kind="chat"))
    [example] = encode_conversations(chat_tokenizer, documents, config=ChatConfig(loss_on="all"), seq_len=99)
    assert chat_tokenizer.decode(example.input_ids[example.is_target]) == "ne<|im_end|>"
    assert "lo<|im_end|>" in chat_tokenizer.decode(example.input_ids[~example.is_target])


def test_tools_and_calls_are_read_whether_objects_or_json(read_one):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    said = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"}
    expected = [{**U, "tools": TOOLS}, {**called, "content": ""}, said, A]
    as_json = {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]}
    assert read_one({"messages": [U, called, said, A], "tools": TOOLS}) == expected
    assert read_one({"messages": [U, as_json, said, A], "tools": json.dumps(TOOLS)}) == expected
    assert read_one({"messages": [U, {**A, "tool_calls": None}], "tools": []}) == [U, A]
    assert read_one({"prompt": "ba?", "response": "lo", "tools": TOOLS}) == [{**U, "tools": TOOLS}, A]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [U, {**A, "tool_calls": [{"name": "f"}]}]}, "message 2: tool_calls must be a list of"),
        ({"messages": [U, {**A, "tool_calls": "f(x)"}]}, "message 2: tool_calls is not JSON"),
        (
            {"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
            "message 2: the arguments of a tool call is not JSON",
        ),
        ({"messages": [U, A], "tools": "f"}, "line 1: tools is not JSON"),
        ({"messages": [U, A], "tools": {"f": 1}}, "line 1: tools must be a list of functions' JSON schemas"),
        ({"messages": [U, {**A, "thinking": ["x"]}]}, "message 2: field 'thinking' must be a string; got list"),
        ({"messages": [U, {**A, "content": None}]}, "message 2: field 'content' must be a string; got NoneType"),
        ({"messages": [U, {**A, "content": [{"type": "text", "text": "a"}]}]}, "must be a string; got list"),
        ({"messages": [U, {**A, "role": 3}]}, "message 2: role must be a name such as user; got 3"),
        ({"messages": [U, A, {**A, "role": "<|im_end|>"}]}, "message 3: role must be a name"),
        ({"messages": [U, A, U, {**A, "role": "gpt"}]}, "a message of role 'gpt' follows the last answer"),
        ({"messages": [{"role": "system", "content": "x"}, U, A], "system": "y"}, "two system messages that differ"),
        ({"instruction": "a", "output": "b", "history": "none"}, "history must be a list of .question, answer."),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history must be a list of .question, answer."),
        ({"instruction": "a", "output": "b", "system": 3}, "message 1: field 'content' must be a string; got int"),
        ({"prompt": [U], "completion": [{**U, "content": "other"}, A]}, "whole conversation with another prompt"),
        ({"messages": 3, "history": [["q", "a"]]}, "messages must be a list of"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(read_one, record, message):
    with pytest.raises(ValueError, match=message) as error:
        read_one(record)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_of_the_assistant_are_kept_for_the_template(read_messages, name):
    assert read_messages(U, {**A, name: "so"}) == [U, {**A, name: "so"}]
    assert read_messages(U, {**A, name: ""}) == [U, A]


def test_the_system_message_and_the_history_of_alpaca_records_come_first(read_one):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "be brief"}
    system = {"role": "system", "content": "be brief"}
    last = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
    assert read_one(record) == [system, *last]
    history = [["ba?", "lo"], ["ba?", "lo"]]
    assert read_one(record | {"history": history}) == [system, U, A, U, A, *last]
    assert read_one(record | {"history": [], "system": ""}) == last
    assert read_one({"prompt": "ba?", "response": "lo", "system_prompt": "be brief"}) == [system, U, A]
    assert read_one({"messages": [U, A], "system": "be brief"}) == [system, U, A]
    assert read_one({"messages": [system, U, A], "system": "be brief"}) == [system, U, A]


def test_a_completion_that_repeats_its_prompt_is_the_whole_conversation(read_one):
    assert read_one({"prompt": "ba?", "completion": [U, A]}) == [U, A]
    assert read_one({"prompt": [U], "response": [U, A]}) == [U, A]


def test_fields_that_are_not_used_are_told_once_with_their_number(tmp_path, caplog, chat_tokenizer):
    records = [
        {
            "messages": [{"role": "user", "content": f"{i}?", "name": "eva"}, {**A, "prefix": True, "name": None}],
            "id": i,
        }
        for i in range(9)
    ]
    source = write(tmp_path / "a.jsonl", [*records, {"messages": [U, {**A, "function_call": {"name": "f"}}], "id": ""}])
    config = DataConfig(source=str(source), kind="chat", seq_len=32, validation_fraction=0.3)
    with caplog.at_level(logging.WARNING):
        prepare(config, tokenizer=chat_tokenizer)  # three passes over the source
    assert [record.getMessage() for record in caplog.records] == [
        f"Fields of {source} that are not used, and how often they occur: function_call of assistant"
        " messages (1), id (9),"
        " name of user messages (9), prefix of assistant messages (9)."
    ]
    caplog.clear()
    assert len(list(read_documents(str(source), kind="chat"))) == 10
    assert not caplog.records


def test_fields_are_told_where_reading_stops_early(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", [{"messages": [U, A], "id": i} for i in range(9)])
    with caplog.at_level(logging.WARNING):
        documents = read_documents(str(source), kind="chat")
        next(documents)
        documents.close()
    assert f"Fields of {source} that are not used, and how often they occur: id (1)." in caplog.text


def test_nulls_that_tables_fill_in_are_no_fields(tmp_path, caplog):
    records = [
        {"messages": [U, {**A, "tool_calls": [CALL]}], "tools": json.dumps(TOOLS), "system": None},
        {"messages": [{**U, "weight": 1.0}, {**A, "weight": 0.0}, A], "tools": None, "system": "be brief"},
    ]
    pandas.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        first, second = read(tmp_path / "a.parquet")
    assert first[1]["tool_calls"][0]["function"] == CALL["function"]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "assistant"]
    assert [m.get("weight") for m in second] == [None, None, 0, None]
    assert first[0]["tools"] == TOOLS
    assert not any("tools" in m or "tool_calls" in m for m in second)
    assert "weight of user messages (1)" in caplog.text, "a user's turn is never learnt"
