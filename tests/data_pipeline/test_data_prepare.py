import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import redraft
from redraft.data.collate import collate
from redraft.data.config import DataConfig
from redraft.data.packing import pack
from redraft.data.prepare import prepare
from redraft.data.sources import read_documents, split_of
from redraft.data.tokenizer import encode_documents


@pytest.fixture
def config(corpus):
    return DataConfig(source=str(corpus), vocab_size=320, seq_len=32, validation_fraction=0.2)


def all_ids(dataset):
    return [row["input_ids"].tolist() for row in dataset]


def same_windows(first, second):
    pairs = zip((first.train, first.validation), (second.train, second.validation), strict=True)
    return all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a.windows, b.windows, strict=True))


def test_the_windows_are_exactly_the_documents_of_each_split(config, documents):
    data = prepare(config)
    for split, dataset, report in (
        ("train", data.train, data.train_report),
        ("validation", data.validation, data.validation_report),
    ):
        own = [document for document in documents if split_of(document, validation_fraction=0.2) == split]
        if split == "train":
            Random(0).shuffle(own)
        stream = [token for tokens in encode_documents(data.tokenizer, own) for token in [*tokens, 1]]
        assert np.concatenate(dataset.windows.input_ids).tolist() == stream[: len(dataset) * 32]
        assert report.num_documents == len(own)
        assert report.num_tokens == len(stream)
        assert report.num_dropped_tokens == len(stream) - len(dataset) * 32 < 32


def test_rows_are_int32_tensors_that_collate_batches(config):
    data = prepare(config)
    row = data.train[0]
    assert row["input_ids"].shape == row["segment_ids"].shape == (32,)
    assert row["input_ids"].dtype == row["segment_ids"].dtype == torch.int32
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=lambda rows: collate(rows, pad_token_id=0))))
    assert batch["input_ids"].shape == (4, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert (batch["segment_ids"] >= 1).all()


def test_two_calls_and_two_caches_give_the_same_windows(config, tmp_path, monkeypatch):
    first = prepare(config)
    assert same_windows(first, prepare(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert same_windows(first, prepare(config))


def test_a_warm_call_trains_and_tokenises_nothing(config, monkeypatch):
    prepare(config)
    module = sys.modules["redraft.data.prepare"]
    monkeypatch.setattr(module, "encode_documents", None)
    monkeypatch.setattr(module, "train_tokenizer", None)
    prepare(config)


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 16}, {"validation_fraction": 0.3}, {"vocab_size": 330}, {"max_documents": 60}],
)
def test_a_setting_that_changes_the_windows_changes_the_cache(config, change):
    assert not same_windows(prepare(config), prepare(dataclasses.replace(config, **change)))


def test_a_source_that_changes_is_read_again(config):
    before = prepare(config)
    with Path(config.source).open("a") as file:
        file.write(json.dumps({"text": "one more document " * 50}) + "\n")
    after = prepare(config)
    assert after.train_report.num_documents + after.validation_report.num_documents == 81
    assert not same_windows(before, after)


def test_shuffling_permutes_the_training_documents_and_leaves_validation(config):
    data = prepare(config)
    for dataset, is_shuffled in ((data.train, True), (data.validation, False)):
        text = data.tokenizer.decode(dataset.windows.input_ids.reshape(-1))
        numbers = [int(number) for number in re.findall(r"<\|eos\|>(\d+): ", text)]
        assert (numbers != sorted(numbers)) == is_shuffled


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "train.json", "manifest.json"])
def test_a_truncated_cache_is_built_again(config, cache, caplog, name):
    before = prepare(config)
    expected = all_ids(before.train), all_ids(before.validation)
    [path] = cache.glob(f"windows-*/{name}")
    content = path.read_bytes()
    path.unlink()  # the open map keeps the old file
    path.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        after = prepare(config)
    assert "is damaged and is built again" in caplog.text
    assert (all_ids(after.train), all_ids(after.validation)) == expected


