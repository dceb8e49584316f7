"""Streamed text: append-only, and at every end what the whole is decoded to."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_pieces import KINDS, tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redraft.prompts import shown_and_raw, text_after, until_stop
from redraft.serving.text import MOST_HELD, TextReader

PIECES = ["he", "##llo", "do", "n", "'", "t", "s", "m", "ve", "re", ".", ",", "!", "?", "##s", "a"]
EMOJI = "a🙂 é日本🙂🙂 b"


@cache
def word_pieces(is_cleaned):
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", *PIECES])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=is_cleaned)
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=is_cleaned, **names)


@cache
def tokenizer_named(name):
    return tokenizer_of(name) if name in KINDS else word_pieces(name == "cleaned")


NAMES = [*KINDS, "word pieces", "cleaned"]
STOPS = ((), (), ("no",), ("\n\n", "un able"), ("o<|im_end|>",), (">b", "</s>"), ("ab", "abcdefgh"), ("'t", " n"))


def check(tokenizer, before, new, sizes, stop):
    """Stream tokens in pieces; at each of them the row might end."""
    reader, text, at, num_read = TextReader(tokenizer, before, stop=stop), "", 0, 0
    for size in [*sizes, len(new)]:
        at = min(len(new), at + size)
        decided = new[:at]
        is_stopped = any(string in one for one in shown_and_raw(tokenizer, before, decided) for string in stop)
        whole = until_stop(tokenizer, before, decided, stop)[1] if stop else text_after(tokenizer, before, decided)
        assert whole.startswith(text), (whole, text)
        if is_stopped or at == len(new):
            assert text + reader.finish(whole) == whole
            return
        text += reader.push(new[num_read:at])
        num_read = at


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
def test_a_stream_is_append_only_and_ends_as_the_whole_text(name, data):
    tokenizer = tokenizer_named(name)
    tokens = st.integers(0, len(tokenizer) - 1)
    if name in KINDS:  # bytes of characters, often complete ones, beside any token
        spelt = tokenizer(EMOJI, add_special_tokens=False)["input_ids"]
        tokens = st.one_of(tokens, st.sampled_from(spelt))
    before = data.draw(st.lists(tokens, max_size=20))
    new = data.draw(st.lists(tokens, max_size=40))
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=40))
    check(tokenizer, before, new, sizes, data.draw(st.sampled_from(STOPS)))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "always"])  # which writes bytes as <0x0A>
def test_characters_of_several_tokens_are_never_broken(name):
    tokenizer = tokenizer_of(name)
    reader, text = TextReader(tokenizer, []), ""
    for token in tokenizer(EMOJI, add_special_tokens=False)["input_ids"]:
        text += reader.push([token])
        assert "\ufffd" not in text
        assert EMOJI.startswith(text.removeprefix(" "))


@pytest.mark.parametrize("stop", [(), ("\n\n\n", "Hello self able\nHello no", "a do n ' x")])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_decodes_the_new_tokens_and_few_others(name, stop, monkeypatch):
    tokenizer = tokenizer_named(name)
    texts = "a do n ' t. he s, " * 60 if name not in KINDS else "Hello self able\n" * 150
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    reader, sizes, decode = TextReader(tokenizer, [], stop=stop), [], type(tokenizer).decode

    def counted(self, token_ids, **options):
        sizes.append(len(token_ids))
        return decode(self, token_ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    for token in ids:
        reader.push([token])
    assert len(ids) > 400
    assert max(sizes) <= 2 * MOST_HELD
