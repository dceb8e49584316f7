"""Documents' tokens packed into windows of one length, without padding and without loss."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor
from torch.utils.data import Dataset

from redraft.data.chat import Example
from redraft.randomness import uniform

DOCUMENTS_PER_BATCH = 64
CONVERSATIONS_PER_BUFFER = 1024
RANDOM_LENGTH_KEY = 20250  # apart from the keys of noise, which begin with a run's seed


class Windows(NamedTuple):
    """Whole windows; `segment_ids` count the documents inside each window from 1 (0 is kept for padding)."""

    input_ids: Integer[np.ndarray, "windows seq"]
    segment_ids: Integer[np.ndarray, "windows seq"]


class TargetWindows(NamedTuple):
    """Windows of conversations, padded on the right (segment 0); `is_target` is what may be noised and is learnt."""

    input_ids: Integer[np.ndarray, "windows seq"]
    segment_ids: Integer[np.ndarray, "windows seq"]
    is_target: Bool[np.ndarray, "windows seq"]


class Tail(NamedTuple):
    """Tokens that do not fill a window yet, and the number of the document that each belongs to."""

    tokens: Integer[np.ndarray, "tokens"]
    owners: Integer[np.ndarray, "tokens"]


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What went into the windows. num_tokens + num_padding_tokens == num_windows * seq_len + num_dropped_tokens.

    (Except for conversations in rows of their own, whose padding is left out.)
    """

    num_documents: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the documents (of a conversation, its JSON); the end-of-document tokens stand for none."""
    num_tokens: int = 0
    """Tokens with one end-of-document token per document."""
    num_windows: int = 0
    num_dropped_tokens: int = 0
    """The last, partial window of packed text. No other token of a text is dropped."""
    num_padding_tokens: int = 0
    """Padding of packed conversations. What batches of unequal rows add is in the efficiency that training logs."""
    num_target_tokens: int = 0
    """Tokens of conversations that are learnt."""
    num_cut: int = 0
    """Conversations that lost the left of their prompt."""
    num_too_long: int = 0
    """Conversations that were dropped."""

    @property
    def efficiency(self) -> float:
        """Useful tokens / tokens in the windows, padding included."""
        useful = self.num_tokens - self.num_dropped_tokens
        return useful / max(useful + self.num_padding_tokens, 1)

    def describe(self, *, seq_len: int) -> str:
        """Say in one line what went in and what was left out."""
        text = (
            f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.num_windows:,} windows of {seq_len}"
        )
        if not self.num_target_tokens:
            return f"{text} ({self.num_dropped_tokens} tail tokens dropped)"
        return (
            f"{text}, {100 * self.efficiency:.1f} % full, {self.num_target_tokens:,} tokens to learn;"
            f" {self.num_cut} prompts cut on the left, {self.num_too_long} examples too long and dropped"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows by index, in memory or mapped: `input_ids` and `segment_ids`, (seq_len,) int32; `is_target` if there.

    A row says as `window` which one it is.
    """

    windows: Windows | TargetWindows
    is_trimmed: bool = False
    """Leave the padding of a row out; the batch pads to its longest row."""
    random_length: float = 0.0
    """P(a window is cut to a uniformly random length), the same ones in each pass (LLaDA: 0.01, arXiv 2502.09992)."""

    def __len__(self) -> int:
        return len(self.windows.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, number=index)

    def row(self, index: int, *, number: int) -> dict[str, Tensor]:
        """Give a row that is the `number`-th of a longer stream of windows."""
        length = np.count_nonzero(self.windows.segment_ids[index]) if self.is_trimmed else None
        row = {
            name: torch.from_numpy(rows[index, :length].astype(bool if name == "is_target" else np.int32))
            for name, rows in self.windows._asdict().items()
        }
        if self.random_length:  # what is cut off stays as padding: all windows of a run have one shape
            chance, part = uniform(RANDOM_LENGTH_KEY, number, torch.arange(2)).tolist()
            if chance < self.random_length:
                row["segment_ids"][1 + int(part * len(row["segment_ids"])) :] = 0
        return row | {"window": torch.tensor(number)}

    def lengths(self) -> list[int]:
        """Count the tokens of each row without its padding."""
        return np.count_nonzero(self.windows.segment_ids, axis=1).tolist()


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


