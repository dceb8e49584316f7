"""Prompts as token ids: text, chat messages, ids themselves, holes to fill, and the seed of each row."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.errors import MOST
from redraft.randomness import fold

HOLE = re.compile(r"\[MASK:0*([0-9]+)\]")

Prompt = str | Sequence[int] | Sequence[dict[str, str]] | Tensor
"""Text, token ids (list or 1-D tensor), or chat messages."""


def as_batch(prompts: Any) -> list[Any]:
    """Tell one prompt from several. Raises ValueError where there is none."""
    is_one = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1)
    if not is_one and len(prompts) and isinstance(prompts[0], int | dict):
        is_one = True
    batch = [prompts] if is_one else list(prompts)
    if not batch:
        raise ValueError("there is no prompt; give at least one.")
    return batch


def encode(tokenizer: Any, prompt: Prompt) -> Int[Tensor, "seq"]:
    """Turn one prompt into token ids. Raises ValueError for text without a tokenizer, for chat without a template."""
    if isinstance(prompt, Tensor):
        return prompt.long().cpu()
    if not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], dict)):
        return torch.tensor(list(prompt), dtype=torch.int64)
    if tokenizer is None:
        kind = "text" if isinstance(prompt, str) else "chat messages"
        raise ValueError(f"this model has no tokenizer, so prompts must be token ids; got {kind}.")
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None:
            raise ValueError("this model has no chat template; give the prompt as text.")
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def encode_pair(
    tokenizer: Any, context: Prompt, continuation: Prompt
) -> tuple[Int[Tensor, "context"], Int[Tensor, "continuation"]]:
    """Turn a context and its continuation into token ids as their text together is tokenized.

    Spaces at the end of the context count to the continuation, as in the harness. Where a token would straddle the
    boundary, the two are tokenized apart: the context stays what it is, and every character is scored once.
    """
    if not (isinstance(context, str) and isinstance(continuation, str)):
        return encode(tokenizer, context), encode(tokenizer, continuation)
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    given, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
    if torch.equal(whole[: len(given)], given):
        return given, whole[len(given) :]
    return given, encode(tokenizer, continuation)


def encode_with_holes(
    tokenizer: Any, prompt: Prompt, *, mask_token_id: int
) -> tuple[Int[Tensor, "seq"], Bool[Tensor, "seq"]]:
    """Turn one prompt into token ids and where its holes are: `[MASK:n]` in text, mask tokens in ids."""
    if not isinstance(prompt, str):
        row = encode(tokenizer, prompt)
        return row, row == mask_token_id
    pieces, is_hole = [torch.empty(0, dtype=torch.int64)], []
    parts = HOLE.split(prompt)  # text, size of a hole, text, ...
    _check_holes(parts[1::2])
    for i, piece in enumerate(parts):
        pieces.append(torch.zeros(int(piece), dtype=torch.int64) if i % 2 else encode(tokenizer, piece))
        is_hole.append(torch.full((len(pieces[-1]),), bool(i % 2)))
    return torch.cat(pieces), torch.cat(is_hole)


def _check_holes(sizes: list[str]) -> None:
    """Raise ValueError for a hole of no token, and for more tokens than can be meant."""
    if "0" in sizes:
        raise ValueError("a hole takes at least 1 token; got [MASK:0]. Leave it out.")
    if sum(int(size[:20]) for size in sizes) > MOST:  # Python reads no number of thousands of digits
        most = max(sizes, key=len)
        raise ValueError(f"the holes of a text take at most {MOST} tokens together; got [MASK:{most[:20]}].")


def row_keys(rows: list[Tensor], *, seed: int) -> Int[Tensor, "batch"]:
    """Seed rows by (seed, prompt, how many equal prompts stand before): the place in the batch plays no part."""
    keys, seen = [], dict[bytes, int]()
    for row in rows:
        digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest()
        count = seen[digest] = seen.get(digest, -1) + 1
        keys.append(fold(seed, int.from_bytes(digest, "little", signed=True), count))
    return torch.stack(keys)
