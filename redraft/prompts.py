"""Turn prompts into token ids and tokens into text; find holes and the end of an answer; seed each row."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.randomness import fold
from redraft.settings import MAX_COUNT

HOLE = re.compile(r"\[MASK:0*([0-9]+)\]")
HOLES = re.compile(r"(?:\[MASK:[0-9]+\])+")
PROBE = "\ue000answer\ue000"
"""A placeholder answer that occurs in no other text: what a chat template writes after it ends a turn."""
ANCHORS = ("\n", "a", "0", ".")
"""Texts to put before a text that does not begin its row, while it is encoded."""
CONTEXT_TOKENS = 16

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Tensor | np.ndarray
"""Text, token ids (list, array, 1-D tensor), chat messages or one message, or what a tokenizer returns."""


def as_batch(prompts: Any) -> list[Any]:
    """List the prompts in what a user gave: each becomes a text, a list of messages or a 1-D tensor of token ids.

    The rows of a 2-D array are prompts. The padding that a tokenizer's attention_mask marks is removed. Raises
    ValueError where there is no prompt, and for a value that is not a prompt.
    """
    shown = type(prompts).__name__
    if isinstance(prompts, Tensor) and prompts.ndim in (1, 2):
        prompts = [prompts.tolist()] if prompts.ndim == 1 else prompts.tolist()
    elif isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        if "input_ids" in prompts:
            return _without_padding(prompts["input_ids"], prompts.get("attention_mask"))
        if "role" in prompts:
            return [[prompts]]
        shown = f"{shown} with the keys {list(prompts)}"
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(
            "a prompt is a text, token ids, chat messages ({'role': ..., 'content': ...}) or what a tokenizer returns;"
            f" got {shown}."
        )
    if not len(prompts):
        raise ValueError("there is no prompt; give at least one.")
    if any(_is_number(item) for item in prompts):
        return [_token_ids(prompts)]
    if all(isinstance(item, Mapping) and "role" in item for item in prompts):
        return [list(prompts)]
    return [_single(item) for item in prompts]


def _single(prompt: Any) -> Any:
    """Return the only prompt in what a user gave; an empty list is a prompt without tokens."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    is_empty = isinstance(prompt, Sequence) and not isinstance(prompt, str) and not len(prompt)
    batch = [_token_ids([])] if is_empty else as_batch(prompt)
    if len(batch) != 1:
        raise ValueError(f"there must be one prompt here; got {len(batch)} of them.")
    return batch[0]


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float | np.number | np.bool_) or (isinstance(item, Tensor) and item.ndim == 0)


def _token_ids(values: Sequence[Any]) -> Int[Tensor, "seq"]:
    """Make a tensor of token ids. Raises ValueError for a value that is not a token id."""
    numbers = [value.item() if isinstance(value, Tensor | np.generic) else value for value in values]
    for value in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"token ids must be whole numbers from 0 on; got {value!r} ({type(value).__name__}).")
    return torch.tensor(numbers, dtype=torch.int64)


def _without_padding(input_ids: Any, attention_mask: Any) -> list[Int[Tensor, "seq"]]:
    """Read what a tokenizer returned: the ids where its attention mask is 1."""
    rows = as_batch(input_ids) if input_ids is None or len(input_ids) else [_token_ids([])]
    if any(not isinstance(row, Tensor) for row in rows):
        raise ValueError(f"input_ids must be token ids; got {str(input_ids)[:80]}.")
    if attention_mask is None:
        return rows
    is_one = not len(attention_mask) or _is_number(attention_mask[0])
    masks = [torch.as_tensor(mask).bool().cpu() for mask in ([attention_mask] if is_one else attention_mask)]
    sizes = [len(row) for row in rows], [len(mask) for mask in masks]
    if sizes[0] != sizes[1]:
        raise ValueError(f"attention_mask must fit input_ids; got rows of {sizes[0]} ids and {sizes[1]} mask entries.")
    return [row[mask] for row, mask in zip(rows, masks, strict=True)]


def encode(tokenizer: Any, prompt: Prompt, *, is_inside: bool = False) -> Int[Tensor, "seq"]:
    """Turn one prompt into token ids. `is_inside`: the text does not begin its row.

    Raises ValueError for text without a tokenizer, for chat without a template, and for a value that is not a prompt.
    """
    given = _single(prompt)
    if isinstance(given, Tensor):
        return given
    if tokenizer is None:
        kind = "text" if isinstance(given, str) else "chat messages"
        raise ValueError(f"this model has no tokenizer, so prompts must be token ids; got {kind}.")
    mark, text = "", given
    if not isinstance(given, str):
        given, mark = _without_special(tokenizer, given)
        text = render_chat(tokenizer, given, for_answer=True)
    return torch.tensor(_encode_pieces(tokenizer, text, mark, is_inside=is_inside), dtype=torch.int64)


def encode_as_text(tokenizer: Any, text: str, *, is_inside: bool = False) -> Int[Tensor, "seq"]:
    """Turn a text into token ids, none of them special: a special token that is spelled in the text is text."""
    (message,), mark = _without_special(tokenizer, [{"content": text}])
    return torch.tensor(_encode_pieces(tokenizer, message["content"], mark, is_inside=is_inside), dtype=torch.int64)


