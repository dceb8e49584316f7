"""Encode conversations: render the chat template, mark the targets, end the answers, cut what is too long."""

import copy
import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from redraft.data.config import ChatConfig
from redraft.data.records import DOCUMENT, THOUGHTS, Message
from redraft.data.tokenizer import Tokenizer, encode_documents, encode_texts, require_eos_token
from redraft.prompts import PROBE, encode, render_chat, special_token_ids, turn_end

logger = logging.getLogger(__name__)

Render = Callable[..., str]
"""Messages, and whether the prompt for an answer follows -> their text."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] | trim }}"
    "{{ (eos_token or sep_token) if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


class Example(NamedTuple):
    """One conversation in tokens; at least one of them is a target."""

    input_ids: Integer[np.ndarray, "tokens"]
    is_target: Bool[np.ndarray, "tokens"]
    is_cut: bool = False


class Turn(NamedTuple):
    """A part of a conversation's text: what is given, the answer to it, and what the template writes after it."""

    given: str
    answer: str
    ending: str


def with_chat_template(tokenizer: Tokenizer, config: ChatConfig) -> Tokenizer:
    """Return the tokenizer with the chat template for the conversations: it is saved with the model."""
    if config.template is not None:
        try:
            template = Path(config.template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat.template must be a text file; got {config.template!r} ({error}).") from error
    elif tokenizer.chat_template is not None:
        return tokenizer
    else:
        template = DEFAULT_TEMPLATE
        logger.warning(
            "the tokenizer has no chat template: the default is used and saved, User:\\n...\\n\\nAssistant:\\n...%s."
            " Set data.chat.template for another.",
            tokenizer.eos_token or tokenizer.sep_token,
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def plain_text(document: str) -> str:
    """Join the contents of a conversation or a pair of them, in JSON: what a tokenizer is trained on."""
    read = json.loads(document)
    messages = chain.from_iterable(read) if isinstance(read[0], list) else read
    return "\n\n".join(message["content"] for message in messages)


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[str], *, config: ChatConfig, seq_len: int
) -> list[Example | None]:
    """Encode conversations (JSON of their messages) with their targets; None for one that must be dropped as too long.

    Plain text among them (`data.records.DOCUMENT`) is cut into pieces of `seq_len` tokens, and all of it is learnt.
    Raises ValueError where the template or a text does not allow it.
    """
    eos_token_id, special = require_eos_token(tokenizer), special_token_ids(tokenizer)
    read = [json.loads(text) for text in conversations]
    dialogues = [[] if messages[0]["role"] == DOCUMENT else messages for messages in read]
    _refuse_special_tokens(dialogues, {tokenizer.added_tokens_decoder[id].content for id in special})
    rendered = [cut_at_turns(tokenizer, turns, loss_on=config.loss_on) if turns else [] for turns in dialogues]
    examples: list[Example | None] = []
    for messages, tokens in zip(read, _encode_turns(tokenizer, rendered), strict=True):
        if not tokens:  # plain text
            [ids] = encode_documents(tokenizer, [messages[0]["content"]])
            array = np.asarray([*ids, eos_token_id], np.int32)
            pieces = np.split(array, range(seq_len, len(array), seq_len))
            examples += [_fill_block(Example(ids, np.ones(len(ids), bool)), eos_token_id, config) for ids in pieces]
            continue
        example = _with_targets(tokens, special=special, eos_token_id=eos_token_id)
        answer_tokens = len(example.input_ids) - sum(map(len, tokens[:-2]))
        if len(example.input_ids) > seq_len:  # at least one token before the last answer must be left
            cut = Example(example.input_ids[-seq_len:], example.is_target[-seq_len:], is_cut=True)
            examples.append(_fill_block(cut, eos_token_id, config) if answer_tokens < seq_len else None)
        else:
            examples.append(_fill_block(example, eos_token_id, config))
    return examples


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[str], *, config: ChatConfig, seq_len: int
) -> list[Example | None]:
    """Encode preference pairs (JSON of two conversations): chosen, rejected, chosen, ... None for both if one is."""
    conversations = [json.dumps(messages) for pair in pairs for messages in json.loads(pair)]
    examples = encode_conversations(tokenizer, conversations, config=config, seq_len=seq_len)
    both = zip(examples[::2], examples[1::2], strict=True)
    return [example for pair in both for example in (pair if None not in pair else (None, None))]


