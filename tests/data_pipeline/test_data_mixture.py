import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.sources import WeightedSource, interleave, parse_mixture, read_documents


def test_a_part_keeps_the_colons_of_its_hub_id():
    assert parse_mixture("a/b:config@train:0.3/500, stdlib:7e-1") == [
        WeightedSource("a/b:config@train", 0.3, 500),
        WeightedSource("stdlib", 0.7, None),
    ]
    assert parse_mixture("a/b:2.0") is None


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 9), min_size=4, max_size=4),
)
def test_every_beginning_of_a_mixture_has_the_shares_to_within_one_document(lengths, weights):
    streams = [
        ([str(i) * n for n in own], weight) for i, (own, weight) in enumerate(zip(lengths, weights, strict=False))
    ]
    mixed = list(interleave([(iter(documents), weight) for documents, weight in streams]))
    total = sum(weight for _, weight in streams)
    taken = [0] * len(streams)
    for document in mixed:
        taken[int(document[0])] += len(document)
        for own, (_, weight) in zip(taken, streams, strict=True):
            assert abs(own / weight - sum(taken) / total) <= 50 / min(weights)
    for i, (documents, _) in enumerate(streams):
        own = [document for document in mixed if document[0] == str(i)]
        assert own == documents[: len(own)], "in the order of the source, none twice"
    assert any(len([d for d in mixed if d[0] == str(i)]) == len(own) for i, (own, _) in enumerate(streams))


@pytest.fixture
def two_sources(tmp_path, documents):
    for name, own in (("a", documents[:50]), ("b", documents[30:])):  # 20 documents are in both
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    return f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.jsonl:0.75"


def test_a_path_with_a_comma_is_one_source(tmp_path, documents, tokenizer):
    path = tmp_path / "one, two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = DataConfig(source=str(path), seq_len=16, validation_fraction=0.3)
    assert len(prepare(config, tokenizer=tokenizer).train)


def test_a_mixture_is_deterministic_and_its_limit_holds(two_sources):
    assert list(read_documents(two_sources)) == list(read_documents(two_sources))
    limited = two_sources.replace(":0.25", ":0.25/2")
    documents = list(read_documents(limited))
    own = set(read_documents(two_sources.split(":")[0]))
    assert len([text for text in documents if text in own and int(text.partition(":")[0]) < 30]) == 2


def test_training_and_validation_share_no_document_of_a_mixture(two_sources, tokenizer, tmp_path):
    config = DataConfig(source=two_sources, seq_len=16, validation_fraction=0.3)
    data = prepare(config, tokenizer=tokenizer)
    sides = [
        {text.partition(":")[0] for text in tokenizer.decode(dataset.windows.input_ids.reshape(-1)).split("<|eos|>")}
        for dataset in (data.train, data.validation)
    ]
    numbers = [{text for text in side if text.isdecimal()} for side in sides]
    assert all(len(side) > 5 for side in numbers)
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlib:0.3,x.txt", "a mixture must be SOURCE:WEIGHT,SOURCE:WEIGHT .*; got 'x.txt' in 'stdlib:0.3,x.txt'"),
        ("stdlib:0.3,a:b", "a mixture must be .*; got 'a:b' in"),
        ("stdlib:1,", "a mixture must be .*; got '' in"),
        ("stdlib:-0.3,stdlib:1", "with positive weights, .*; got 'stdlib:-0.3' in"),
        ("stdlib:0,stdlib:1", "with positive weights, .*; got 'stdlib:0' in"),
        ("stdlib:nan,stdlib:1", "with positive weights, .*; got 'stdlib:nan' in"),
        ("stdlib:1e999,stdlib:1", "with positive weights, .*; got 'stdlib:1e999' in"),
        ("stdlib:1.2.3,stdlib:1", "with positive weights, .*; got 'stdlib:1.2.3' in"),
        ("stdlib:1/0,stdlib:1", "/LIMIT after a weight for the first LIMIT documents only; got 'stdlib:1/0' in"),
        (",".join(["stdlib:1"] * 60) + ",stdlbi.txt:1", "no file or folder 'stdlbi.txt'"),
        ("stdlib:1,stdlbi.txt:1", "no file or folder 'stdlbi.txt'"),
    ],
)
def test_a_wrong_mixture_is_one_clear_error(source, message):
    with pytest.raises(ValueError, match=message):
        list(islice(read_documents(source), 99))
