import json
import random
import re

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from sentence_pieces import tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from redraft.data.tokenizer import (
    encode_documents,
    load_fast_tokenizer,
    require_eos_token,
    require_mask_token,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
)

SPECIAL = ["<|pad|>", "<|eos|>", "<|mask|>"]
texts = st.lists(
    st.one_of(st.text(alphabet=st.characters(codec="utf-8")), st.sampled_from([*SPECIAL, " ", "\r\n", "n't", "ba"]))
)


def word_level(words, **special):
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@given(texts)
def test_every_text_survives_the_round_trip(tokenizer, parts):
    text = "".join(parts)
    [ids] = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
def test_text_never_becomes_a_special_token(tokenizer, parts):
    [ids] = encode_documents(tokenizer, ["".join(parts)])
    assert not {0, 1, 2} & set(ids)


def test_chat_text_still_becomes_special_tokens_after_documents_were_encoded(tokenizer):
    encode_documents(tokenizer, ["<|mask|>"])
    assert tokenizer.encode("<|mask|><|eos|>") == [2, 1]


@given(texts)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer, parts):
    text = "".join(parts)
    [ids] = encode_documents(tokenizer, [text])
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())


def test_byte_lengths_are_0_for_special_tokens_and_cover_the_vocabulary(tokenizer):
    lengths = jaxtyped(typechecker=beartype)(token_byte_lengths)(tokenizer)
    assert lengths.shape == (320,)
    assert (lengths == 0).nonzero().flatten().tolist() == [0, 1, 2]


def test_byte_lengths_of_a_plain_added_token_are_those_of_its_text(documents):
    tokenizer = train_tokenizer(documents, vocab_size=300)
    tokenizer.add_tokens(["<tool é>"])
    assert token_byte_lengths(tokenizer)[300] == len("<tool é>".encode())


def test_byte_lengths_of_other_tokenizers_are_those_of_their_pieces():
    pieces = ["<unk>", "▁the", "é", "<0x0A>", "##ing"]
    backend = Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_byte_lengths(tokenizer).tolist() == [0, 4, 2, 1, 5], "##ing is text without the decoder of word pieces"


def test_training_sets_the_special_tokens_and_does_not_depend_on_order(documents):
    forwards, backwards = (train_tokenizer(order, vocab_size=320) for order in (documents, documents[::-1]))
    assert [forwards.pad_token_id, forwards.eos_token_id, forwards.mask_token_id] == [0, 1, 2]
    assert len(forwards) == 320
    assert tokenizer_fingerprint(forwards) == tokenizer_fingerprint(backwards)


def test_literal_special_tokens_in_the_corpus_do_not_enter_the_merges():
    tokenizer = train_tokenizer(["<|mask|> <|mask|> abab"] * 50, vocab_size=262)
    assert not {0, 1, 2} & set(encode_documents(tokenizer, ["<|mask|>"])[0])


def test_a_vocabulary_beyond_the_corpus_is_an_error_that_names_what_it_supports():
    with pytest.raises(
        ValueError, match=r"support a vocabulary of 263 tokens; got vocab_size=4096. Use vocab_size=263 or"
    ):
        train_tokenizer(["hello"], vocab_size=4096)
    assert len(train_tokenizer(["hello"], vocab_size=263)) == 263
    with pytest.raises(ValueError, match="a vocabulary of 259 tokens; got vocab_size=100. Use vocab_size=259 or more."):
        train_tokenizer(["hello"], vocab_size=100)


def test_a_saved_tokenizer_loads_with_the_same_fingerprint(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_fast_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert require_mask_token(loaded) == 2
    assert require_eos_token(loaded) == 1


def test_the_fingerprint_ignores_the_last_call_and_sees_content(tokenizer, documents):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.backend_tokenizer.no_padding()
    assert tokenizer_fingerprint(train_tokenizer(documents, vocab_size=321)) != before


@pytest.mark.parametrize("content", [None, {}, {"tokenizer.json": "{"}])
def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path, content):
    folder = tmp_path / "absent" if content is None else tmp_path
    for name, text in (content or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(
        ValueError, match=r"cannot read the tokenizer of|holds no tokenizer. Give a folder with tokenizer.json"
    ):
        load_fast_tokenizer(folder)


def test_a_model_without_its_tokenizer_is_an_error_not_an_empty_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="holds no tokenizer. Give a folder with tokenizer.json"):
        load_fast_tokenizer(tmp_path)


