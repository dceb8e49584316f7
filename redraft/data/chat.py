"""Conversations to tokens: the chat template, which tokens are targets, how an answer ends, what is cut."""

import copy
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from redraft.data.messages import DOCUMENT, THOUGHTS, Message
from redraft.data.tokenizer import Tokenizer, encode_documents, require_eos_token
from redraft.prompts import PROBE, encode, turn_end

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


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become tokens and targets (kind chat)."""

    loss_on: Literal["last", "all"] = "last"
    """Which assistant turns are learnt. An earlier turn is learnt with all that was said after it in sight."""
    eos: Literal["train", "ignore", "to-block-end"] = "train"
    """train: the end-of-turn token after an answer is a target. ignore: it is there and is none. to-block-end: it is
    one, and EOS follows up to the end of the block, attended to and learnt."""
    block_size: int = 32
    """Tokens per block for eos to-block-end, counted from the conversation's start; seq_len pads as LLaDA does."""
    too_long: Literal["cut", "drop"] = "cut"
    """A conversation longer than seq_len loses the left of its prompt, or is dropped. One whose last answer alone is
    too long is dropped in any case. The report counts both."""
    batching: Literal["packed", "grouped"] = "packed"
    """packed: several conversations per window, blind to each other. grouped: one per row, like lengths together."""
    skip_bad: bool = False
    """Skip malformed records (an empty answer, none at all) with a warning instead of stopping at the first."""
    template: str | None = None
    """File of a Jinja chat template; by default the tokenizer's own, or a plain one if it has none."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"chat.block_size must be at least 1; got {self.block_size}.")


class Example(NamedTuple):
    """One conversation in tokens; at least one of them is a target."""

    input_ids: Integer[np.ndarray, "tokens"]
    is_target: Bool[np.ndarray, "tokens"]
    is_cut: bool = False


class Piece(NamedTuple):
    """A stretch of rendered text."""

    text: str
    role: Literal["given", "answer", "ending"]


def with_chat_template(tokenizer: Tokenizer, config: ChatConfig) -> Tokenizer:
    """Return the tokenizer with the template that conversations are rendered with: it is saved with the model."""
    if config.template is not None:
        try:
            template = Path(config.template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat.template must be a text file; got {config.template!r} ({error}).") from error
    elif tokenizer.chat_template is not None:
        return tokenizer
    else:
        template = DEFAULT_TEMPLATE
        logger.warning(
            "the tokenizer has no chat template: the default is used and saved, User:\\n...\\n\\nAssistant:\\n...%s."
            " Give another with chat.template.",
            tokenizer.eos_token or tokenizer.sep_token,
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def plain_text(document: str) -> str:
    """Join the contents of a conversation or a pair of them, in JSON: what a tokenizer is trained on."""
    read = json.loads(document)
    messages = [message for one in read for message in one] if isinstance(read[0], list) else read
    return "\n\n".join(message["content"] for message in messages)


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[str], *, config: ChatConfig, seq_len: int
) -> list[Example | None]:
    """Encode conversations (JSON of their messages) with their targets; None for one that must be dropped as too long.

    Plain text among them (`data.records.DOCUMENT`) comes in pieces of `seq_len` tokens, all of it to be learnt.
    Raises ValueError where the template or a text does not allow it.
    """
    eos_token_id = require_eos_token(tokenizer)
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    read = [json.loads(text) for text in conversations]
    is_document = [messages[0]["role"] == DOCUMENT for messages in read]
    texts = [messages[0]["content"] for messages, is_text in zip(read, is_document, strict=True) if is_text]
    dialogues = [messages for messages, is_text in zip(read, is_document, strict=True) if not is_text]
    _refuse_special_tokens(
        [text for messages in dialogues for message in messages for text in _texts(message)], set(special.values())
    )
    rendered = [cut_at_turns(tokenizer, messages, loss_on=config.loss_on) for messages in dialogues]
    answered: list[Example | None] = []
    for pieces, tokens in zip(rendered, _encode_pieces(tokenizer, rendered), strict=True):
        example = _with_targets(pieces, tokens, ends=set(special), eos_token_id=eos_token_id, config=config)
        answer_tokens = len(example.input_ids) - sum(map(len, tokens[:-2]))
        fitting = _fit(example, answer_tokens=answer_tokens, seq_len=seq_len, config=config)
        answered.append(fitting and _with_tail(fitting, eos_token_id, config=config))
    documents: list[list[Example]] = []
    for encoded in encode_documents(tokenizer, texts):
        ids = np.asarray([*encoded, eos_token_id], np.int32)
        cut = np.split(ids, range(seq_len, len(ids), seq_len))
        documents.append([Example(piece, np.ones(len(piece), bool)) for piece in cut])
    examples: list[Example | None] = []
    next_document, next_answered = iter(documents), iter(answered)
    for is_text in is_document:  # in the order they came in: a mixture stays one
        if is_text:
            examples += [_with_tail(example, eos_token_id, config=config) for example in next(next_document)]
        else:
            examples.append(next(next_answered))
    return examples


def cut_at_turns(tokenizer: Tokenizer, messages: Sequence[Message], *, loss_on: Literal["last", "all"]) -> list[Piece]:
    """Render a conversation that ends with an answer, and cut it: given, answer, ending, given, answer, ending, ...

    An answer begins where the generation prompt ends; one that begins the conversation, where its words do. A turn of
    weight 0 is given. Raises ValueError where the text rendered up to a turn is not the beginning of the whole, the
    answer is not in it as it was written, or the template leaves something out.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    render = partial(_render, tokenizer, tools=messages[0].get("tools"))
    whole, position, pieces = render(messages), 0, []
    _refuse_left_out(str(tokenizer.chat_template), render, messages, whole=whole)
    for i in turns if loss_on == "all" else turns[-1:]:
        head, _, ending = render([*messages[:i], {"role": "assistant", "content": PROBE}]).rpartition(PROBE)
        start = len(_beginning(render, messages, i, whole=whole, for_answer=True, head=head))
        stop = len(_beginning(render, messages, i + 1, whole=whole, for_answer=False, head=head))
        end = stop - len(ending)
        answer = whole[start:end]
        if whole[end:stop] != ending or not all(text.strip() in answer for text in _words(messages[i])):
            raise ValueError(
                f"the chat template changes the answer {_excerpt(messages[i]['content'])}, so its tokens cannot be"
                " found. Use another chat.template."
            )
        pieces += [Piece(whole[position:start], "given"), Piece(answer, "answer"), Piece(ending, "ending")]
        position = stop
    return pieces


