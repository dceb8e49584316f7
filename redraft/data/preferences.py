"""Preference pairs: one prompt with a chosen and a rejected answer, as tensors for a preference objective."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset

from redraft.data.chat import ChatConfig, Example, encode_conversations, with_chat_template
from redraft.data.collate import collate
from redraft.data.sources import read_documents
from redraft.data.splits import Split, split_of
from redraft.data.tokenizer import Tokenizer

Row = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceDataset(Dataset[dict[str, Row]]):
    """Pairs by index: `chosen` and `rejected`, each a row of `input_ids`, `segment_ids` and `is_target`, (seq,)."""

    pairs: Sequence[tuple[Example, Example]]
    num_too_long: int
    """Pairs that were dropped because one of their answers is longer than seq_len."""

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, *, seq_len: int) -> str:
        """Say how many pairs there are."""
        dropped = f"; {self.num_too_long:,} left out, longer than {seq_len}" if self.num_too_long else ""
        return f"{len(self):,} pairs of answers{dropped}"

    def __getitem__(self, index: int) -> dict[str, Row]:
        chosen, rejected = self.pairs[index]
        return {"chosen": _row(chosen), "rejected": _row(rejected)}


def read_preferences(
    source: str,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    split: Split = "train",
    validation_fraction: float = 0.0,
    chat: ChatConfig | None = None,
    max_documents: int | None = None,
) -> PreferenceDataset:
    """Read records of (prompt, chosen, rejected), texts or messages, or of two conversations with one prompt.

    Only the last answer is learnt. The split is by the hash of the prompt: a prompt is never on both sides.
    Raises ValueError for records that are wrong, and where no pair is left.
    """
    chat = replace(chat or ChatConfig(), loss_on="last")
    tokenizer = with_chat_template(tokenizer, chat)
    read = islice(read_documents(source, kind="preference", skip_bad=chat.skip_bad), max_documents)
    pairs = [
        json.loads(document)
        for document in read
        if split_of(prompt_of(document), validation_fraction=validation_fraction) == split
    ]
    conversations = [json.dumps(messages) for pair in pairs for messages in pair]
    examples = encode_conversations(tokenizer, conversations, config=chat, seq_len=seq_len)
    both = zip(examples[::2], examples[1::2], strict=True)
    kept = [(chosen, rejected) for chosen, rejected in both if chosen is not None and rejected is not None]
    if not kept:
        raise ValueError(
            f"the {split} split of {source!r} has no pair of answers that fit into seq_len={seq_len}: {len(pairs)} were"
            " read. Use a larger seq_len or another validation_fraction."
        )
    return PreferenceDataset(pairs=kept, num_too_long=len(pairs) - len(kept))


def prompt_of(pair: str) -> str:
    """Return what both conversations of a pair (JSON) begin with, as JSON."""
    return json.dumps(json.loads(pair)[0][:-1])


def collate_preferences(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int
) -> dict[str, Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]]:
    """Put B pairs into one batch of 2B rows: the chosen ones, then the rejected ones in the same order."""
    return collate([row[name] for name in ("chosen", "rejected") for row in rows], pad_token_id=pad_token_id)


def _row(example: Example) -> Row:
    input_ids = torch.from_numpy(example.input_ids)
    return {
        "input_ids": input_ids,
        "segment_ids": torch.ones_like(input_ids),
        "is_target": torch.from_numpy(example.is_target),
    }