def cut_at_turns(tokenizer: Tokenizer, messages: Sequence[Message], *, loss_on: Literal["last", "all"]) -> list[Turn]:
    """Render a conversation that ends with an answer, and cut it into turns.

    An answer begins where the generation prompt ends, or, as the first message, where its own text begins. A turn of
    weight 0 is given, not learnt. Raises ValueError where the text rendered up to a turn is not the beginning of the
    whole text, the template changes an answer, or it leaves something out.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    render = partial(render_chat, tokenizer, tools=messages[0].get("tools"))
    whole, position, rendered = render(messages), 0, []
    _refuse_left_out(str(tokenizer.chat_template), render, messages, whole=whole)
    for i in turns if loss_on == "all" else turns[-1:]:
        # Rendering a placeholder, which occurs nowhere else, shows what the template writes after an answer.
        head, _, ending = render([*messages[:i], {"role": "assistant", "content": PROBE}]).rpartition(PROBE)
        start = len(_beginning(render, messages, i, whole=whole, for_answer=True, head=head))
        stop = len(_beginning(render, messages, i + 1, whole=whole, for_answer=False, head=head))
        end = stop - len(ending)
        answer = whole[start:end]
        if whole[end:stop] != ending or not all(text.strip() in answer for text in _words(messages[i])):
            raise ValueError(
                f"the chat template changes the answer {_excerpt(messages[i]['content'])}, so its tokens cannot be"
                " found. Use another data.chat.template."
            )
        rendered.append(Turn(whole[position:start], answer, ending))
        position = stop
    return rendered


def _words(message: Message) -> list[str]:
    """Return the texts that the assistant wrote: content, thoughts, names of the functions that it calls."""
    calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
    return [message["content"], *(message[name] for name in THOUGHTS if name in message), *calls]


def _refuse_left_out(template: str, render: Render, messages: Sequence[Message], *, whole: str) -> None:
    """Raise ValueError for fields that the template does not use, and for roles that it does not write."""
    for name in ("tools", "tool_calls", *THOUGHTS):
        if any(name in message for message in messages) and not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"the chat template does not write {name!r}, which the conversation that begins"
                f" {_excerpt(messages[0]['content'])} has. Remove the field, or use another data.chat.template."
            )
    for i, message in enumerate(messages):
        if message["role"] == "assistant" or message["content"].strip() in whole:
            continue  # a template may leave out the thoughts of earlier answers
        if render([*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]) == whole:
            raise ValueError(
                f"the chat template leaves out messages of role {message['role']!r}, such as"
                f" {_excerpt(message['content'])}. Use another role, or another data.chat.template."
            )


def _beginning(
    render: Render, messages: Sequence[Message], count: int, *, whole: str, for_answer: bool, head: str
) -> str:
    """Render the first messages, with the prompt for an answer if one is to follow; before the first one, the head."""
    text = render(messages[:count], for_answer=for_answer) if count else head
    if not whole.startswith(text):
        raise ValueError(
            f"the chat template rewrites earlier turns: its text of the first {count} messages is not the beginning of"
            f" that of all {len(messages)}, in the conversation that begins {_excerpt(messages[0]['content'])}."
            " Use data.chat.loss_on last, or another data.chat.template."
        )
    return text


def _refuse_special_tokens(dialogues: Sequence[Sequence[Message]], special: set[str]) -> None:
    """Raise ValueError for a literal special token in a message: the template's parser would take it for structure."""
    beginnings = {token[0] for token in special if token}
    for message in chain.from_iterable(dialogues):
        for value in (value for name, value in message.items() if name not in ("role", "weight")):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if beginnings.isdisjoint(text):
                continue
            if token := next((token for token in special if token in text), None):
                raise ValueError(
                    f"a message holds the special token {token!r}: {_excerpt(text)}. Is the data rendered already?"
                    " Remove such tokens; the template adds its own."
                )


def _encode_turns(tokenizer: Tokenizer, rendered: Sequence[Sequence[Turn]]) -> list[list[list[int]]]:
    """Encode each part of each turn after the text before it, as a prompt is encoded at generation.

    Where the tokens of the longer text do not begin with those of the shorter one (a token spans the border), the part
    is encoded alone: no token holds both given and learnt text.
    """
    parts = [list(chain.from_iterable(turns)) for turns in rendered]
    encoded = iter(encode_texts(tokenizer, ["".join(texts[: i + 1]) for texts in parts for i in range(len(texts))]))
    tokens: list[list[list[int]]] = []
    for texts in parts:
        before: list[int] = []
        tokens.append([])
        for text in texts:
            ids = next(encoded)
            is_continued = ids[: len(before)] == before
            new = ids[len(before) :] if is_continued else encode(tokenizer, text, is_inside=True).tolist()
            tokens[-1].append(new)
            before = before + new
    return tokens


def _with_targets(tokens: Sequence[list[int]], *, special: set[int], eos_token_id: int) -> Example:
    """Mark the answers and the tokens that end their turns; nothing follows the end of the last turn.

    `tokens` are what is given, an answer, its ending, what is given, and so on.
    """
    input_ids: list[int] = []
    is_target: list[bool] = []
    for i in range(0, len(tokens), 3):
        given, answer, ending = tokens[i : i + 3]
        end = turn_end(ending, special)
        num_learnt = 0 if end is None else end + 1
        if i + 3 == len(tokens):
            ending = ending[:num_learnt] if num_learnt else [*ending, eos_token_id]
            num_learnt = len(ending)
        input_ids += [*given, *answer, *ending]
        is_target += [False] * len(given) + [True] * (len(answer) + num_learnt) + [False] * (len(ending) - num_learnt)
    return Example(np.asarray(input_ids, np.int32), np.asarray(is_target, bool))


def _fill_block(example: Example, eos_token_id: int, config: ChatConfig) -> Example:
    """Pad the last block with EOS tokens, which are attended to and learnt."""
    fill = (0, -len(example.input_ids) % config.eos_block)
    input_ids = np.pad(example.input_ids, fill, constant_values=eos_token_id)
    return Example(input_ids, np.pad(example.is_target, fill, constant_values=True), example.is_cut)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