def _words(message: Message) -> list[str]:
    """Return what the assistant wrote: the content, the thoughts, the names of the functions that it calls."""
    calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
    return [message["content"], *(message[name] for name in THOUGHTS if name in message), *calls]


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, for_answer: bool = False, tools: list[Any] | None = None
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=for_answer
        )
    except Exception as error:  # a template is a program: it may fail in any way
        first = _excerpt(messages[0]["content"])
        raise ValueError(f"the chat template refuses the conversation that begins {first}: {error}.") from error
    return str(text)


def _refuse_left_out(template: str, render: Render, messages: Sequence[Message], *, whole: str) -> None:
    """Raise ValueError for fields that the template does not know, and for roles that it does not write."""
    for name in ("tools", "tool_calls", *THOUGHTS):
        if any(name in message for message in messages) and not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"the chat template does not write {name!r}, which the conversation that begins"
                f" {_excerpt(messages[0]['content'])} has. Remove the field, or use another chat.template."
            )
    for i, message in enumerate(messages):
        if message["role"] == "assistant" or message["content"].strip() in whole:
            continue  # of earlier answers a template may leave out the thoughts
        if render([*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]) == whole:
            raise ValueError(
                f"the chat template leaves out messages of role {message['role']!r}, such as"
                f" {_excerpt(message['content'])}. Use another role, or another chat.template."
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
            " Use chat.loss_on last, or another chat.template."
        )
    return text