def _without_special(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[Any], str]:
    """Break what spells a special token in the contents of messages, by a mark behind its first character.

    A user could otherwise end a turn and begin another one. Return the messages and the mark, "" if none was needed.
    Raises ValueError for a special token of one character, which cannot be broken.
    """
    texts = [one["content"] for one in messages if isinstance(one, Mapping) and isinstance(one.get("content"), str)]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    if not any(map(spelled.search, texts)):
        return list(messages), ""
    mark = next(chr(i) for i in range(0xE000, 0xF900) if not any(chr(i) in text for text in texts))

    def broken(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise ValueError(f"a message must not hold the special token {found[0]!r}. Leave it out.")
        return found[0][0] + mark + found[0][1:]

    def rewritten(message: Any) -> Any:
        is_text = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        return {**message, "content": spelled.sub(broken, message["content"])} if is_text else message

    return [rewritten(message) for message in messages], mark


def _encode_pieces(tokenizer: Any, text: str, mark: str, *, is_inside: bool) -> list[int]:
    """Tokenize the pieces between the marks apart, so that no token reaches over one."""
    ids: list[int] = []
    for i, piece in enumerate(text.split(mark) if mark else [text]):
        ids += _encode_inside(tokenizer, piece) if is_inside or i else _encode_text(tokenizer, piece)
    return ids


def render_chat(
    tokenizer: Any, messages: Sequence[Any], *, for_answer: bool = False, tools: list[Any] | None = None
) -> str:
    """Render messages by the chat template, with the prompt for an answer behind them if one is to follow."""
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; give the prompt as text.")
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=for_answer)
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"the chat template refuses the messages {str(messages)[:80]}: {error}.") from error


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that stands after another: SentencePiece-like tokenizers put a space before what begins a row.

    Encoded alone where that already decodes to the text behind an anchor, as every byte-level tokenizer does.
    """
    alone = _encode_text(tokenizer, text)
    for anchor in ANCHORS:
        before = _encode_text(tokenizer, anchor)
        if text_after(tokenizer, [], before) != anchor:
            continue  # this vocabulary has no token for it
        if _indent(text_after(tokenizer, before, alone)) == _indent(text):
            return alone
        whole = _encode_text(tokenizer, anchor + text)
        inside = whole[len(before) :]
        if whole[: len(before)] == before and _indent(text_after(tokenizer, before, inside)) == _indent(text):
            return inside
    return alone


def _indent(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def text_after(tokenizer: Any, before: Any, new: Any, *, with_special: bool = False) -> str:
    """Decode new tokens after others: return what they add to the text of the tokens before them.

    Decoded alone they would lose the space that the first one begins with (SentencePiece), or the one before it (BERT).
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=not with_special))

    given, new = _as_list(before), _as_list(new)
    tail = given[-CONTEXT_TOKENS:]
    head = decode(tail)
    if not head or "\ufffd" in head:  # the tail is special tokens alone, or cuts a character: take all tokens before
        tail, head = given, decode(given)
    whole = decode(tail + new)
    return whole[len(head) :] if whole.startswith(head) else decode(new)  # else a character spans both


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def until_stop(tokenizer: Any, before: Any, new: Any, stop: Sequence[str]) -> tuple[int | None, str]:
    """Count the new tokens up to and with the first stop string (None without one), and return the text before it.

    A stop string may hold special tokens; the text does not.
    """
    before, new = _as_list(before), _as_list(new)

    def texts(count: int) -> tuple[str, str]:
        return shown_and_raw(tokenizer, before, new[:count])

    def is_stopped(count: int) -> bool:
        return any(string in text for text in texts(count) for string in stop)

    # The last tokens may be a part of a character, and byte fallback then spoils the characters before it.
    if not any(is_stopped(count) for count in range(len(new), max(0, len(new) - 4), -1)):
        return None, texts(len(new))[0]
    count = next(count for count in range(1, len(new) + 1) if is_stopped(count))
    raw = texts(count)[1]
    start = len(cut_text(raw, stop))
    whole = next(n for n in reversed(range(count + 1)) if len(texts(n)[1]) <= start)  # tokens that end before it
    text, before_stop = texts(whole)
    if whole < count and new[whole] not in special_token_ids(tokenizer):
        text += raw[len(before_stop) : start]
    return count, cut_text(text, stop)


def shown_and_raw(tokenizer: Any, before: Any, new: Any) -> tuple[str, str]:
    """Decode new tokens after others without special tokens, and with them."""
    return text_after(tokenizer, before, new), text_after(tokenizer, before, new, with_special=True)