def test_a_tokenizer_file_is_refused_in_favour_of_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a folder or a hub id; got the file"):
        load_fast_tokenizer(tmp_path / "tokenizer.json")


def test_missing_mask_and_eos_tokens_say_how_to_add_them():
    tokenizer = word_level(["[UNK]", "a"], unk_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"must have mask_token; .* Add it: tokenizer.add_special_tokens\(\{'mask_token'"
    ):
        require_mask_token(tokenizer)
    with pytest.raises(
        ValueError, match=r"must have eos_token; .* Add it: tokenizer.add_special_tokens\(\{'eos_token'"
    ):
        require_eos_token(tokenizer)


def test_a_word_piece_tokenizer_splits_a_literal_mask(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "mask", "a"]
    tokenizer = BertTokenizerFast(vocab={word: id for id, word in enumerate(words)})
    assert encode_documents(tokenizer, ["a [MASK]"]) == [[8, 5, 7, 6]]


def test_a_tokenizer_that_cannot_spell_its_mask_is_an_error():
    tokenizer = word_level(["[UNK]", "a", "[MASK]"], unk_token="[UNK]", mask_token="[MASK]")
    assert encode_documents(tokenizer, ["a b"]) == [[1, 0]]
    with pytest.raises(ValueError, match=r"the text holds '\[MASK\]' and this tokenizer cannot encode it as ordinary"):
        encode_documents(tokenizer, ["a [MASK]"])


def test_no_documents_encode_to_none(tokenizer):
    assert encode_documents(tokenizer, []) == []
    assert encode_documents(tokenizer, [""]) == [[]]
    assert token_byte_lengths(tokenizer).dtype == torch.int64


@pytest.mark.parametrize(("kind", "is_cut"), [("bytes", True), ("first", False), ("always", False), ("llama2", False)])
def test_a_long_document_is_encoded_in_pieces_where_that_changes_no_token(kind, is_cut, monkeypatch):
    rng, tokenizer = random.Random(0), tokenizer_of(kind)
    words = ["self", "yes", "no", "the", "é", "  ", "\n", "x", "def f(x):", "12", " "]
    text = " ".join(rng.choice(words) for _ in range(4000))
    whole = encode_documents(tokenizer, [text, "yes"])
    monkeypatch.setattr("redraft.data.tokenizer.LONGEST_PIECE", 500)
    lengths, encode = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **k: lengths.append(len(texts[0])) or encode(self, texts, **k)
    )
    assert encode_documents(tokenizer, [text, "yes"]) == whole
    assert (max(lengths) < 1000) == is_cut


def test_a_long_document_without_a_place_to_cut_is_encoded_at_once(tokenizer, monkeypatch):
    text = "ab" * 2000
    whole = encode_documents(tokenizer, [text])
    monkeypatch.setattr("redraft.data.tokenizer.LONGEST_PIECE", 500)
    assert encode_documents(tokenizer, [text]) == whole


def test_a_text_cut_after_an_indentation_or_at_a_line_end_keeps_its_tokens():
    code = "def f(x):\n    if x:\n        return x\n\n    return 0\n\n\nclass A:\n\tb = 1  \n    pass\n"
    tokenizer = train_tokenizer([code * 20], vocab_size=288)
    cuts = [*re.finditer(r"\n[ \t]*(?=\S)", code), *re.finditer(r"\S(?=\s*\n)", code)]
    for cut in (match.end() for match in cuts):
        [left], [right] = (encode_documents(tokenizer, [part]) for part in (code[:cut], code[cut:]))
        assert [left + right] == encode_documents(tokenizer, [code])
    assert len(cuts) == 13


def test_a_tokenizer_of_an_earlier_version_loads_and_encodes_as_it_did(tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(["a:\n    b"], trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False))
    special = dict(zip(("pad_token", "eos_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    loaded = load_fast_tokenizer(tmp_path)
    [ids] = encode_documents(loaded, ["a:\n    b"])
    assert [loaded.decode([id]) for id in ids] == ["a", ":", "\n   ", " b"]