def _texts(message: Message) -> list[str]:
    """Return what a template may write of a message."""
    values = [value for name, value in message.items() if name not in ("role", "weight")]
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]


def _refuse_special_tokens(texts: Sequence[str], special: set[str]) -> None:
    """Raise ValueError for a literal special token in a message: the template's parser would take it for structure."""
    beginnings = {token[0] for token in special if token}
    for text in texts:
        if beginnings.isdisjoint(text):
            continue
        if found := next((token for token in special if token in text), None):
            raise ValueError(
                f"a message holds the special token {found!r}: {_excerpt(text)}. Is the data rendered already?"
                " Remove such tokens; the template adds its own."
            )


def _encode_pieces(tokenizer: Tokenizer, rendered: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
    """Encode each piece as it stands after all before it, which is how a prompt is encoded at generation.

    Where the tokens of the longer text do not begin with those of the shorter one (a merge across the border), the
    piece is encoded alone: a border between what is given and what is learnt is always one between tokens.
    """
    texts = ["".join(piece.text for piece in pieces[: i + 1]) for pieces in rendered for i in range(len(pieces))]
    encoded = iter(_encode(tokenizer, texts))
    tokens: list[list[list[int]]] = []
    for pieces in rendered:
        before: list[int] = []
        tokens.append([])
        for piece in pieces:
            ids = next(encoded)
            is_clean = ids[: len(before)] == before
            alone = None if is_clean else encode(tokenizer, piece.text, is_inside=True).tolist()
            tokens[-1].append(ids[len(before) :] if alone is None else alone)
            before = before + tokens[-1][-1]
    return tokens


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return encoded


def _with_targets(
    pieces: Sequence[Piece],
    tokens: Sequence[list[int]],
    *,
    ends: set[int],
    eos_token_id: int,
    config: ChatConfig,
) -> Example:
    """Mark the answers, and the ends of turns as the EOS policy has it; nothing follows the last end of turn."""
    input_ids: list[int] = []
    is_target: list[bool] = []
    for number, (piece, ids) in enumerate(zip(pieces, tokens, strict=True), start=1):
        if piece.role != "ending":
            input_ids += ids
            is_target += [piece.role == "answer"] * len(ids)
            continue
        end = turn_end(ids, ends)
        if number == len(pieces):
            ids = [*ids, eos_token_id] if end is None else ids[: end + 1]
            end = len(ids) - 1
        num_learnt = 0 if config.eos == "ignore" or end is None else end + 1
        input_ids += ids
        is_target += [True] * num_learnt + [False] * (len(ids) - num_learnt)
    if not any(is_target):
        text = _excerpt("".join(piece.text for piece in pieces))
        raise ValueError(f"all tokens of a conversation are left out of the loss: {text}. Mend or remove it.")
    return Example(np.asarray(input_ids, np.int32), np.asarray(is_target, bool))


def _fit(example: Example, *, answer_tokens: int, seq_len: int, config: ChatConfig) -> Example | None:
    """Cut the left of what comes before the last answer; None where not one token of it would be left."""
    if len(example.input_ids) <= seq_len:
        return example
    if config.too_long == "drop" or answer_tokens >= seq_len:
        return None
    return Example(example.input_ids[-seq_len:], example.is_target[-seq_len:], is_cut=True)


def _with_tail(example: Example, eos_token_id: int, *, config: ChatConfig) -> Example:
    """Fill the last block with EOS: tokens like others, attended to and learnt."""
    num_eos = -len(example.input_ids) % config.block_size if config.eos == "to-block-end" else 0
    tail = np.full(num_eos, eos_token_id, np.int32)
    return Example(
        np.concatenate([example.input_ids, tail]), np.pad(example.is_target, (0, num_eos), constant_values=True),
        is_cut=example.is_cut,
    )  # fmt: skip


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
