"""Rows of a dataset to one batch of tensors."""

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

    A pure function of the seed and the pass (`set_epoch`), so that a resumed run goes through the same batches. What a
    pass has beyond its last whole batch it leaves out, drawn anew in each: a batch is that of an optimizer step, and
    in whatever pieces it is computed, every step has as many rows.
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
        groups = order.split(BATCHES_PER_GROUP * self.batch_size)
        batches = [b for g in groups for b in g[self.lengths[g].argsort(stable=True)].split(self.batch_size)]
        for index in torch.randperm(len(batches), generator=chance).tolist():
            yield from batches[index].tolist()


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int
) -> dict[str, Int[Tensor, "batch ..."] | Bool[Tensor, "batch seq"]]:
    """Pad rows of `input_ids` and `segment_ids` on the right to the longest one; int64. `is_target`, if there, bool.

    `window`, if there, is the number of each row's window, (B,).

    Padding is what has segment 0, never what equals `pad_token_id`: a model may share that id with a real token.
    """
    if not rows:
        raise ValueError("collate needs at least one row; got none. Is the dataset empty?")
    input_ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    segment_ids = [torch.as_tensor(row["segment_ids"], dtype=torch.int64) for row in rows]
    for index, (ids, segments) in enumerate(zip(input_ids, segment_ids, strict=True)):
        if len(ids) != len(segments):
            raise ValueError(
                f"input_ids and segment_ids of a row must be equally long; got {len(ids)} and {len(segments)}"
                f" in row {index}. Give each token its segment."
            )
    batch: dict[str, Tensor] = {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),  # (B, L)
        "segment_ids": pad_sequence(segment_ids, batch_first=True, padding_value=PADDING_SEGMENT),
    }
    if "window" in rows[0]:
        batch["window"] = torch.stack([row["window"] for row in rows])
    if "is_target" in rows[0]:
        is_target = [torch.as_tensor(row["is_target"], dtype=torch.bool) for row in rows]
        batch["is_target"] = pad_sequence(is_target, batch_first=True, padding_value=False)
    return batch


def targets_of(batch: Mapping[str, Tensor]) -> Bool[Tensor, "*batch seq"]:
    """Say which positions may be noised and count in the loss: `is_target`, or all tokens where there is none."""
    return batch["is_target"] if "is_target" in batch else batch["segment_ids"] > PADDING_SEGMENT
