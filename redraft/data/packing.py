"""Pack documents into windows of equal length, without padding; pack conversations without cutting them."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
RANDOM_LENGTH_KEY = 20250  # unlike the keys of noise, which begin with a run's seed


class Windows(NamedTuple):
    """Whole windows; `segment_ids` count the documents inside each window from 1, and are 0 for padding.

    Windows of conversations are padded on the right, and `is_target` marks the tokens that are noised and learnt.
    """

    input_ids: Integer[np.ndarray, "windows seq"]
    segment_ids: Integer[np.ndarray, "windows seq"]
    is_target: Bool[np.ndarray, "windows seq"] | Integer[np.ndarray, "windows seq"] | None = None

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays that are present, by name."""
        return {name: rows for name, rows in self._asdict().items() if rows is not None}


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """Counts of what went into the windows: num_tokens + num_padding_tokens == num_windows * seq_len +
    num_dropped_tokens, except for conversations with a row each, whose padding is not counted. Reports can be added.
    """

    num_documents: int = 0
    num_tokens: int = 0
    """Tokens with one end-of-document token per document."""
    num_windows: int = 0
    num_dropped_tokens: int = 0
    """The last, partial window of packed text. No other token of a text is dropped."""
    num_padding_tokens: int = 0
    """Padding of packed conversations. Training logs the efficiency of batches, which includes padding of rows."""
    num_target_tokens: int = 0
    """Tokens of conversations that are learnt."""
    num_cut: int = 0
    """Conversations whose prompt was cut on the left."""
    num_too_long: int = 0
    """Conversations that were dropped."""

    def __add__(self, other: "PackingReport") -> "PackingReport":
        return PackingReport(**{name: count + getattr(other, name) for name, count in asdict(self).items()})

    @property
    def efficiency(self) -> float:
        """Useful tokens / tokens in the windows, padding included."""
        useful = self.num_tokens - self.num_dropped_tokens
        return useful / max(useful + self.num_padding_tokens, 1)

    def describe(self, *, seq_len: int) -> str:
        """Describe in one line what was packed and what was left out."""
        text = (
            f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.num_windows:,} windows of {seq_len}"
        )
        if not self.num_target_tokens:
            return f"{text} ({self.num_dropped_tokens} tail tokens dropped)"
        return (
            f"{text}, {100 * self.efficiency:.1f} % full, {self.num_target_tokens:,} tokens to learn;"
            f" {self.num_cut} prompts cut on the left, {self.num_too_long} examples too long and dropped"
        )


Packed = Iterator[tuple[Windows, PackingReport]]
"""The windows of each batch of documents, and what went into them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows by index, in memory or mapped: `input_ids` and `segment_ids`, (seq_len,) int32; `is_target` if present.

    `window` is the number of the window.
    """

    windows: Windows
    is_trimmed: bool = False
    """Leave the padding of a row out; the batch pads to its longest row."""
    random_length: float = 0.0
    """P(a window is cut to a uniformly random length), the same windows in each pass (LLaDA: 0.01, 2502.09992)."""

    def __len__(self) -> int:
        return len(self.windows.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, number=index)

    def row(self, index: int, *, number: int) -> dict[str, Tensor]:
        """Give a row that is the `number`-th of a longer stream of windows."""
        length = np.count_nonzero(self.windows.segment_ids[index]) if self.is_trimmed else None
        row = {
            name: torch.from_numpy(rows[index, :length].astype(bool if name == "is_target" else np.int32))
            for name, rows in self.windows.columns().items()
        }
        if self.random_length:  # the cut part becomes padding, so that all windows of a run have one shape
            chance, part = uniform(RANDOM_LENGTH_KEY, number, torch.arange(2)).tolist()
            if chance < self.random_length:
                row["segment_ids"][1 + int(part * len(row["segment_ids"])) :] = 0
        return row | {"window": torch.tensor(number)}

    def lengths(self) -> list[int]:
        """Count the tokens of each row without its padding."""
        return np.count_nonzero(self.windows.segment_ids, axis=1).tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class PairDataset(Dataset[dict[str, dict[str, Tensor]]]):
    """Preference pairs by index: `chosen` and `rejected`, which are the rows 2 i and 2 i + 1."""

    rows: WindowDataset

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __getitem__(self, index: int) -> dict[str, dict[str, Tensor]]:
        return {"chosen": self.rows[2 * index], "rejected": self.rows[2 * index + 1]}


