"""Sources that are damaged, hostile or very large: a reason in one line, nothing moved, nothing waited for."""

import json
import logging
import os
import random
import re
import socket
import struct
from pathlib import Path

import datasets
import pandas
import pytest

from redraft.data.files import cut_at_blank_lines
from redraft.data.sources import read_documents
from redraft.data.tokenizer import _cut_runs, encode_documents, train_tokenizer

pytestmark = pytest.mark.timeout(60)


def read(source, **settings):
    return list(read_documents(str(source), **settings))


def records_of(path, content):
    path.write_bytes(content)
    return read(path)


CSV = {  # content -> documents
    "quoted newlines and commas": (b'id,text\n1,"a, b\r\n\r\nc"\n2,"say ""hi"""\n', ["a, b\r\n\r\nc", 'say "hi"']),
    "a byte-order mark": (b"\xef\xbb\xbftext,id\na,1\n", ["a"]),
    "a mark and quotes": (b'\xef\xbb\xbf"text","id"\n"a",1\n', ["a"]),
    "windows line ends": (b"text\r\na\r\nb\r\n", ["a", "b"]),
    "old line ends": (b"text\ra\rb\r", ["a", "b"]),
    "empty lines": (b"\n\ntext,id\n\na,1\n  \n\nb,2\n\n", ["a", "b"]),
    "empty fields": (b"text,id\n,1\na,\n", ["a"]),
    "no end of the last line": (b"text\na", ["a"]),
    "an unnamed first column": (b",text\n0,a\n", ["a"]),
    "quotes inside": (b'text\nan inch is 1" long\n', ['an inch is 1" long']),
    "other separators of lines": ("text\na\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
    "a long field": (b"text\n" + b"ab " * 100_000 + b"\n", ["ab " * 100_000]),
}
BAD_CSV = {
    "longer than a header of one": (
        b"text\nHello, world\n",
        "line 2: 2 fields, but the header has 1 .text.. Put quotes",
    ),
    "longer by one": (b"text,id\na,1\nb,c,2\n", "line 3: 3 fields, but the header has 2"),
    "moved columns": (b"id,text\nHi, there,Hello, you\n", "line 2: 4 fields, but the header has 2"),
    "shorter": (b"text,id\na,1\n\nb\n", "line 4: 1 fields, but the header has 2"),
    "shorter, first": (b"text,id,x\na,1\n", "line 2: 2 fields, but the header has 3"),
    "after a quoted line end": (b'text,id\n"a\n\nb",1\nc\n', "line 5: 1 fields, but the header has 2"),
    "an end too many": (b"text,id\na,1,\n", "line 2: 3 fields, but the header has 2"),
    "a name twice": (b"text,id,text\na,1,b\n", "line 1: the header has 'text' twice. Rename one"),
    "no header": (b"Hello there\nfoo\n", "line 2: unknown field 'text'; known are Hello there"),
    "semicolons": (b"text;id\na;1\n", "line 2: unknown field 'text'; known are text;id"),
    "an open quote": (b'text,id\na,1\n"b,2\nc,3\n', "line 3: not a CSV table .unexpected end of data.. Quote"),
    "text after a quote": (b'text\n"a"b\n', "line 2: not a CSV table"),
}


@pytest.mark.parametrize("name", CSV)
def test_a_csv_table_is_read_as_it_was_written(tmp_path, name):
    content, expected = CSV[name]
    assert records_of(tmp_path / "a.csv", content) == expected


@pytest.mark.parametrize("name", BAD_CSV)
def test_a_csv_row_that_does_not_fit_its_header_is_refused_with_its_line(tmp_path, name):
    content, message = BAD_CSV[name]
    with pytest.raises(ValueError, match=rf"a\.csv, {message}") as error:
        records_of(tmp_path / "a.csv", content)
    assert "\n" not in str(error.value)


def test_conversations_of_a_csv_table_do_not_change_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\nHi, there,Hello, you\n")
    with pytest.raises(ValueError, match="line 2: 4 fields, but the header has 2 .prompt, response."):
        read(path, kind="chat")
    path.write_text('prompt,response\n"Hi, there","Hello, you"\n')
    [conversation] = map(json.loads, read(path, kind="chat"))
    assert [message["content"] for message in conversation] == ["Hi, there", "Hello, you"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_a_folder_skips_what_is_no_file_with_a_warning_each(tmp_path, caplog, suffix):
    (tmp_path / "good.txt").write_text("good")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"nothing{suffix}").symlink_to(tmp_path / "absent")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    (tmp_path / f"memory{suffix}").symlink_to("/proc/self/mem")  # a file that cannot be read
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        server.bind(f"socket{suffix}")
        os.chdir(before)
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path) == ["good"]
    told = sorted(record.getMessage() for record in caplog.records)
    reasons = {
        "device": "is not a regular file, or a broken link",
        "loop": "is not a regular file, or a broken link",
        "memory": "cannot be read (Input/output error)",
        "nothing": "is not a regular file, or a broken link",
        "pipe": "is not a regular file, or a broken link",
        "socket": "is not a regular file, or a broken link",
    }
    assert told == [
        f"Skipped a file: {tmp_path}/{name}{suffix} {reason}. Leave it out." for name, reason in reasons.items()
    ]