def cut_text(text: str, stop: Sequence[str]) -> str:
    """End a text before the first of the strings that stop it."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def encode_pair(
    tokenizer: Any, context: Prompt, continuation: Prompt
) -> tuple[Int[Tensor, "context"], Int[Tensor, "continuation"]]:
    """Tokenize a context and its continuation as one text, and cut the ids at the boundary.

    Spaces at the end of the context count to the continuation, as in the harness. Where a token would span the
    boundary, the two are tokenized apart: the context does not change, and every character is scored once.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        given, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
        if torch.equal(whole[: len(given)], given):
            return given, whole[len(given) :]
    given = encode(tokenizer, context)
    return given, encode(tokenizer, continuation, is_inside=len(given) > 0)


def encode_with_holes(
    tokenizer: Any, prompt: Prompt, *, mask_token_id: int
) -> tuple[Int[Tensor, "seq"], Bool[Tensor, "seq"]]:
    """Turn one prompt into token ids and where its holes are: `[MASK:n]` in text, and mask tokens in text and ids."""
    if not isinstance(prompt, str):
        row = encode(tokenizer, prompt)
        return row, row == mask_token_id
    pieces, is_hole = [torch.empty(0, dtype=torch.int64)], []
    parts = HOLE.split(prompt)  # text, size of a hole, text, ...
    _check_holes(parts[1::2])
    for i, piece in enumerate(parts):
        hole = torch.full((int(piece),), mask_token_id) if i % 2 else None
        pieces.append(encode(tokenizer, piece, is_inside=i > 0) if hole is None else hole)
        is_hole.append(pieces[-1] == mask_token_id)
    return torch.cat(pieces), torch.cat(is_hole)


def _check_holes(sizes: list[str]) -> None:
    """Raise ValueError for a hole of 0 tokens, and for holes of too many tokens together."""
    if "0" in sizes:
        raise ValueError("a hole takes at least 1 token; got [MASK:0]. Leave it out.")
    if sum(int(size[:20]) for size in sizes) > MAX_COUNT:  # [:20]: int() refuses a text of thousands of digits
        largest = max(sizes, key=len)
        raise ValueError(f"the holes of a text take at most {MAX_COUNT} tokens together; got [MASK:{largest[:20]}].")


def filled_text(tokenizer: Any, prompt: Prompt, tokens: Int[Tensor, "seq"], is_hole: Bool[Tensor, "seq"]) -> str:
    """Return the text of a row whose holes are filled; the given parts of a text prompt do not change."""
    starts = (is_hole & ~torch.cat([is_hole.new_zeros(1), is_hole[:-1]])).nonzero()[:, 0].tolist()
    given = HOLES.split(prompt) if isinstance(prompt, str) else []
    if len(given) != len(starts) + 1:  # token ids; or no token stands between two holes
        return text_after(tokenizer, [], tokens)
    text = given[0]
    for start, piece in zip(starts, given[1:], strict=True):
        end = start + int(is_hole[start:].long().cumprod(dim=0).sum())
        new = text_after(tokenizer, tokens[:start], tokens[start:end])
        before = text_after(tokenizer, [], tokens[:start])
        is_space_lost = text.endswith(" ") and before != "" and not before.endswith(" ")
        text += (new.removeprefix(" ") if is_space_lost else new) + piece  # a word piece brings the space before it
    return text


def special_token_ids(tokenizer: Any) -> set[int]:
    """Return the special tokens; the first of them after an answer ends the turn."""
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def turn_end(ids: Sequence[int], special: set[int]) -> int | None:
    """Return the index of the token that ends a turn among the tokens after an answer: the first special one."""
    return next((i for i, id in enumerate(ids) if id in special), None)


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the token that training teaches as the end of an answer, where the chat template has one."""
    if tokenizer.chat_template is None:
        return None
    answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except Exception:  # a template is a program and may fail: `render_chat` reports the error
        return None
    if PROBE not in text:
        return None
    ids = _encode_text(tokenizer, text.rpartition(PROBE)[2])
    end = turn_end(ids, special_token_ids(tokenizer))
    return None if end is None else ids[end]


def end_token_ids(model: Any, tokenizer: Any, *, raw: dict[str, Any]) -> list[int]:
    """List the tokens that end a text: the tokenizer's EOS (BERT: separator), the end of a turn, those in the configs.

    Without a tokenizer, an EOS that the config has only by default counts too.
    """
    ends: list[Any] = []
    if tokenizer is not None:
        ends = [tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
        ends.append(end_of_turn_id(tokenizer))
    configs = [model.config, model.config.get_text_config()]
    is_listed = "eos_token_id" in raw or "eos_token_id" in (raw.get("text_config") or {})
    lists = [getattr(config, "eos_token_id", None) for config in configs if is_listed or tokenizer is None]
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation._from_model_config:  # it was read from a generation_config.json
        lists.append(generation.eos_token_id)
    for listed in lists:
        ends += listed if isinstance(listed, list | tuple) else [listed]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def row_keys(rows: list[Tensor], *, seed: int) -> Int[Tensor, "batch"]:
    """Seed rows by (seed, prompt, number of equal prompts before): the position in the batch does not matter."""
    keys, seen = [], dict[bytes, int]()
    for row in rows:
        digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest()
        count = seen[digest] = seen.get(digest, -1) + 1
        keys.append(fold(seed, int.from_bytes(digest, "little", signed=True), count))
    return torch.stack(keys)