def test_a_tokenizer_is_taken_from_the_argument_or_from_a_folder(config, tokenizer, cache, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from_folder = prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer")))
    from_argument = prepare(config, tokenizer=tokenizer)
    assert from_argument.tokenizer is tokenizer
    assert same_windows(from_folder, from_argument)
    assert not list(cache.glob("tokenizer-*"))
    assert len([path for path in cache.glob("windows-*") if path.is_dir()]) == 1


def test_the_cache_is_below_xdg_cache_home_or_in_the_home_folder(config, cache, monkeypatch, tmp_path):
    prepare(config)
    assert list(cache.glob("windows-*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare(config)
    assert list((tmp_path / "home/.cache/redraft/data").glob("windows-*"))


def test_no_validation_is_an_empty_dataset(config):
    data = prepare(dataclasses.replace(config, validation_fraction=0.0))
    assert len(data.validation) == data.validation_report.num_windows == 0
    assert data.train_report.num_documents == 80
    assert len(data.train) > 0


def test_a_split_shorter_than_one_window_names_its_tokens_and_the_window(config, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"the validation split of .* fills no window of seq_len=2000: \d+ tokens in \d+ doc"
    ):
        prepare(dataclasses.replace(config, seq_len=2000), tokenizer=tokenizer)
    (tmp_path / "short.txt").write_text("only this")
    short = dataclasses.replace(config, source=str(tmp_path / "short.txt"), validation_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"the train split of .*short.txt' fills no window of seq_len=32: \d+ tokens in 1 documents"
    ):
        prepare(short, tokenizer=tokenizer)


def test_a_corpus_that_falls_into_validation_whole_says_so_before_it_trains_a_tokenizer(config, tmp_path):
    (tmp_path / "one.txt").write_text("one document " * 100)
    with pytest.raises(ValueError, match=r"the train split of .* 0 tokens in 0 documents. .* \(a text file is one"):
        prepare(dataclasses.replace(config, source=str(tmp_path / "one.txt"), validation_fraction=0.999999))


def test_a_failed_prepare_leaves_no_cache(config, cache, tokenizer):
    with pytest.raises(ValueError):
        prepare(dataclasses.replace(config, seq_len=2000), tokenizer=tokenizer)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1}, r"data.seq_len must lie in \[2, 1048576\]; got 1"),
        ({"vocab_size": 10}, "data.vocab_size must be at least 259; got 10"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction must lie in \[0, 1\); got 1.0"),
        ({"validation_fraction": -0.1}, r"data.validation_fraction must lie in \[0, 1\); got -0.1"),
        ({"max_documents": 0}, "data.max_documents must be at least 1; got 0"),
        ({"source": ""}, "data.source must not be empty"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)


def test_streaming_gives_the_windows_of_the_cache(config, tokenizer, monkeypatch):
    monkeypatch.setattr("redraft.data.prepare.STREAM_VALIDATION_WINDOWS", 3)
    cached = prepare(config, tokenizer=tokenizer)
    streamed = prepare(dataclasses.replace(config, streaming=True), tokenizer=tokenizer)
    assert all_ids(streamed.train) == all_ids(cached.train)
    assert all_ids(streamed.train) == all_ids(cached.train), "a second epoch"
    assert all_ids(streamed.validation) == all_ids(cached.validation)[:3]
    assert streamed.train_report is streamed.validation_report is None


def test_streaming_workers_share_the_documents_without_overlap(config, tokenizer, documents, monkeypatch):
    streamed = prepare(dataclasses.replace(config, streaming=True), tokenizer=tokenizer)
    own = [document for document in documents if split_of(document, validation_fraction=0.2) == "train"]
    Random(0).shuffle(own)
    for number in range(2):  # what torch tells each worker; forked within the tests' threads some never come back
        worker = SimpleNamespace(id=number, num_workers=2)
        monkeypatch.setattr(sys.modules["redraft.data.prepare"], "get_worker_info", lambda worker=worker: worker)
        share = pack(encode_documents(tokenizer, own[number::2]), seq_len=32, eos_token_id=1)[0]
        assert all_ids(streamed.train) == share.input_ids.tolist()


def test_a_stream_stops_at_max_documents(config, tokenizer):
    settings = {"streaming": True, "max_documents": 40}
    streamed = prepare(dataclasses.replace(config, **settings), tokenizer=tokenizer)
    text = tokenizer.decode([token for row in streamed.train for token in row["input_ids"].tolist()])
    assert "41: " not in text


def test_streaming_without_a_tokenizer_or_with_too_little_text_is_an_error(config, tokenizer):
    with pytest.raises(ValueError, match=r"streaming needs a tokenizer; got None\. Give a folder or hub id"):
        prepare(dataclasses.replace(config, streaming=True))
    with pytest.raises(ValueError, match="the validation split of"):
        prepare(dataclasses.replace(config, streaming=True, seq_len=2000), tokenizer=tokenizer)
    no_validation = dataclasses.replace(config, streaming=True, seq_len=10**6, validation_fraction=0.0)
    with pytest.raises(ValueError, match="the train split of"):
        next(iter(prepare(no_validation, tokenizer=tokenizer).train))


def test_an_explicit_error_of_the_source_reaches_the_user(config):
    with pytest.raises(ValueError, match="unknown field 'body'; known are text"):
        prepare(dataclasses.replace(config, text_field="body"))


def test_importing_the_data_pipeline_imports_no_heavy_library():
    script = (
        "import sys; import redraft.data.prepare; heavy = set(sys.modules)"
        " & {'transformers', 'datasets', 'tokenizers', 'pandas', 'pyarrow'}; assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(redraft.__file__).parents[1])}
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    script = "import sys; import redraft.data.config; assert 'torch' not in sys.modules"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr


def test_the_standard_library_prepares_and_keeps_its_splits_apart():
    config = DataConfig(max_documents=40, vocab_size=1000, validation_fraction=0.2)
    data = prepare(config)
    assert len(data.train) > 100
    assert len(data.validation) > 10
    splits = {split_of(document, validation_fraction=0.2) for document in list(read_documents("stdlib"))[:40]}
    assert splits == {"train", "validation"}
