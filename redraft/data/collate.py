"""Rows of a dataset to batches of tensors: their order, their padding, and simple baselines of the loss."""

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

PADDING_SEGMENT = 0
BATCHES_PER_GROUP = 50


class PassSampler(Sampler[int]):
    """A random order of whole batches; given `lengths`, the rows of a batch are about equally long.

    A pure function of the seed and the pass (`set_epoch`), so that a resumed run gets the same batches. A batch is that
    of an optimizer step. Rows that do not fill a last whole batch are left out, other ones in each pass.
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed((self.seed << 16) + self.epoch)
        order = torch.randperm(self.num_rows, generator=chance)[: len(self)]
        if self.lengths is None:
            yield from order.tolist()
            return
        # Rows are sorted by length within groups of many batches only, so that each pass has other batches.
        groups = order.split(BATCHES_PER_GROUP * self.batch_size)
        batches = [b for g in groups for b in g[self.lengths[g].argsort(stable=True)].split(self.batch_size)]
        for index in torch.randperm(len(batches), generator=chance).tolist():
            yield from batches[index].tolist()


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int
) -> dict[str, Int[Tensor, "batch ..."] | Bool[Tensor, "batch seq"]]:
    """Pad rows of `input_ids` and `segment_ids` on the right to the longest one; int64. `is_target`, if there, bool.

    `window`, if there, is the number of each row's window, (B,).

    Padding is marked by segment 0, not by `pad_token_id`: a model may use that id for a real token.
    """
    if not rows:
        raise ValueError("collate needs at least one row; got none. Is the dataset empty?")
    for number, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["segment_ids"]):
            raise ValueError(
                "input_ids and segment_ids of a row must be equally long; got"
                f" {len(row['input_ids'])} and {len(row['segment_ids'])} in row {number}. Give each token its segment."
            )

    def padded(name: str, padding: int, dtype: torch.dtype) -> Tensor:
        columns = [torch.as_tensor(row[name], dtype=dtype) for row in rows]
        return pad_sequence(columns, batch_first=True, padding_value=padding)  # (B, L)

    batch = {
        "input_ids": padded("input_ids", pad_token_id, torch.int64),
        "segment_ids": padded("segment_ids", PADDING_SEGMENT, torch.int64),
    }
    if "window" in rows[0]:
        batch["window"] = torch.stack([row["window"] for row in rows])
    if "is_target" in rows[0]:
        batch["is_target"] = padded("is_target", False, torch.bool)
    return batch


def collate_preferences(
    pairs: Sequence[Mapping[str, Any]], *, pad_token_id: int
) -> dict[str, Int[Tensor, "batch ..."] | Bool[Tensor, "batch seq"]]:
    """Put B pairs into one batch of 2B rows: the chosen ones, then the rejected ones in the same order."""
    return collate([pair[name] for name in ("chosen", "rejected") for pair in pairs], pad_token_id=pad_token_id)


def targets_of(batch: Mapping[str, Tensor]) -> Bool[Tensor, "*batch seq"]:
    """Return which positions may be noised and count in the loss: `is_target`, or all tokens where there is none."""
    return batch["is_target"] if "is_target" in batch else batch["segment_ids"] > PADDING_SEGMENT


def unigram_nats(dataset: Any, *, vocab_size: int) -> float:
    """Entropy of a dataset's tokens under their own frequencies, in nats per token."""
    counts = torch.bincount(_tokens(dataset), minlength=vocab_size).to(torch.float64)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())


def gzip_bits_per_byte(dataset: Any, tokenizer: Any) -> float:
    """Compress the dataset's text as one stream with `gzip -9`: bits per byte of text."""
    text = tokenizer.decode(_tokens(dataset).tolist(), skip_special_tokens=True).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text) if text else math.nan


def _tokens(dataset: Any) -> Tensor:
    """All tokens of a dataset that a model is measured on, in order."""
    rows = (dataset[i] for i in range(len(dataset)))
    return torch.cat([row["input_ids"][targets_of(row)] for row in rows]).to(torch.int64)
