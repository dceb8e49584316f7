import json
import logging

import datasets
import pandas
import pytest

from redraft.data.sources import documents_fingerprint, read_documents


def read(source, **settings):
    return list(read_documents(str(source), **settings))


def test_stdlib_is_python_without_its_tests():
    documents = read("stdlib")
    assert len(documents) > 300
    assert not any(document.startswith("\ufeff") for document in documents)
    assert any("class OrderedDict" in document for document in documents)
    assert not any("class TestHeap" in document for document in documents)
    assert documents == read("stdlib")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_with_its_newlines_as_they_are(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xc3\xa9\n")
    assert read(path) == ["one\r\n\ntwo é\n"]


def test_every_record_file_gives_the_same_documents(tmp_path):
    documents = ["one", 'two, "quoted"\nlines', "drei é 語", "NA", "007"]
    records = [{"id": index, "body": document} for index, document in enumerate(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    pandas.DataFrame(records).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert read(tmp_path / f"a.{suffix}", text_field="body") == documents, suffix


def test_a_json_file_may_be_one_record(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "only"}')
    assert read(tmp_path / "a.json") == ["only"]


def test_a_folder_is_walked_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c/d.txt", "a.txt", ".git/x.txt", ".hidden.txt", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "a/c/d.txt", "a/z.md", "b.txt"]


def test_a_folder_skips_text_that_is_not_utf8_and_says_so(tmp_path, caplog):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == ["good"]
    assert "latin.txt is not UTF-8 (byte 3)" in caplog.text


def test_empty_and_null_documents_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_a_saved_dataset_is_recognised_with_and_without_splits(tmp_path):
    train, test = datasets.Dataset.from_dict({"text": ["a", "b"]}), datasets.Dataset.from_dict({"text": ["c"]})
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "one") == read(tmp_path / "many") == ["a", "b"]
    assert read(f"{tmp_path / 'many'}@test") == ["c"]
    with pytest.raises(ValueError, match=r"unknown split of .* 'tset'; known are train, test. Did you mean 'test'\?"):
        read(f"{tmp_path / 'many'}@tset")
    with pytest.raises(ValueError, match="unknown field 'body'; known are text"):
        read(tmp_path / "one", text_field="body")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("name", ("name", None, "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/na-me.2:config-v1.0@test[:10%]", None),
        ("owner/na-me.2:config-v1.0@test", ("owner/na-me.2", "config-v1.0", "test")),
        ("owner/name@validation", ("owner/name", None, "validation")),
    ],
)
def test_a_hub_id_takes_a_config_and_a_split(monkeypatch, source, expected):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split))
        dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if expected is None:
        with pytest.raises(ValueError, match="no file or folder"):
            read(source)
        return
    assert read(source) == read(source, streaming=True) == ["a", "b"]
    assert calls == [expected] * 2


def test_a_hub_id_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'no/where' on the Hub\n(OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match="no file or folder 'no/where', and the hub did not give it: Couldn't"
    ) as error:
        read("no/where")
    assert "\n" not in str(error.value)


BAD_FILES = {
    "empty.txt": (b"", "holds no text. Give a file with text"),
    "empty.jsonl": (b"\n\n", "holds no text"),
    "empty.json": (b"", "holds no text"),
    "empty.csv": (b"", "holds no text"),
    "null.json": (b"[]", "holds no text"),
    "nul.txt": (b"a\0b", "nul.txt holds NUL bytes, so it is not text. Convert it"),
    "latin.txt": (b"caf\xe9", r"latin.txt is not UTF-8 \(byte 3\). Convert it"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"latin.jsonl, line 2 is not UTF-8 \(byte 10\)"),
    "nul.csv": (b"text\na\0b\n", "nul.csv holds NUL bytes"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"broken.jsonl, line 3: not JSON \(Expecting value, column"),
    "broken.json": (b'[{"text": "a"},\n{"text": }]', r"broken.json, line 2: not JSON|broken.json: not JSON"),
    "list.jsonl": (b'["a"]', r'list.jsonl, line 1: a record must be \{"text": "..."\}; got list'),
    "field.jsonl": (b'{"txt": "a", "id": 1}', r"line 1: unknown field 'text'; known are txt, id. Did you mean 'txt'\?"),
    "field.json": (
        b'[{"text": "a"}, {"body": "b"}]',
        "field.json, record 2: unknown field 'text'; known are body. Set --data.text-field",
    ),
    "chat.jsonl": (b'{"messages": []}', "unknown field 'text'; known are messages. Use --data.kind chat"),
    "field.csv": (b"body,id\na,1\n", "field.csv, line 2: unknown field 'text'; known are body, id"),
    "type.jsonl": (b'{"text": ["a"]}', "type.jsonl, line 1: field 'text' must be a string; got list"),
    "lone.jsonl": (b'{"text": "a\\ud800"}', "lone.jsonl, line 1: field 'text' holds a lone surrogate"),
    "broken.csv": (
        b'text,id\na,1\nb,2,3,4\n"',
        "broken.csv, line 3: 4 fields, but the header has 2",
    ),
    "broken.parquet": (b"PAR1 no", "broken.parquet: damaged, or in another format"),
    "image.png": (b"\x89PNG", r"'.*image.png' holds no documents. Give a folder, or a file of .md, .py, .txt, .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_error(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_field_lists_its_fields(tmp_path):
    pandas.DataFrame({"body": ["a"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="unknown field 'text'; known are body, n"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="field 'n' must be a string; got int"):
        read(tmp_path / "a.parquet", text_field="n")


def test_a_path_that_does_not_exist_suggests_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no file or folder '.*corpse.txt'. Did you mean 'corpus.txt'\? Give an"):
        read(tmp_path / "corpse.txt")
    with pytest.raises(
        ValueError,
        match=r"no file or folder '/no/such/place'. Give an existing path, 'stdlib', 'site-packages' or a hub id",
    ):
        read("/no/such/place")


def test_a_mistyped_stdlib_is_suggested(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(ValueError, match=r"Did you mean 'stdlib'\?"):
        read("stdlb")


def test_an_empty_folder_and_a_split_of_a_plain_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"holds no file that can be read: .md"):
        read(tmp_path)
    with pytest.raises(ValueError, match="only a dataset has splits"):
        read(f"{tmp_path}@test")


def test_a_damaged_saved_dataset_is_an_error(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        read(tmp_path)


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "c"}')
    (tmp_path / "b.json").write_text('[{"text": "ab"}, {"text": "c"}]')
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"text": "bc"}]')
    (tmp_path / "d.json").write_text('[{"text": "ab"}]')
    a, b, c, d = (documents_fingerprint(read(tmp_path / name)) for name in ("a.jsonl", "b.json", "c.json", "d.json"))
    assert a == b
    assert len({a, c, d}) == 3
    assert documents_fingerprint(read(tmp_path / "a.jsonl")[:1]) == d