def test_links_to_folders_are_told_and_never_followed_in_a_circle(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "good.txt").write_text("good")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == ["good"]
    assert f"Skipped {tmp_path}/a/up: it is a link to a folder." in caplog.text


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "pipe.csv"])
def test_a_pipe_is_no_source(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is not a regular file, or a broken link. Leave it out."):
        read(tmp_path / name)


@pytest.mark.parametrize("depth", [1_000, 5_000, 200_000])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_deeply_nested_json_is_refused_with_its_place(tmp_path, depth, suffix):
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        with pytest.raises(ValueError, match=rf"a{suffix}.*: JSON that cannot be read \(maximum recursion") as error:
            records_of(tmp_path / f"a{suffix}", b'{"text": "x", "more": ' + value.encode() + b"}")
        assert "\n" not in str(error.value)


def test_every_depth_of_nesting_is_read_or_refused_in_one_line(tmp_path):
    function = '{"name": "f", "arguments": {"x": NESTED}}'
    answer = '{"role": "assistant", "content": "b", "tool_calls": [{"function": FUNCTION}]}'.replace(
        "FUNCTION", function
    )
    outcomes = set()
    for depth in range(700, 1000):  # the stack above counts too
        nested = "[" * depth + "]" * depth
        (tmp_path / "a.jsonl").write_text('{"messages": [ANSWER]}'.replace("ANSWER", answer).replace("NESTED", nested))
        outcomes.add(outcome(tmp_path / "a.jsonl", kind="chat"))
    assert outcomes - {"JSON that cannot be read", "a record nested too deeply"} == {1}


def outcome(path, **settings):
    """The number of documents, or what is wrong with a source, in one line."""
    try:
        return len(read(path, **settings))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return re.fullmatch(r"[^ ]+(?:, line \d+)?: ([\w ]+).*", str(error))[1].strip()


def test_a_number_of_too_many_digits_is_refused_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: JSON that cannot be read \(Exceeds the limit"):
        records_of(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b", "n": ' + b"1" * 5000 + b"}\n")


DOCUMENTS = [f"{i} ba lo é mi" * (i % 7 + 1) for i in range(200)]


def test_damaged_parquet_is_refused_in_one_line_or_read_whole(tmp_path):
    chance = random.Random(0)
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"text": DOCUMENTS}).to_parquet(path, compression="zstd", write_page_checksum=True)
    whole = path.read_bytes()
    found = []
    for number in range(80):
        damaged = bytearray(whole)
        if number % 2:
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            damaged = damaged[: chance.randrange(len(whole))]
        path.write_bytes(damaged)
        found.append(outcome(path))
        assert found[-1] != len(DOCUMENTS) or read(path) == DOCUMENTS
    assert set(found) <= {len(DOCUMENTS), "damaged", "unknown field"}
    assert set(found[::2]) == {"damaged"}, "every truncated file"


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["caf\u00e9 ba lo"]}).to_parquet(path, compression=None, use_dictionary=False)
    with pytest.raises(
        ValueError, match=r"a.parquet: damaged, or in another format, after row 0 \('utf-8' codec can't"
    ):
        records_of(path, path.read_bytes().replace("\u00e9".encode(), b"\xe9\xe9"))


def test_a_damaged_saved_dataset_is_refused_and_does_not_end_the_process(tmp_path):
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    whole = path.read_bytes()
    lengths = [len(document.encode()) for document in DOCUMENTS]
    offset = whole.index(struct.pack("<3i", 0, lengths[0], sum(lengths[:2]))) + 4
    for damaged in (whole[:500], whole[: len(whole) // 2], whole[:offset] + b"\xff" * 4 + whole[offset + 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"saved' is damaged \(") as error:
            read(tmp_path / "saved")
        assert "\n" not in str(error.value)


def test_long_runs_of_empty_lines_are_cut_as_short_ones_are():
    text = "a\n\n\nb \n \n\tc\n" + "\n" * 300_000 + " \n" * 100_000 + "d"  # quadratic time would be hours
    parts = list(cut_at_blank_lines(text, min_characters=1))
    assert "".join(parts) == text
    assert parts[:5] == ["a\n", "\n", "\nb \n", " \n\tc\n", "\n"]
    assert len(parts) == 400_004


def test_words_are_learnt_from_pieces_of_bounded_length_since_the_time_is_quadratic_in_a_word():
    chance = random.Random(0)
    line = "".join(chance.choices("abcdefgh", k=8_000))
    document = f"ba lo\n{line} mi {line[:999]}" + "\n" * 2500
    pieces = list(_cut_runs(document))
    assert "".join(pieces) == document
    assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) == 1000
    assert list(_cut_runs(DOCUMENTS[5])) == [DOCUMENTS[5]]
    tokenizer = train_tokenizer([document], vocab_size=270)
    assert tokenizer.decode(encode_documents(tokenizer, [document])[0]) == document