def best_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Put items into few bins (best-fit decreasing: at most 11/9 of the fewest, Johnson 1974).

    The bins come in a random order, always the same: those of few long items would gather at one end, and a stream is
    trained on as it comes.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is free, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[item], 0))
        if place < len(room):
            free, chosen = room.pop(place)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        insort(room, (free - lengths[item], chosen))
    Random(0).shuffle(bins)
    return [sorted(items) for items in bins]


def pack_examples(
    examples: Sequence[Example], *, seq_len: int, pad_token_id: int, one_per_window: bool = False
) -> TargetWindows:
    """Put whole conversations into windows, each a segment of its own; none is cut, what is left over is padding."""
    bins = [[i] for i in range(len(examples))]
    if not one_per_window:
        bins = best_fit([len(example.input_ids) for example in examples], capacity=seq_len)
    shape = (len(bins), seq_len)
    windows = TargetWindows(np.full(shape, pad_token_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for row, items in enumerate(bins):
        start = 0
        for segment, item in enumerate(items, start=1):
            stop = start + len(examples[item].input_ids)
            windows.input_ids[row, start:stop] = examples[item].input_ids
            windows.segment_ids[row, start:stop] = segment
            windows.is_target[row, start:stop] = examples[item].is_target
            start = stop
    return windows


def pack_conversations(
    conversations: Iterable[str],
    *,
    encode: Callable[[list[str]], list[Example | None]],
    seq_len: int,
    pad_token_id: int,
    one_per_window: bool = False,
) -> Iterator[tuple[TargetWindows, PackingReport]]:
    """Encode and pack conversations buffer by buffer; with the windows of each comes the report up to there."""
    report, conversations = PackingReport(), iter(conversations)
    while buffer := list(islice(conversations, CONVERSATIONS_PER_BUFFER)):
        encoded = encode(buffer)
        examples = [example for example in encoded if example is not None]
        windows = pack_examples(examples, seq_len=seq_len, pad_token_id=pad_token_id, one_per_window=one_per_window)
        num_tokens = sum(len(example.input_ids) for example in examples)
        report = PackingReport(
            num_documents=report.num_documents + len(buffer),
            num_bytes=report.num_bytes + sum(len(text.encode()) for text in buffer),
            num_tokens=report.num_tokens + num_tokens,
            num_windows=report.num_windows + len(windows.input_ids),
            num_padding_tokens=report.num_padding_tokens
            + (0 if one_per_window else windows.input_ids.size - num_tokens),
            num_target_tokens=report.num_target_tokens + int(windows.is_target.sum()),
            num_cut=report.num_cut + sum(example.is_cut for example in examples),
            num_too_long=report.num_too_long + len(encoded) - len(examples),
        )
        yield windows, report


def join_windows(
    batches: Iterable[tuple[Windows | TargetWindows, PackingReport]], *, seq_len: int, num_windows: int | None = None
) -> tuple[Windows | TargetWindows, PackingReport]:
    """Join the first `num_windows` windows (or fewer, if there are no more) in memory; nothing past them is read."""
    parts, report = [], PackingReport()
    for windows, report in batches:
        parts.append(windows)
        if num_windows is not None and report.num_windows >= num_windows:
            break
    if not parts:
        return Windows(*np.empty((2, 0, seq_len), np.int32)), report
    joined = type(parts[0])(*(np.concatenate(columns)[:num_windows] for columns in zip(*parts, strict=True)))
    kept = len(joined.input_ids)
    dropped = report.num_tokens + report.num_padding_tokens - kept * seq_len
    return joined, replace(report, num_windows=kept, num_dropped_tokens=dropped)
