"""Bytes of tokens: what constraints see is what the tokenizer decodes."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from redraft.constraints.kinds import Regex
from redraft.constraints.token_bytes import leading_space, token_bytes
from redraft.data.tokenizer import train_tokenizer

TEXTS = ["héllo wörld, 日本語 日本語 😀😀", "def f(x):\n\treturn x  # naïve", "  spaces   and\r\nlines", "\x00\x7f ÿ Ā"]


def test_bytes_of_a_byte_level_vocabulary_join_to_the_decoded_text():
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=290)
    pieces = token_bytes(tokenizer)
    assert [pieces[id] for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)] == [
        None
    ] * 3
    for id, piece in enumerate(pieces):
        if piece is not None:
            assert piece.decode(errors="replace") == tokenizer.decode([id])
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(0x80), rng.randrange(0xD000), 0x1F600])) for _ in range(12))
        assert b"".join(pieces[id] for id in tokenizer(text)["input_ids"]).decode() == text


def wrapped(vocab, decoder, **special):
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def test_sentence_pieces_are_spaces_and_single_bytes():
    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "<0xE6>": 4, "é▁x": 5}
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = wrapped(vocab, decoders.Sequence(steps), eos_token="</s>")
    assert token_bytes(tokenizer) == [None, None, b" the", b"\n", b"\xe6", "é x".encode()]
    assert b"".join(token_bytes(tokenizer)[id] for id in (5, 3, 2)).decode() == tokenizer.decode([5, 3, 2])


def test_word_pieces_bring_the_space_before_them():
    tokenizer = wrapped({"<unk>": 0, "un": 1, "##til": 2, "now": 3}, decoders.WordPiece(cleanup=False))
    pieces = token_bytes(tokenizer)
    assert pieces == [None, b" un", b"til", b" now"]
    assert b"".join(pieces[id] for id in (1, 2, 3)).decode() == " " + tokenizer.decode([1, 2, 3])
    assert leading_space(tokenizer) == "added"
    compiled = Regex("until now").compile(pieces, eos_token_id=None, leading_space="added")
    tokens, is_noise = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    assert tokenizer.decode(compiled.complete(tokens, is_noise, torch.arange(3), torch.zeros(3, 4))) == "until now"


def test_a_first_space_that_decoding_drops_is_not_part_of_the_text():
    vocab = {"<unk>": 0, "</s>": 1, "▁yes": 2, "yes": 3}
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    tokenizer = wrapped(vocab, decoders.Sequence(steps), eos_token="</s>")
    assert leading_space(tokenizer) == "stripped"
    compiled = Regex("yes").compile(token_bytes(tokenizer), eos_token_id=1, leading_space="stripped")
    for preferred in (2, 3):
        logits = torch.zeros(2, 4)
        logits[0, preferred] = 5.0
        x_0 = compiled.complete(torch.zeros(2, dtype=torch.int64), torch.ones(2).bool(), torch.arange(2), logits)
        assert x_0.tolist() == [preferred, 1]


def test_added_words_are_their_text_and_ids_without_a_token_nothing():
    tokenizer = wrapped({"<unk>": 0, "a": 3}, decoders.Fuse())
    tokenizer.add_tokens(["<think>"])
    pieces = token_bytes(tokenizer)
    assert pieces[1] is None
    assert pieces[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="must be a fast one"):
        token_bytes(Slow())
