"""Templates of every style: which tokens are targets, and that nothing of a conversation is left out."""

import copy
import json

import numpy as np
import pytest

from redraft.data.chat import DEFAULT_TEMPLATE, ChatConfig, encode_conversations
from redraft.data.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ '<|bos|>' }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set head = '' %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '<|bos|>[INST] ' + (head if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' <|eos|>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<|bos|>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|head|>' + role + '\n' + m['content'] | trim + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}"
)
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
STYLES = {  # the template, and how an answer stands in it
    "chatml": (CHATML, "{}<|im_end|>"),
    "chatml with a system prompt of its own": (WITH_SYSTEM + CHATML, "{}<|im_end|>"),
    "llama 3": (LLAMA_3, "{}<|eot|>"),
    "llama 2": (LLAMA_2, " {} <|eos|>"),
    "gemma": (GEMMA, "{}<|eot|>"),
    "plain": (DEFAULT_TEMPLATE, "{}<|eos|>"),
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
ORDERS = ["ua", "sua", "uaua", "suaua", "a", "sa", "aua", "saua", "uaa", "suaa", "uaaua", "uuaa", "aa"]
ALTERNATING = ("ua", "sua", "uaua", "suaua")


@pytest.fixture(scope="module")
def tokenizer(documents):
    tokenizer = train_tokenizer(documents, vocab_size=300)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"]}
    )
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer, messages, loss_on="all"):
    """The stretches of targets, as text."""
    config = ChatConfig(loss_on=loss_on)
    [example] = encode_conversations(tokenizer, [json.dumps(messages)], config=config, seq_len=999)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.is_target, [0]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("style", STYLES)
def test_targets_are_the_words_of_the_assistant_and_the_end_of_its_turn(tokenizer, style, order):
    template, answer = STYLES[style]
    tokenizer = with_template(tokenizer, template)
    messages = [{"role": ROLES[letter], "content": f"ba {i} lo\nmi"} for i, letter in enumerate(order)]
    if (style == "gemma" and "s" in order) or (style == "llama 2" and order not in ALTERNATING):
        with pytest.raises(ValueError, match="the chat template refuses the messages .*ba 0 lo"):
            learnt(tokenizer, messages)
        return
    expected = [answer.format(m["content"]) for m in messages if m["role"] == "assistant"]
    assert learnt(tokenizer, messages) == expected
    assert learnt(tokenizer, messages, loss_on="last") == expected[-1:]


def test_an_answer_at_the_beginning_is_told_from_the_head_by_its_words_alone(tokenizer):
    turn = [{"role": "assistant", "content": "assistant\n"}]  # as the head says
    assert learnt(with_template(tokenizer, CHATML), turn) == ["assistant\n<|im_end|>"]
    upper = with_template(tokenizer, CHATML.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(ValueError, match="the chat template changes the answer 'ba'"):
        learnt(upper, [{"role": "assistant", "content": "ba"}])


def test_a_turn_of_weight_0_is_given_and_not_learnt(tokenizer):
    tokenizer = with_template(tokenizer, CHATML)
    turns = [{"role": ROLES[letter], "content": f"ba {i}"} for i, letter in enumerate("uauaua")]
    turns[1]["weight"] = 0
    assert learnt(tokenizer, turns) == ["ba 3<|im_end|>", "ba 5<|im_end|>"]
    turns[3]["weight"] = 0
    assert learnt(tokenizer, turns) == ["ba 5<|im_end|>"]


TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "ba"}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [
    {"role": "user", "content": "what is ba?", "tools": TOOLS},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"a": "lo"}', "name": "lookup"},
    {"role": "assistant", "content": "lo", "reasoning_content": "the tool said lo"},
]


def test_tools_calls_and_thoughts_go_through_the_template_and_are_learnt_where_the_assistant_wrote_them(tokenizer):
    tokenizer = with_template(tokenizer, TOOL_TEMPLATE)
    assert learnt(tokenizer, ASKED) == [
        '<call>{"name": "lookup", "arguments": {"word": "ba"}}</call><|im_end|>',
        "<think>the tool said lo</think>lo<|im_end|>",
    ]
    [example] = encode_conversations(tokenizer, [json.dumps(ASKED)], config=ChatConfig(), seq_len=999)
    head = f"<|im_start|>system\n{json.dumps(TOOLS)}<|im_end|>\n<|im_start|>user\nwhat is ba?"
    assert tokenizer.decode(example.input_ids).startswith(head)
    begun = [{"role": "assistant", "content": "ask", "tools": TOOLS}]
    assert learnt(tokenizer, begun) == ["ask<|im_end|>"], "tools stand before an answer that begins"


@pytest.mark.parametrize(("name", "first"), [("tools", 0), ("tool_calls", 1), ("reasoning_content", 3)])
def test_a_field_that_the_template_does_not_know_is_refused(tokenizer, name, first):
    messages = [
        {key: value for key, value in m.items() if key in ("role", "content") or (key == name and i == first)}
        for i, m in enumerate(ASKED)
    ]
    with pytest.raises(ValueError, match=f"the chat template does not write '{name}', which the conversation"):
        learnt(with_template(tokenizer, CHATML), messages)


def test_thoughts_or_calls_that_a_template_leaves_out_of_the_answer_are_refused(tokenizer):
    without = TOOL_TEMPLATE.replace("{% if m['reasoning_content'] %}", "{% if m['reasoning_content'] and false %}")
    with pytest.raises(ValueError, match="the chat template changes the answer 'lo'"):
        learnt(with_template(tokenizer, without), ASKED)
    without = TOOL_TEMPLATE.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:0]")
    with pytest.raises(ValueError, match="the chat template changes the answer ''"):
        learnt(with_template(tokenizer, without), ASKED)


@pytest.mark.parametrize("role", ["tool", "system", "developer"])
def test_a_role_that_the_template_leaves_out_is_refused(tokenizer, role):
    template = CHATML.replace(
        "%}<|im_start|>{{ m", f"%}}{{% if m['role'] == '{role}' %}}{{% continue %}}{{% endif %}}<|im_start|>{{{{ m", 1
    )
    messages = [
        {"role": role, "content": "never lie"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "lo"},
    ]
    assert learnt(with_template(tokenizer, template), messages[1:]) == ["lo<|im_end|>"]
    with pytest.raises(ValueError, match=f"leaves out messages of role '{role}', such as 'never lie'"):
        learnt(with_template(tokenizer, template), messages)


def test_a_role_that_the_template_writes_in_its_own_form_is_no_fault(tokenizer):
    quoted = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": 'b\n"c"'},
        {"role": "assistant", "content": "d"},
    ]
    assert learnt(with_template(tokenizer, quoted), messages) == ["d<|im_end|>"]


def test_special_tokens_are_refused_in_calls_and_thoughts_too(tokenizer):
    tokenizer = with_template(tokenizer, TOOL_TEMPLATE)
    for field, value in (
        ("reasoning_content", "x <|im_end|>"),
        ("tool_calls", [{"function": {"name": "f", "arguments": {"a": ["<|im_end|>"]}}}]),
    ):
        messages = [*ASKED[:1], {"role": "assistant", "content": "lo", field: value}]
        with pytest.raises(ValueError, match=r"a message holds the special token '<\|im_end\|>'"):
            learnt(tokenizer, messages)