NO_TOKENS = np.empty((2, 0), np.int32)


def pack(
    token_lists: Sequence[Sequence[int]],
    *,
    seq_len: int,
    eos_token_id: int,
    tail: Integer[np.ndarray, "2 before"] = NO_TOKENS,
) -> tuple[Windows, Integer[np.ndarray, "2 after"]]:
    """Join `tail` and the documents, each followed by EOS, and cut the stream every `seq_len` tokens.

    The tail that comes back is to be passed with the next documents: packing in batches equals packing at once.
    A document's EOS belongs to its segment. A document cut by a window's edge begins the next window as segment 1.
    """
    documents = [np.array([[*tokens, eos_token_id], [1, *[0] * len(tokens)]], np.int32) for tokens in token_lists]
    stream = np.concatenate([tail, *documents], axis=1)  # (2, tokens): each token, and whether it begins a document
    end = stream.shape[1] // seq_len * seq_len
    input_ids, is_first = stream[:, :end].reshape(2, -1, seq_len)  # (N, L) each
    num_begun = is_first.cumsum(axis=1, dtype=np.int32)
    return Windows(input_ids, num_begun - num_begun[:, :1] + 1), stream[:, end:]


def pack_documents(
    documents: Iterable[str], *, encode: Callable[[list[str]], list[list[int]]], seq_len: int, eos_token_id: int
) -> Packed:
    """Encode and pack documents batch by batch."""
    tail, documents = NO_TOKENS, iter(documents)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        num_before = tail.shape[1]
        windows, tail = pack(encode(batch), seq_len=seq_len, eos_token_id=eos_token_id, tail=tail)
        num_left = tail.shape[1] - num_before
        report = PackingReport(
            num_documents=len(batch),
            num_tokens=windows.input_ids.size + num_left,
            num_windows=len(windows.input_ids),
            num_dropped_tokens=num_left,
        )
        yield windows, report


def best_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Put items into few bins (best-fit decreasing: at most 11/9 of the minimum, Johnson 1974).

    The bins are shuffled with a fixed seed: else those with few long items would come first, and a stream is trained on
    in this order.
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
) -> Windows:
    """Put whole conversations into windows, each as a segment of its own; the rest of a window is padding."""
    bins = [[i] for i in range(len(examples))]
    if not one_per_window:
        bins = best_fit([len(example.input_ids) for example in examples], capacity=seq_len)
    shape = (len(bins), seq_len)
    input_ids, segment_ids = np.full(shape, pad_token_id, np.int32), np.zeros(shape, np.int32)
    is_target = np.zeros(shape, bool)
    for row, items in enumerate(bins):
        start = 0
        for segment, item in enumerate(items, start=1):
            stop = start + len(examples[item].input_ids)
            input_ids[row, start:stop] = examples[item].input_ids
            segment_ids[row, start:stop] = segment
            is_target[row, start:stop] = examples[item].is_target
            start = stop
    return Windows(input_ids, segment_ids, is_target)


def pack_conversations(
    conversations: Iterable[str],
    *,
    encode: Callable[[list[str]], list[Example | None]],
    seq_len: int,
    pad_token_id: int,
    one_per_window: bool = False,
) -> Packed:
    """Encode and pack conversations buffer by buffer."""
    conversations = iter(conversations)
    while buffer := list(islice(conversations, CONVERSATIONS_PER_BUFFER)):
        encoded = encode(buffer)
        examples = [example for example in encoded if example is not None]
        windows = pack_examples(examples, seq_len=seq_len, pad_token_id=pad_token_id, one_per_window=one_per_window)
        num_tokens = sum(len(example.input_ids) for example in examples)
        report = PackingReport(
            num_documents=len(buffer),
            num_tokens=num_tokens,
            num_windows=len(windows.input_ids),
            num_padding_tokens=0 if one_per_window else windows.input_ids.size - num_tokens,
            num_target_tokens=sum(int(example.is_target.sum()) for example in examples),
            num_cut=sum(example.is_cut for example in examples),
            num_too_long=len(encoded) - len(examples),
        )
        yield windows, report
