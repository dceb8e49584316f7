"""Which tokens of a conversation are learnt, and that nothing else of it changes."""

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_pieces import tokenizer_of

from redraft.data.chat import DEFAULT_TEMPLATE, ChatConfig, cut_at_turns, encode_conversations, with_chat_template
from redraft.data.tokenizer import train_tokenizer
from redraft.prompts import text_after

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "lo mi?"},
    {"role": "assistant", "content": "ba ne"},
    {"role": "user", "content": "and ru?"},
    {"role": "assistant", "content": "sta"},
]
words = st.text("ab \né<", min_size=1, max_size=12).filter(str.strip)


def encode(tokenizer, messages, *, seq_len=512, **settings):
    [example] = encode_conversations(tokenizer, [json.dumps(messages)], config=ChatConfig(**settings), seq_len=seq_len)
    return example


def replace_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer, example):
    """The stretches of targets, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.is_target, [0]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_the_last_or_all_answers_are_learnt_with_their_end(chat_tokenizer):
    last, every = (encode(chat_tokenizer, TURNS, loss_on=which) for which in ("last", "all"))
    assert learnt(chat_tokenizer, last) == ["sta<|im_end|>"]
    assert learnt(chat_tokenizer, every) == ["ba ne<|im_end|>", "sta<|im_end|>"]
    assert last.input_ids.tolist() == every.input_ids.tolist()
    whole = chat_tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert chat_tokenizer.decode(last.input_ids) == whole.removesuffix("\n"), "nothing given follows the answer"


@settings(max_examples=40)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from(["last", "all"]))
def test_what_is_given_is_encoded_exactly_as_the_prompt_at_generation(chat_tokenizer, pairs, loss_on):
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    example = encode(chat_tokenizer, messages, loss_on=loss_on)
    prompt = chat_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ids = chat_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    if loss_on == "last":
        assert not example.is_target[:start].any()
        assert example.input_ids[:start].tolist() == ids
    assert example.is_target[-1]
    answers = [f"{answer}<|im_end|>" for _, answer in pairs]
    assert learnt(chat_tokenizer, example) == (answers if loss_on == "all" else answers[-1:])


def test_a_merge_across_the_border_is_undone(documents):
    tokenizer = train_tokenizer(["ab" * 50, "a: ab ab"] * 20, vocab_size=262)
    assert len(tokenizer.encode("ab")) == 1
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}a{{ m['content'] }}<|eos|>{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    example = encode(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}])
    assert example.input_ids.tolist() == [*tokenizer.encode("xa"), *tokenizer.encode("b"), 1]
    assert example.is_target.tolist() == [False, False, True, True]


def test_a_piece_behind_an_undone_merge_gets_no_space_of_its_own():
    tokenizer = copy.deepcopy(tokenizer_of("llama2"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}sel{{ m['content'] }}</s>{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}sel{% endif %}"
    )
    for answer in ("f.able", "f self"):
        example = encode(tokenizer, [{"role": "user", "content": "un"}, {"role": "assistant", "content": answer}])
        assert tokenizer.decode(example.input_ids.tolist()) == f"unsel{answer}</s>"
        learnt_ids = example.input_ids[example.is_target].tolist()
        assert text_after(tokenizer, [5], learnt_ids, with_special=True) == f"{answer}</s>"


def test_eos_fills_the_last_block_and_is_learnt(chat_tokenizer):
    train = encode(chat_tokenizer, TURNS)
    padded = encode(chat_tokenizer, TURNS, eos_block=32)
    size = len(train.input_ids)
    assert len(padded.input_ids) == -(-size // 32) * 32 > size
    assert padded.input_ids[:size].tolist() == train.input_ids.tolist()
    assert (padded.input_ids[size:] == chat_tokenizer.eos_token_id).all()
    assert padded.is_target[size:].all()


def test_a_template_without_an_end_gets_eos_and_the_default_is_said_and_saved(documents, caplog, tmp_path):
    bare = train_tokenizer(documents, vocab_size=300)
    with caplog.at_level(logging.WARNING):
        tokenizer = with_chat_template(bare, ChatConfig())
    assert "the tokenizer has no chat template: the default is used and saved" in caplog.text
    assert bare.chat_template is None
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    example = encode(tokenizer, TURNS, loss_on="all")
    assert learnt(tokenizer, example) == ["ba ne<|eos|>", "sta<|eos|>"]
    assert tokenizer.decode(example.input_ids).startswith(
        "System:\nbe brief\n\nUser:\nlo mi?\n\nAssistant:\nba ne<|eos|>"
    )
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }};{% endfor %}")
    own = with_chat_template(bare, ChatConfig(template=str(tmp_path / "own.jinja")))
    assert learnt(own, encode(own, TURNS)) == ["sta;<|eos|>"]
    with pytest.raises(ValueError, match="data.chat.template must be a text file; got 'absent.jinja'"):
        with_chat_template(bare, ChatConfig(template="absent.jinja"))


@pytest.mark.parametrize("seq_len", range(3, 60))
def test_truncation_always_leaves_the_whole_answer_and_something_of_its_prompt(chat_tokenizer, seq_len):
    whole = encode(chat_tokenizer, TURNS)
    answer = int(whole.is_target.sum())
    cut = encode(chat_tokenizer, TURNS, seq_len=seq_len)
    if seq_len <= answer:
        assert cut is None
        return
    assert cut.input_ids.tolist() == whole.input_ids[-seq_len:].tolist()
    assert cut.is_target.sum() == answer
    assert not cut.is_target[0] or len(whole.input_ids) <= seq_len
    assert cut.is_cut == (len(whole.input_ids) > seq_len)


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(chat_tokenizer):
    tokenizer = replace_template(
        chat_tokenizer,
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>"
        "{% else %}<|im_start|>(left out)<|im_end|>{% endif %}{% endfor %}",
    )
    assert "sta" in learnt(tokenizer, encode(tokenizer, TURNS[1:]))[0]
    with pytest.raises(
        ValueError, match="the chat template rewrites earlier turns: .* first 2 messages .* Use data.chat.loss_on last"
    ):
        encode(tokenizer, TURNS[1:], loss_on="all")


def test_what_cannot_be_rendered_is_one_clear_error(chat_tokenizer):
    tokenizer = replace_template(chat_tokenizer, "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template changes the answer 'sta', so its tokens cannot be found"):
        cut_at_turns(tokenizer, TURNS, loss_on="last")
    tokenizer = replace_template(chat_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses the messages .*be brief.*: roles must alternate"):
        encode(tokenizer, TURNS)
    for token in ("<|im_end|>", "<|mask|>"):
        with pytest.raises(ValueError, match=r"a message holds the special token .*Is the data rendered already\?"):
            encode(chat_tokenizer, [*TURNS[:-1], {"role": "assistant", "content": f"x {token}"}])


def test_a_wrong_setting_is_refused():
    with pytest.raises(ValueError, match=r"data.chat.eos_block must lie in \[1, 1048576\]; got 0"):
        replace(ChatConfig(), eos_block=0)
