"""Rows of a dataset to one batch of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PADDING_SEGMENT = 0


def collate(rows: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Int[Tensor, "batch seq"]]:
    """Pad rows of `input_ids` and `segment_ids` on the right to the longest one; int64.

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
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),  # (B, L)
        "segment_ids": pad_sequence(segment_ids, batch_first=True, padding_value=PADDING_SEGMENT),
    }


def targets_of(batch: Mapping[str, Tensor]) -> Bool[Tensor, "*batch seq"]:
    """Say which positions may be noised and count in the loss: `is_target`, or all tokens where there is none."""
    return batch["is_target"] if "is_target" in batch else batch["segment_ids"] > PADDING_SEGMENT
