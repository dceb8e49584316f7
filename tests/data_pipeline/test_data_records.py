"""Records of every schema, and what is wrong with them."""

import json

import datasets
import pandas
import pytest

from redraft.data.sources import read_documents

ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]
EXPECTED = [
    [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
    [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}],
]


def read(source, **settings):
    return [json.loads(document) for document in read_documents(str(source), kind="chat", **settings)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions_and_answers(question, answer):
    return [{question: messages[0]["content"], answer: messages[1]["content"]} for messages in EXPECTED]


@pytest.mark.parametrize(
    "records",
    [
        ALPACA,
        questions_and_answers("prompt", "response"),
        questions_and_answers("prompt", "completion"),
        questions_and_answers("instruction", "output"),
        [{"messages": messages, "id": 1} for messages in EXPECTED],
        [{"prompt": messages[:1], "completion": messages[1:]} for messages in EXPECTED],
    ],
    ids=["alpaca", "response", "completion", "output", "messages", "lists"],
)
def test_every_schema_gives_the_same_conversations(tmp_path, records):
    assert read(write(tmp_path / "a.jsonl", records)) == EXPECTED


def test_every_kind_of_file_and_dataset_gives_the_same_conversations(tmp_path):
    records = [{"messages": messages} for messages in EXPECTED]
    (tmp_path / "a.json").write_text(json.dumps(records))
    pandas.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / ".saved")
    pandas.DataFrame(ALPACA).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.json", "a.parquet", ".saved", "a.csv"):
        assert read(tmp_path / name) == EXPECTED, name
    (tmp_path / "notes.md").write_text("no conversation")
    (tmp_path / "a.csv").unlink()
    assert read(tmp_path) == EXPECTED * 2, "a folder is read without its text files"


def test_what_follows_the_last_answer_is_left_out(tmp_path):
    messages = [*EXPECTED[0], {"role": "user", "content": "and?"}]
    assert read(write(tmp_path / "a.jsonl", [{"messages": messages}])) == EXPECTED[:1]


BAD = {
    "pairs of answers": (
        {"question": "a", "chosen": "b", "rejected": "c"},
        "no known schema; it has chosen, question, rejected.*Pairs of answers need --data.kind preference",
    ),
    "no known schema": ({"text": "a"}, r"line 2: no known schema; it has text\. Known are messages, prompt/response"),
    "mixed": (
        {"prompt": "a", "response": "b"},
        r"line 2: a record of prompt/response, but those before it have messages\. Use",
    ),
    "empty answer": (
        {"messages": [EXPECTED[0][0], {"role": "assistant", "content": " \n"}]},
        "line 2: message 2: an empty assistant turn",
    ),
    "no answer": (
        {"messages": EXPECTED[0][:1]},
        "line 2: no assistant turn, so there is nothing to learn",
    ),
    "not a list": ({"messages": "hi"}, "line 2: messages must be a list of"),
    "no role": ({"messages": [{"content": "hi"}]}, "line 2: messages must be a list of"),
    "content": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "line 2: message 1: field 'content' must be a string; got list",
    ),
    "surrogate": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "line 2: message 1: field 'content' holds a lone",
    ),
    "list": (["a"], "line 2: a record must be an object; got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_clear_error_that_names_it(tmp_path, name):
    record, message = BAD[name]
    path = write(tmp_path / "a.jsonl", [{"messages": EXPECTED[0]}, record])
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_an_empty_file_and_a_text_hold_no_conversation(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ValueError, match=r"a\.jsonl' holds no conversation with an answer"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.txt' holds no records\. Give a folder, or a file of \.jsonl"):
        read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="'stdlib' holds documents, not records. Use data.kind text"):
        read("stdlib")
