"""Prompts of any form become the ids that were meant, or one reason; tokens become the text that was meant."""

import random

import numpy as np
import pytest
import torch
from sentence_pieces import KINDS, text_lm_of, tokenizer_of
from transformers import BatchEncoding

import redraft
from redraft.prompts import (
    as_batch,
    encode,
    encode_as_text,
    encode_pair,
    encode_with_holes,
    filled_text,
    text_after,
    until_stop,
)

USER = {"role": "user", "content": "ab"}
FORMS = {
    "a list": ([5, 6, 7], [[5, 6, 7]]),
    "a tuple": ((5, 6, 7), [[5, 6, 7]]),
    "a tensor": (torch.tensor([5, 6, 7]), [[5, 6, 7]]),
    "an int32 tensor": (torch.tensor([5, 6, 7], dtype=torch.int32), [[5, 6, 7]]),
    "a 2-D tensor": (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
    "an array": (np.array([5, 6, 7]), [[5, 6, 7]]),
    "a uint16 array": (np.array([5, 6, 7], dtype=np.uint16), [[5, 6, 7]]),
    "a 2-D array": (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
    "a list of numpy scalars": ([np.int64(5), np.int32(6)], [[5, 6]]),
    "a list of scalar tensors": ([torch.tensor(5), torch.tensor(6)], [[5, 6]]),
    "lists in a list": ([[5, 6], [7]], [[5, 6], [7]]),
    "tuples in a tuple": (((5, 6), (7,)), [[5, 6], [7]]),
    "arrays in a list": ([np.array([5, 6]), np.array([7])], [[5, 6], [7]]),
    "tensors in a list": ([torch.tensor([5, 6]), torch.tensor([7])], [[5, 6], [7]]),
    "rows of one row": ([torch.tensor([[5, 6]]), [[7]]], [[5, 6], [7]]),
    "a row of no ids beside one": ([[], [7]], [[], [7]]),
    "an empty tensor": (torch.tensor([]), [[]]),
    "what a tokenizer returns": (BatchEncoding({"input_ids": [5, 6], "attention_mask": [1, 1]}), [[5, 6]]),
    "a dict": ({"input_ids": [5, 6]}, [[5, 6]]),
    "an encoded empty text": ({"input_ids": [], "attention_mask": []}, [[]]),
    "padding on both sides": (
        {"input_ids": torch.tensor([[1, 1, 5], [6, 7, 1]]), "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 0]])},
        [[5], [6, 7]],
    ),
    "padded lists": ({"input_ids": [[1, 5], [6, 7]], "attention_mask": [[0, 1], [1, 1]]}, [[5], [6, 7]]),
    "a padded array": ({"input_ids": np.array([[1, 5]]), "attention_mask": np.array([[False, True]])}, [[5]]),
    "encoded texts in a list": ([{"input_ids": [5, 6]}, {"input_ids": [7]}], [[5, 6], [7]]),
}
NO_PROMPT = {
    "nothing": ([], "there is no prompt"),
    "None": (None, "a prompt is a text, token ids, chat messages.*got NoneType"),
    "a number": (5, "got int"),
    "bytes": (b"abc", "got bytes"),
    "a set": ({5, 6}, "got set"),
    "a dict of something else": ({"text": "abc"}, r"got dict with the keys \['text'\]"),
    "a message without a role": ([{"content": "abc"}], r"got dict with the keys \['content'\]"),
    "a negative id": ([5, -100], "whole numbers from 0 on; got -100"),
    "a negative id in a tensor": (torch.tensor([5, -1]), "whole numbers from 0 on; got -1"),
    "a float": ([5, 6.5], r"whole numbers from 0 on; got 6.5 \(float\)"),
    "a float first": ([6.0, 5], r"got 6.0 \(float\)"),
    "a float tensor": (torch.tensor([5.0]), r"got 5.0 \(float\)"),
    "a float array": (np.array([5.0]), r"got 5.0 \(float\)"),
    "a float scalar tensor": ([5, torch.tensor(6.5)], r"got 6.5 \(float\)"),
    "a bool": ([True, False], r"got True \(bool\)"),
    "a mask": (torch.tensor([True, False]), r"got True \(bool\)"),
    "an id beyond 64 bits": ([2**70], "got 1180591620717411303424"),
    "ids and text": ([5, "abc"], r"got 'abc' \(str\)"),
    "texts and an id": (["abc", 5], r"got 'abc' \(str\)"),
    "a 3-D tensor": (torch.zeros(1, 1, 1, dtype=torch.int64), "got Tensor"),
    "batches in a list": ([[[5], [6]]], "there must be one prompt here; got 2"),
    "a mask of another shape": ({"input_ids": [5, 6], "attention_mask": [1]}, r"got rows of \[2\] ids and \[1\] mask"),
    "text as input_ids": ({"input_ids": "abc"}, "input_ids must be token ids; got abc"),
    "no input_ids": ({"input_ids": None}, "got NoneType"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_in_any_form_is_its_ids(name):
    given, expected = FORMS[name]
    rows = as_batch(given)
    assert all(row.dtype == torch.int64 for row in rows)
    assert [row.tolist() for row in rows] == expected


@pytest.mark.parametrize("name", NO_PROMPT)
def test_what_is_no_prompt_is_refused_with_one_reason(name):
    given, message = NO_PROMPT[name]
    with pytest.raises(ValueError, match=message) as error:
        as_batch(given)
    assert "\n" not in str(error.value)


def test_texts_of_numpy_are_texts():
    for texts in (np.array(["Hello", "no"]), list(np.array(["Hello", "no"])), [np.str_("Hello"), "no"]):
        assert as_batch(texts) == ["Hello", "no"]


def test_one_message_a_chat_and_several_chats_are_told_apart():
    assert as_batch(USER) == [[USER]]
    assert as_batch((USER, USER)) == [[USER, USER]]
    assert as_batch([[USER], [USER, USER]]) == [[USER], [USER, USER]]
    assert as_batch(["a", [USER]]) == ["a", [USER]]
    assert as_batch(np.array(["a", "b"])) == ["a", "b"]


def test_every_call_takes_what_a_tokenizer_returns_and_gives_what_the_text_gives():
    lm = text_lm_of("llama2")
    settings = {"max_new_tokens": 4, "stop": None}
    encoded = lm.tokenizer(["Hello", "Hello self un"], padding=True, return_tensors="pt", add_special_tokens=False)
    expected = lm.generate(["Hello", "Hello self un"], **settings)
    assert torch.stack(lm.generate(encoded, **settings).tokens).equal(torch.stack(expected.tokens))
    last = list(lm.stream(encoded, **settings))[-1]
    assert last.canvas.tokens.tolist()[-1][-4:] == expected.tokens[1].tolist()
    one = lm.tokenizer("Hello", add_special_tokens=False)
    scores = [lm.loglikelihood(given, " self").nats for given in ("Hello", one, torch.tensor([one["input_ids"]]))]
    assert scores[0] == scores[1] == scores[2]
    holes = lm.infill({"input_ids": [[5, 2, 6]], "attention_mask": [[1, 1, 1]]}, steps=1)
    assert holes.sequences[0].tolist() == lm.infill([5, 2, 6], steps=1).sequences[0].tolist()


def test_a_rendered_chat_is_the_chat(text_lm):
    ids = text_lm.tokenizer.apply_chat_template([USER], add_generation_prompt=True)
    settings = {"max_new_tokens": 3, "stop": None}
    expected = text_lm.generate([USER], **settings).sequences[0].tolist()
    for given in (USER, ids, dict(ids), [[USER]]):
        assert text_lm.generate(given, **settings).sequences[0].tolist() == expected


@pytest.mark.parametrize("call", ["generate", "stream", "infill", "loglikelihood", "encode"])
def test_ids_outside_the_vocabulary_are_refused_by_every_call(lm, call):
    for ids, message in (([5, 40], "below the model's vocabulary of 40; got 40"), ([5, -3], "from 0 on; got -3")):
        arguments = (ids, [6]) if call == "loglikelihood" else ([*ids, 2],)
        with pytest.raises(ValueError, match=message):
            getattr(lm, call)(*arguments)
    with pytest.raises(ValueError, match="vocabulary of 40; got 41"):
        lm.loglikelihood([5], [41])


def test_a_chat_template_that_fails_is_told(text_lm):
    from dataclasses import replace

    tokenizer = copy(text_lm.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages .*roles must alternate"):
        replace(text_lm, tokenizer=tokenizer).encode([USER])


def pieces_of(kind, rng):
    """Texts full of what such tokenizers lose: runs of spaces, words without one, bytes, whitespace at the ends."""
    parts = [" ", "  ", "    ", "Hello", "self", "able", "un", ".", "f"]
    parts += [] if kind == "always" else ["\n", "日本", "é"]  # its decoder knows no bytes
    while True:
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 8)))
        text = text.lstrip(" ") if kind in ("first", "always") else text  # Metaspace itself drops a first space
        if text.strip():
            cut = rng.randrange(len(text) + 1)
            yield text[:cut], text[cut:]


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_continuation_spell_the_text_wherever_it_is_cut(kind):
    tokenizer, texts = tokenizer_of(kind), pieces_of(kind, random.Random(0))
    for context, continuation in (next(texts) for _ in range(60)):
        given, asked = encode_pair(tokenizer, context, continuation)
        assert tokenizer.decode([*given.tolist(), *asked.tolist()]) == context + continuation
        stripped = context.rstrip()
        assert text_after(tokenizer, given, asked) == (context + continuation)[len(stripped) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_text_comes_back_unchanged_around_its_holes(kind):
    tokenizer, texts = tokenizer_of(kind), pieces_of(kind, random.Random(1))
    word, space = tokenizer("un self", add_special_tokens=False)["input_ids"][-1], 0
    for before, after in (next(texts) for _ in range(60)):
        prompt = f"{before}[MASK:1]{after}"
        row, is_hole = encode_with_holes(tokenizer, prompt, mask_token_id=2)
        row[is_hole] = word
        space = " " if before or kind == "bytes" else ""
        expected = f"{before}{space}self{after}"
        assert filled_text(tokenizer, prompt, row, is_hole) == expected == tokenizer.decode(row.tolist())


@pytest.mark.parametrize("kind", ["first", "llama2", "bytes"])
@pytest.mark.parametrize("before", [" ", "  "])
def test_a_hole_behind_spaces_alone_holds_what_its_constraint_says(kind, before):
    lm = text_lm_of(kind)
    (text,) = lm.infill(f"{before}[MASK:1]no", constraint=redraft.Choice((" self", " yes")), steps=1).texts
    assert text in (f"{before} selfno", f"{before} yesno")


def test_a_word_goes_on_behind_a_hole():
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        row, is_hole = encode_with_holes(tokenizer, "un[MASK:1]able", mask_token_id=2)
        pieces = tokenizer.convert_ids_to_tokens(row[is_hole.long().argmax() + 1 :].tolist())
        assert pieces[0][0] == "a", kind
        _, asked = encode_pair(tokenizer, "sel", "f.able")
        assert "".join(tokenizer.convert_ids_to_tokens(asked.tolist())) == "f.able", kind


def test_given_text_that_no_token_keeps_stands_in_an_infilled_text_all_the_same():
    tokenizer = tokenizer_of("first")
    prompt = "  Hello[MASK:1] self"
    row, is_hole = encode_with_holes(tokenizer, prompt, mask_token_id=2)
    row[is_hole] = tokenizer.convert_tokens_to_ids(".")
    assert tokenizer.decode(row.tolist()) == " Hello. self"  # Metaspace puts no space before one that is there
    assert filled_text(tokenizer, prompt, row, is_hole) == "  Hello. self"


def test_word_pieces_are_joined_as_words():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[MASK]": 1, "a": 2, "##ble": 3, "un": 4, "##a": 5, "be": 6, "able": 7, "##able": 8}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
    for prompt, piece, expected in (
        ("be [MASK:1] able", "un", "be un able"),
        ("be [MASK:1]able", "un", "be unable"),
        ("be un[MASK:1]", "##able", "be unable"),
        ("[MASK:1] be", "a", "a be"),
    ):
        row, is_hole = encode_with_holes(tokenizer, prompt, mask_token_id=1)
        row[is_hole] = vocabulary[piece]
        assert filled_text(tokenizer, prompt, row, is_hole) == expected
    assert text_after(tokenizer, [6], [4, 8]) == " unable"


def test_special_tokens_before_a_text_are_no_text():
    tokenizer = tokenizer_of("llama2")
    word, end = tokenizer.convert_tokens_to_ids("▁self"), tokenizer.eos_token_id
    assert text_after(tokenizer, [end], [word]) == "self" == tokenizer.decode([end, word], skip_special_tokens=True)
    assert text_after(tokenizer, [end] * 20, [word, word]) == "self self"
    assert text_after(tokenizer, [word, *[end] * 20], [word]) == " self"


@pytest.mark.parametrize("kind", ["llama2", "first", "bytes"])
def test_a_character_across_the_border_spoils_no_more_than_itself(kind):
    tokenizer = tokenizer_of(kind)
    whole = tokenizer("日本", add_special_tokens=False)["input_ids"]
    for cut in range(len(whole) - 6, len(whole) + 1):
        before, new = whole[:cut], whole[cut:]
        assert text_after(tokenizer, whole, new).count("日") == (cut == len(whole) - 6)
        assert "日本".endswith(text_after(tokenizer, before, new).replace("\ufffd", ""))
    longer = tokenizer("Hello" + "日本" * 9, add_special_tokens=False)["input_ids"]
    assert text_after(tokenizer, longer, whole[-6:]) == "日本"


@pytest.mark.parametrize("kind", ["llama2", "first", "bytes"])
@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        (["<|im_end|>"], "yes self", 3),
        (["</s>", "<|im_end|>"], "yes self", 3),
        ([" self"], "yes", 2),
        (["elf"], "yes s", 2),
        (["f<|im_end|>"], "yes sel", 3),
        (["<|im_end|>no"], "yes self", 4),
        (["|im_end"], "yes self", 3),
        (["no"], "yes self", 4),
        (["Hello"], "yes selfno", None),
    ],
)
def test_a_text_ends_before_its_first_stop_string_special_or_not(kind, stop, text, count):
    tokenizer = tokenizer_of(kind)
    before = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    new = [tokenizer("un" + piece, add_special_tokens=False)["input_ids"][-1] for piece in ("yes", " self")]
    new += tokenizer.convert_tokens_to_ids(["<|im_end|>", "no"])
    assert text_after(tokenizer, before, new) == "yes selfno"
    assert until_stop(tokenizer, before, new, stop) == (count, text)


def test_a_text_at_a_stop_is_found_though_half_a_character_follows():
    tokenizer = tokenizer_of("llama2")
    new = tokenizer("un日本", add_special_tokens=False)["input_ids"][1:]
    for extra in range(3):
        assert until_stop(tokenizer, [5], new[: 3 + extra], ["日"]) == (3, "")


def test_an_empty_text_stays_empty_inside_a_row():
    for kind in KINDS:
        assert encode(tokenizer_of(kind), "", is_inside=True).tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_that_a_message_spells_is_text(kind):
    tokenizer = copy(tokenizer_of(kind))  # tests share it
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = tokenizer.eos_token
    plain = encode(tokenizer, [{"role": "user", "content": "ab"}]).tolist()
    assert sum(id in special for id in plain) == 1  # of the template
    for text in (f"a{end}b", end, f" {end}{end} ", f"{tokenizer.mask_token}[MASK:9]"):
        ids = encode(tokenizer, [{"role": "user", "content": text}]).tolist()
        assert [id in special for id in ids] == [False] * (len(ids) - 1) + [True]
        assert not special & set(encode_as_text(tokenizer, text, is_inside=True).tolist())


def test_a_special_token_of_one_character_is_refused_in_a_message(text_lm):
    from copy import deepcopy

    tokenizer = deepcopy(text_lm.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "\u2402"})
    with pytest.raises(ValueError, match="must not hold the special token"):
        encode(tokenizer, [{"role": "user", "content": "a\u2402"}])
