"""Holes in texts: their sizes are taken at their word, or refused."""

import pytest
import torch

from redraft.prompts import encode_with_holes


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def holes(text):
    return encode_with_holes(Letters(), text, mask_token_id=2)


@pytest.mark.parametrize("size", ["3", "003", "0" * 5000 + "3"])
def test_a_hole_takes_as_many_tokens_as_it_says(size):
    row, is_hole = holes(f"a[MASK:{size}]b")
    assert is_hole.tolist() == [False, True, True, True, False]
    assert row[~is_hole].tolist() == [ord("a"), ord("b")]


@pytest.mark.parametrize("text", ["a[MASK:0]b", "a[MASK:000]b", "a[MASK:2]b[MASK:0]"])
def test_a_hole_of_no_token_is_refused(text):
    with pytest.raises(ValueError, match=r"a hole takes at least 1 token; got \[MASK:0\]"):
        holes(text)


@pytest.mark.parametrize(
    "text", ["a[MASK:100000000]", "[MASK:" + "9" * 5000 + "]", "[MASK:1048576]" * 1000, "[MASK:1048576][MASK:1]"]
)
def test_holes_that_can_only_be_a_mistake_are_refused_before_they_are_laid_out(text, monkeypatch):
    monkeypatch.setattr(torch, "full", None)
    with pytest.raises(ValueError, match="the holes of a text take at most 1048576 tokens together; got"):
        holes(text)


def test_mask_tokens_in_a_text_are_holes_of_one_token():
    row, is_hole = holes("a\2b[MASK:2]\2")
    assert is_hole.tolist() == [False, True, False, True, True, True]
    assert row.tolist() == [ord("a"), 2, ord("b"), 2, 2, 2]
