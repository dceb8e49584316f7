"""Conversations in windows and batches, built data, pairs: the same tokens and targets whichever way they go."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from redraft.cli import main
from redraft.data.chat import Example, encode_conversations
from redraft.data.collate import PassSampler, collate, collate_preferences, targets_of
from redraft.data.config import ChatConfig, DataConfig
from redraft.data.packing import best_fit, pack_examples
from redraft.data.prepare import build_data, prepare
from redraft.data.records import as_conversation
from redraft.data.sources import read_documents
from redraft.data.tokenizer import encode_documents


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, documents):
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    records = [
        {"instruction": f"{i}?", "output": " ".join(document.split()[: chance.randint(2, 12)])}
        for i, document in enumerate(documents * 3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def config(conversations, tmp_path):
    return DataConfig(source=str(conversations), kind="chat", seq_len=128, validation_fraction=0.2)


def segments(dataset):
    """Every conversation in a dataset: its tokens and its targets."""
    found = Counter()
    for row in (dataset[i] for i in range(len(dataset))):
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            own = row["segment_ids"] == segment
            found[tuple(row["input_ids"][own].tolist()), tuple(row["is_target"][own].tolist())] += 1
    return found


@pytest.mark.parametrize(("eos_block", "is_folder"), [(1, False), (16, False), (1, True)])
def test_plain_text_beside_conversations_is_learnt_whole(
    config, conversations, chat_tokenizer, documents, eos_block, is_folder, tmp_path
):
    text = tmp_path / ("books" if is_folder else "book.txt")
    text.mkdir() if is_folder else text.write_text("\n\n".join(documents))
    for number, document in enumerate(documents if is_folder else []):
        (text / f"{number}.md").write_text(document)
    chat = ChatConfig(eos_block=eos_block)
    alone = prepare(replace(config, chat=chat), tokenizer=chat_tokenizer)
    mixed = replace(config, chat=chat, source=f"{conversations}:0.2,{text}:0.8")
    data = prepare(mixed, tokenizer=chat_tokenizer)
    found = segments(data.train) + segments(data.validation)
    turns = segments(alone.train) + segments(alone.validation)
    plain = {segment: times for segment, times in found.items() if segment not in turns}
    assert set(found) & set(turns)
    assert plain
    assert all(all(is_target) and len(ids) <= config.seq_len for ids, is_target in plain)
    assert any(len(ids) == config.seq_len for ids, _ in plain)
    assert data.train_report.num_too_long == 0
    pieces = encode_conversations(chat_tokenizer, [as_conversation(documents[0] * 9)], config=chat, seq_len=32)
    ids = [*chat_tokenizer(documents[0] * 9, add_special_tokens=False)["input_ids"], chat_tokenizer.eos_token_id]
    assert [id for piece in pieces for id in piece.input_ids.tolist()][: len(ids)] == ids
    assert len(pieces) == -(-len(ids) // 32) > 1


def of_source(config, tokenizer, dataset_split):
    from redraft.data.sources import split_of

    texts = read_documents(config.source, kind="chat")
    own = [text for text in texts if split_of(text, validation_fraction=0.2) == dataset_split]
    examples = encode_conversations(tokenizer, own, config=config.chat, seq_len=config.seq_len)
    return Counter((tuple(e.input_ids.tolist()), tuple(e.is_target.tolist())) for e in examples)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_conversation_whole_and_wastes_little(lengths):
    bins = best_fit(lengths, capacity=20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 20 for items in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 20) * 2
    examples = [Example(np.full(n, i + 1, np.int32), np.arange(n) % 2 == 0) for i, n in enumerate(lengths)]
    windows = pack_examples(examples, seq_len=20, pad_token_id=0)
    for row, items in enumerate(bins):
        for segment, item in enumerate(items, start=1):
            own = windows.segment_ids[row] == segment
            assert windows.input_ids[row][own].tolist() == examples[item].input_ids.tolist()
            assert windows.is_target[row][own].tolist() == examples[item].is_target.tolist()
    assert not windows.is_target[windows.segment_ids == 0].any()


@pytest.mark.parametrize(("batching", "streaming"), [("packed", False), ("packed", True), ("grouped", False)])
@pytest.mark.parametrize("eos_block", [1, 16])
def test_every_conversation_is_in_its_split_once_and_every_target_is_attended_to(
    config, chat_tokenizer, batching, eos_block, streaming, monkeypatch
):
    monkeypatch.setattr("redraft.data.prepare.STREAM_VALIDATION_WINDOWS", 999)
    chat = ChatConfig(batching=batching, eos_block=eos_block)
    config = replace(config, chat=chat, streaming=streaming)
    data = prepare(config, tokenizer=chat_tokenizer)
    train = list(data.train)
    assert segments(train) == of_source(config, chat_tokenizer, "train")
    assert segments(data.validation) == of_source(config, chat_tokenizer, "validation")
    assert all((row["segment_ids"][row["is_target"]] > 0).all() for row in train)
    assert all(len(tokens) % eos_block == 0 for tokens, _ in segments(train))
    if not streaming:
        report = data.train_report
        assert report.num_tokens == sum(int((row["segment_ids"] > 0).sum()) for row in train)
        assert report.num_target_tokens == sum(int(row["is_target"].sum()) for row in train)
        if batching == "packed":
            assert report.efficiency == report.num_tokens / (len(train) * 128)
            assert report.efficiency > 0.9


def test_a_batch_is_padded_without_targets_and_text_has_all_tokens_as_targets(config, chat_tokenizer):
    config = replace(config, chat=ChatConfig(batching="grouped"))
    data = prepare(config, tokenizer=chat_tokenizer)
    batch = collate([data.train[i] for i in range(8)], pad_token_id=7)
    assert batch["is_target"].dtype == torch.bool
    is_padding = batch["segment_ids"] == 0
    assert is_padding.any()
    assert not batch["is_target"][is_padding].any()
    assert torch.equal(targets_of(batch), batch["is_target"])
    del batch["is_target"]
    assert torch.equal(targets_of(batch), ~is_padding)


def test_batches_of_like_lengths_waste_less_and_are_a_function_of_seed_and_pass():
    chance = random.Random(0)
    lengths = [int(chance.lognormvariate(4.5, 0.8)) + 1 for _ in range(1003)]
    sampler = PassSampler(len(lengths), batch_size=8, seed=3, lengths=lengths)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert len(set(orders[0])) == len(orders[0]) == len(sampler) == 1000  # whole batches
    assert set(range(1003)) - set(orders[0]) != set(range(1003)) - set(orders[1])

    def efficiency(order):
        batches = [[lengths[i] for i in order[first : first + 8]] for first in range(0, 1000, 8)]
        return sum(map(sum, batches)) / sum(8 * max(batch) for batch in batches)

    assert efficiency(orders[0]) > 0.9 > 0.5 > efficiency(range(1003))


def test_a_setting_of_the_chat_changes_the_cache_and_the_template_too(config, chat_tokenizer, cache, tmp_path):
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    changes = [{}, {"loss_on": "all"}, {"eos_block": 4}, {"template": str(tmp_path / "other.jinja")}]
    for change in changes:
        prepare(replace(config, chat=ChatConfig(**change)), tokenizer=chat_tokenizer)
    folders = [path for path in cache.glob("windows-*") if path.is_dir()]
    assert len(folders) == len(changes)


def test_conversations_train_their_own_tokenizer_on_their_texts(config):
    data = prepare(replace(config, vocab_size=300))
    assert data.tokenizer.chat_template is not None
    assert data.train_report.num_too_long == 0
    row = data.train[0]
    first = data.tokenizer.decode(row["input_ids"][row["segment_ids"] == 1])
    assert first.startswith("User:\n")
    assert first.endswith("<|eos|>")


def test_conversations_that_do_not_fit_are_counted_and_all_of_them_is_an_error(config, chat_tokenizer):
    short = prepare(replace(config, seq_len=24), tokenizer=chat_tokenizer)
    assert short.train_report.num_cut > 0
    assert short.train_report.num_too_long > 0
    assert f"{short.train_report.num_too_long} examples too long" in short.train_report.describe(seq_len=24)
    with pytest.raises(
        ValueError, match=r"the train split of .* no window of seq_len=2: .*, \d+ conversations too long"
    ):
        prepare(replace(config, seq_len=2), tokenizer=chat_tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"random_length": 0.1}, "random_length is for kind text"),
        ({"random_length": 2.0, "kind": "text"}, r"data.random_length must lie in \[0, 1\]; got 2.0"),
        ({"chat": ChatConfig(eos_block=48)}, "data.chat.eos_block must divide data.seq_len; got 48 and 128"),
        ({"chat": ChatConfig(batching="grouped"), "streaming": True}, "data.chat.batching grouped needs all lengths"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_window_is_cut_to_a_random_length_as_often_as_asked(corpus, tokenizer, tmp_path):
    config = DataConfig(source=str(corpus), seq_len=8, max_documents=24)
    whole = prepare(config, tokenizer=tokenizer)
    cut = prepare(replace(config, random_length=0.3), tokenizer=tokenizer)
    streamed = prepare(replace(config, random_length=0.3, streaming=True), tokenizer=tokenizer)

    def lengths_of(dataset):
        return [int((row["segment_ids"] > 0).sum()) for row in dataset]

    lengths = lengths_of(cut.train)
    assert 0.2 < sum(length < 8 for length in lengths) / len(lengths) < 0.35  # 7 of 8 lengths are shorter
    assert set(lengths) == set(range(1, 9))
    for length, row, expected in zip(lengths, cut.train, whole.train, strict=True):
        assert torch.equal(row["segment_ids"][:length], expected["segment_ids"][:length])
        assert torch.equal(row["input_ids"], expected["input_ids"])
    assert lengths == lengths_of(streamed.train)
    assert set(lengths_of(cut.validation)) == {8}


def test_an_endless_stream_is_exact_from_any_point_and_shuffles_each_pass_anew(corpus, tokenizer, tmp_path):
    config = DataConfig(source=str(corpus), seq_len=32, streaming=True)
    finite = prepare(config, tokenizer=tokenizer).train
    num_windows = len(list(finite))
    endless = replace(finite, is_endless=True)

    def rows(first, count):
        loader = iter(DataLoader(endless, batch_size=None))
        return [next(loader)["input_ids"].tolist() for _ in range(first + count)][first:]

    whole = rows(0, 3 * num_windows)
    for first in (num_windows - 2, num_windows + 5, 2 * num_windows + 1):
        assert rows(first, 5) == whole[first : first + 5]
    assert whole[:num_windows] == [row["input_ids"].tolist() for row in finite]
    assert whole[:num_windows] != whole[num_windows : 2 * num_windows]
    with pytest.raises(ValueError, match="the train split of .* fills no window"):
        next(iter(replace(endless, config=replace(config, seq_len=10**6))))


def same(first, second):
    pairs = zip((first.train, first.validation), (second.train, second.validation), strict=True)
    return all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a.windows, b.windows, strict=True))


@pytest.fixture
def built(config, chat_tokenizer, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = replace(config, tokenizer=str(tmp_path / "tokenizer"))
    build_data(settings, tmp_path / "built")
    return settings


def test_built_data_are_the_prepared_data_without_their_source(built, tmp_path, monkeypatch):
    expected = prepare(built)
    taken = replace(built, source=str(tmp_path / "built"), tokenizer=None)
    data = prepare(taken)
    assert same(data, expected)
    assert data.train_report == expected.train_report
    assert data.tokenizer.chat_template == expected.tokenizer.chat_template
    assert same(prepare(replace(taken, tokenizer=built.tokenizer)), expected)


def test_built_data_refuse_another_tokenizer_other_settings_and_damage(built, tokenizer, tmp_path):
    taken = replace(built, source=str(tmp_path / "built"), tokenizer=None)
    with pytest.raises(
        ValueError, match="was built with another tokenizer than the one given. Leave data.tokenizer out"
    ):
        prepare(taken, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="was built with seq_len=128; got 64. Set data.seq_len to the former"):
        prepare(replace(taken, seq_len=64))
    with pytest.raises(ValueError, match="was built with chat=.*'loss_on': 'last'.*got .*'loss_on': 'all'"):
        prepare(replace(taken, chat=ChatConfig(loss_on="all")))
    with pytest.raises(
        ValueError, match="was built with max_documents=None; got 5. Set data.max_documents to the former"
    ):
        prepare(replace(taken, max_documents=5))
    with pytest.raises(ValueError, match="built data cannot be mixed; got .*built'"):
        prepare(replace(taken, source=f"{taken.source}:0.5,stdlib:0.5"))
    path = tmp_path / "built" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the built data in .* are damaged or incomplete. Build them again"):
        prepare(taken)


def test_building_touches_no_folder_that_holds_something_else(built, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine' exists. Choose another folder or remove it"):
        build_data(built, tmp_path / "mine")
    with pytest.raises(ValueError, match="built' exists"):
        build_data(replace(built, seq_len=256), tmp_path / "built")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_command_builds_and_tells_mistakes_in_one_line(corpus, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", str(tmp_path / "tokenizer"), "--seq-len", "32"]

    def code(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(["data", *arguments])
        return exit_.value.code

    assert code("build", str(corpus), str(tmp_path / "out"), *flags) == 0
    said = capsys.readouterr().out
    assert "windows of 32 (" in said
    assert said.count("--data.seq-len 32") == said.count("--data.validation-fraction") == 1  # what must be the same
    assert len(prepare(DataConfig(source=str(tmp_path / "out"), seq_len=32)).train) > 10
    for arguments, message in (
        (["bild"], "unknown command of redraft data 'bild'; known are build, packages. Did you mean 'build'?"),
        (["build", str(corpus)], "redraft data build needs SOURCE and OUT"),
        (["build", str(corpus), str(corpus), *flags], "exists. Choose another folder or remove it"),
        (["build", str(corpus), "x", "--streaming"], "writes the whole source; got --streaming"),
    ):
        assert code(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert code() == 0
    assert "usage: redraft data build SOURCE OUT" in capsys.readouterr().out


PAIRS = [
    {"prompt": f"{i}?", "chosen": f"ba {i}", "rejected": "lo mi ne ru sta ki ve on tra" * (1 + 9 * (i % 2))}
    for i in range(40)
]


def as_messages(pair):
    prompt = [{"role": "user", "content": pair["prompt"]}]
    return {name: [*prompt, {"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}


def write(path: Path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs_of(source, tokenizer, *, seq_len=512, validation_fraction=0.0):
    settings = {"kind": "preference", "seq_len": seq_len, "validation_fraction": validation_fraction}
    return prepare(DataConfig(source=source, **settings), tokenizer=tokenizer)


def test_pairs_share_their_prompt_and_only_the_answers_are_targets(tmp_path, chat_tokenizer):
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    data = pairs_of(source, chat_tokenizer).train
    assert len(data) == 40
    batch = collate_preferences([data[i] for i in range(3)], pad_token_id=0)
    assert batch["input_ids"].shape[0] == 6
    for i in range(3):
        texts = [chat_tokenizer.decode(batch["input_ids"][row][batch["is_target"][row]]) for row in (i, i + 3)]
        assert texts == [f"{PAIRS[i][name]}<|im_end|>" for name in ("chosen", "rejected")]
        prompts = [
            batch["input_ids"][row][(batch["segment_ids"][row] > 0) & ~batch["is_target"][row]] for row in (i, i + 3)
        ]
        assert torch.equal(*prompts)
    whole = pairs_of(write(tmp_path / "m.jsonl", map(as_messages, PAIRS)), chat_tokenizer).train
    for name in ("chosen", "rejected"):
        texts = [[row[name]["input_ids"].tolist() for row in (rows[i] for i in range(40))] for rows in (whole, data)]
        assert texts[0] == texts[1]


def test_pairs_are_split_by_prompt_and_those_too_long_are_counted(tmp_path, chat_tokenizer):
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    data = pairs_of(source, chat_tokenizer, validation_fraction=0.3)
    assert len(data.train) + len(data.validation) == 40
    assert 0 < len(data.validation) < 40
    short = pairs_of(source, chat_tokenizer, seq_len=64)
    assert 0 < len(short.train) == 40 - short.train_report.num_too_long // 2 < 40
    with pytest.raises(ValueError, match="seq_len=3: 0 tokens in 40 documents, 80 conversations too long"):
        pairs_of(source, chat_tokenizer, seq_len=3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "response": "b"},
            "no known schema; it has prompt, response. Known are prompt/chosen/rejected",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "message 2: an empty assistant turn"),
        (
            {"chosen": as_messages(PAIRS[0])["chosen"], "rejected": as_messages(PAIRS[1])["rejected"]},
            "chosen and rejected must answer the same prompt",
        ),
    ],
)
def test_a_bad_pair_is_one_clear_error(tmp_path, chat_tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(write(tmp_path / "a.jsonl", [record]), chat_tokenizer, seq_len=64)


def test_of_pairs_the_last_answer_alone_is_learnt():
    with pytest.raises(
        ValueError, match="preference pairs learn only the last answer; got data.chat.loss_on all. Use last"
    ):
        DataConfig(source="pairs.jsonl", kind="preference", chat=ChatConfig(loss_on="all"))


def test_documents_are_still_encoded_as_text_only(chat_tokenizer):
    assert not {300, 301} & set(encode_documents(chat_tokenizer, ["<|im_start|>"])[0])


def test_a_message_may_be_called_a_document_as_any_role(config, chat_tokenizer, tmp_path):
    turns = [
        {"role": "document", "content": "the sky is blue"},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "blue"},
    ]
    (tmp_path / "found.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(9)))
    config = replace(config, source=str(tmp_path / "found.jsonl"), validation_fraction=0.0, seq_len=128)
    row = prepare(config, tokenizer=chat_tokenizer).train[0]
    first = row["segment_ids"] == 1
    text = chat_tokenizer.decode(row["input_ids"][first])
    assert all(message["content"] in text for message in turns)
    assert "blue" in chat_tokenizer.decode(row["input_ids"][row["is_target"] & first])
    assert "sky" not in chat_tokenizer.decode(row["input_ids"][row["is_target"] & first])


def test_a_stream_of_conversations_and_texts_is_a_mixture_from_its_beginning(config, chat_tokenizer, tmp_path):
    chance = random.Random(0)
    chats = [{"prompt": f"what is {i}?", "response": "so " * chance.randint(1, 9)} for i in range(2000)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    source = f"{tmp_path / 'chats.jsonl'}:1,stdlib:1"
    config = replace(config, source=source, streaming=True, seq_len=96, chat=ChatConfig())
    rows = list(islice(prepare(config, tokenizer=chat_tokenizer).train, 2000))
    is_text = [bool(row["is_target"][row["segment_ids"] > 0].all()) for row in rows]
    share = sum(is_text) / len(rows)
    for first in range(0, len(rows) - 99, 100):
        assert 0 < sum(is_text[first : first + 100]) < 100
        assert abs(sum(is_text[first : first + 100]) / 100 - share) < 0.2
