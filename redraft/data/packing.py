"""Documents' tokens packed into windows of one length, without padding and without loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from torch.utils.data import Dataset

DOCUMENTS_PER_BATCH = 64


class Windows(NamedTuple):
    """Whole windows; `segment_ids` count the documents inside each window from 1 (0 is kept for padding)."""

    input_ids: Integer[np.ndarray, "windows seq"]
    segment_ids: Integer[np.ndarray, "windows seq"]


class Tail(NamedTuple):
    """Tokens that do not fill a window yet, and the number of the document that each belongs to."""

    tokens: Integer[np.ndarray, "tokens"]
    owners: Integer[np.ndarray, "tokens"]


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What went into the windows: num_tokens == num_windows * seq_len + num_dropped_tokens."""

    num_documents: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the documents; the end-of-document tokens stand for none."""
    num_tokens: int = 0
    """Tokens with one end-of-document token per document."""
    num_windows: int = 0
    num_dropped_tokens: int = 0
    """The last, partial window. No other token is dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows by index, in memory or mapped from the cache: `input_ids` and `segment_ids`, (seq_len,) int32."""

    windows: Windows

    def __len__(self) -> int:
        return len(self.windows.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(rows[index].astype(np.int32)) for name, rows in self.windows._asdict().items()}


EMPTY_TAIL = Tail(np.empty(0, np.int32), np.empty(0, np.int64))


def pack(
    token_lists: Sequence[Sequence[int]], *, seq_len: int, eos_token_id: int, tail: Tail = EMPTY_TAIL
) -> tuple[Windows, Tail]:
    """Join `tail` and the documents, each followed by EOS, and cut the stream every `seq_len` tokens.

    The tail that comes back is to be passed with the next documents: packing in batches equals packing at once.
    A document's EOS belongs to its segment. A document cut by a window's edge begins the next window as segment 1.
    """
    lengths = np.fromiter((len(tokens) + 1 for tokens in token_lists), np.int64, len(token_lists))
    joined = np.empty(lengths.sum(), np.int32)
    is_eos = np.zeros(len(joined), bool)
    is_eos[np.cumsum(lengths) - 1] = True
    joined[is_eos] = eos_token_id
    if len(token_lists):
        joined[~is_eos] = np.concatenate([np.asarray(tokens, np.int32) for tokens in token_lists])
    first_owner = tail.owners[-1] + 1 if len(tail.owners) else 0
    tokens = np.concatenate([tail.tokens, joined])
    owners = np.concatenate([tail.owners, first_owner + np.repeat(np.arange(len(lengths)), lengths)])

    end = len(tokens) // seq_len * seq_len
    window_owners = owners[:end].reshape(-1, seq_len)  # (N, L)
    segment_ids = window_owners - window_owners[:, :1] + 1
    return Windows(tokens[:end].reshape(-1, seq_len), segment_ids.astype(np.int32)), Tail(tokens[end:], owners[end:])


def pack_stream(
    documents: Iterable[str], *, encode: Callable[[list[str]], list[list[int]]], seq_len: int, eos_token_id: int
) -> Iterator[tuple[Windows, PackingReport]]:
    """Encode and pack documents batch by batch; with the windows of each batch comes the report up to there."""
    report, tail, documents = PackingReport(), EMPTY_TAIL, iter(documents)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        windows, tail = pack(encode(batch), seq_len=seq_len, eos_token_id=eos_token_id, tail=tail)
        num_windows = report.num_windows + len(windows.input_ids)
        report = PackingReport(
            num_documents=report.num_documents + len(batch),
            num_bytes=report.num_bytes + sum(len(document.encode()) for document in batch),
            num_tokens=num_windows * seq_len + len(tail.tokens),
            num_windows=num_windows,
            num_dropped_tokens=len(tail.tokens),
        )
        yield windows, report


def join_windows(
    batches: Iterable[tuple[Windows, PackingReport]], *, seq_len: int, num_windows: int | None = None
) -> tuple[Windows, PackingReport]:
    """Join batches in the smallest unsigned dtypes that hold them, up to `num_windows`."""
    parts, report = [Windows(*np.empty((2, 0, seq_len), np.uint8))], PackingReport()
    for windows, report in batches:
        parts.append(Windows(*(column.astype(np.min_scalar_type(column.max(initial=0))) for column in windows)))
        if num_windows is not None and report.num_windows >= num_windows:
            num_dropped_tokens = report.num_tokens - num_windows * seq_len
            report = replace(report, num_windows=num_windows, num_dropped_tokens=num_dropped_tokens)
            break
    return Windows(*(np.concatenate(columns)[:num_windows] for columns in zip(*parts, strict=True))), report
