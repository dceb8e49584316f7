"""From a source of documents to cached windows of tokens for training and validation."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from redraft.data.cache import cache_key, cached_folder
from redraft.data.packing import PackingReport, WindowDataset, Windows, join_windows, pack_stream
from redraft.data.sources import read_documents, source_fingerprint
from redraft.data.splits import Split, split_of
from redraft.data.tokenizer import (
    SMALLEST_VOCAB_SIZE,
    Tokenizer,
    encode_documents,
    load_tokenizer,
    require_eos_token,
    tokenizer_fingerprint,
    train_tokenizer,
)

FORMAT = 1  # of the cache: raise it where the same settings give other windows
SHUFFLE_BUFFER_DOCUMENTS = 1000
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    source: str = "stdlib"
    """stdlib (Python's own library), a file or folder (txt, md, py, jsonl, json, csv, parquet), a dataset of
    save_to_disk, or a hub id such as owner/name:config@split."""
    text_field: str = "text"
    """Field that holds the text of a record."""
    seq_len: int = 256
    """Tokens per window."""
    validation_fraction: float = 0.05
    """Fraction of the documents for validation, chosen by the hash of their text; 0 for none."""
    isolate_documents: bool = False
    """No attention across documents in a window; positions restart at each."""
    max_documents: int | None = None
    """Use the source's first documents only."""
    streaming: bool = False
    """Read and pack on the fly, without cache. Needs a tokenizer."""
    validation_windows: int = 64
    """Windows of the validation set when streaming: the first ones."""
    shuffle_seed: int | None = 0
    """Seed for the order of the training documents before packing (within 1000 documents); None keeps the source's."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer; by default a byte-level BPE is trained on the training documents."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained."""
    cache_dir: str | None = None
    """Folder of the cache; by default redraft/data in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        for name, smallest in (("seq_len", 2), ("validation_windows", 1), ("vocab_size", SMALLEST_VOCAB_SIZE)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1); got {self.validation_fraction}. 0.05 is usual.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, or None for all; got {self.max_documents}.")
        if not self.source:
            raise ValueError("source must not be empty; got ''. Give 'stdlib', a path or a hub id.")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """Training windows packed on the fly; each worker of a DataLoader packs every n-th document."""

    config: DataConfig
    tokenizer: Tokenizer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        documents, worker, report = _documents(self.config, "train"), get_worker_info(), PackingReport()
        if worker is not None:
            documents = islice(documents, worker.id, None, worker.num_workers)
        for windows, report in _pack(documents, self.config, self.tokenizer):  # noqa: B007
            dataset = WindowDataset(windows=windows)
            yield from (dataset[index] for index in range(len(dataset)))
        if worker is None:
            _require_window(report, self.config, "train")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Both datasets, the tokenizer that made them, and what went into them."""

    train: WindowDataset | StreamedWindows
    validation: WindowDataset
    """Empty where validation_fraction is 0."""
    tokenizer: Tokenizer
    train_report: PackingReport | None
    """None for a stream: it is not read yet."""
    validation_report: PackingReport


def prepare(config: DataConfig, *, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Read, split, tokenise and pack a source; the same text and settings give the same windows, from the cache.

    `tokenizer` goes before `config.tokenizer`. The cache's key holds the hash of the documents' text, so it is never
    stale. Raises ValueError for a source that cannot be read and for a split without one whole window.
    """
    if config.streaming:
        return _prepare_stream(config, tokenizer)
    fingerprint = source_fingerprint(config.source, text_field=config.text_field, max_documents=config.max_documents)
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else _trained_tokenizer(config, fingerprint)
    key = cache_key(
        format=FORMAT,
        source=fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        seq_len=config.seq_len,
        validation_fraction=config.validation_fraction,
        shuffle_seed=config.shuffle_seed,
    )
    build = partial(_write_splits, config=config, tokenizer=tokenizer)
    folder = cached_folder(_cache_dir(config) / f"windows-{key}", build=build)
    (train, train_report), (validation, validation_report) = (_open_split(folder, split) for split in SPLITS)
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        train_report=train_report,
        validation_report=validation_report,
    )


def _prepare_stream(config: DataConfig, tokenizer: Tokenizer | None) -> PreparedData:
    if tokenizer is None:
        if config.tokenizer is None:
            raise ValueError("streaming needs a tokenizer; got None. Give a folder or hub id, or do not stream.")
        tokenizer = load_tokenizer(config.tokenizer)
    batches = _pack(_documents(config, "validation"), config, tokenizer)
    windows, report = join_windows(batches, seq_len=config.seq_len, num_windows=config.validation_windows)
    _require_window(report, config, "validation")
    return PreparedData(
        train=StreamedWindows(config=config, tokenizer=tokenizer),
        validation=WindowDataset(windows=windows),
        tokenizer=tokenizer,
        train_report=None,
        validation_report=report,
    )


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redraft" / "data"


def _trained_tokenizer(config: DataConfig, fingerprint: str) -> Tokenizer:
    settings = {"validation_fraction": config.validation_fraction, "vocab_size": config.vocab_size}
    key = cache_key(format=FORMAT, source=fingerprint, **settings)
    build = partial(_write_tokenizer, config=config)
    return load_tokenizer(cached_folder(_cache_dir(config) / f"tokenizer-{key}", build=build))


def _write_tokenizer(folder: Path, *, config: DataConfig) -> None:
    if next(_documents(config, "train"), None) is None:
        _require_window(PackingReport(), config, "train")
    documents = _with_progress(_documents(config, "train"), "train the tokenizer")
    train_tokenizer(documents, vocab_size=config.vocab_size).save_pretrained(folder)


def _write_splits(folder: Path, *, config: DataConfig, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        documents = _with_progress(_documents(config, split), f"tokenise {split}")
        windows, report = join_windows(_pack(documents, config, tokenizer), seq_len=config.seq_len)
        _require_window(report, config, split)
        for name, column in windows._asdict().items():
            np.save(folder / f"{split}.{name}.npy", column)
        (folder / f"{split}.json").write_text(json.dumps(asdict(report)))


def _open_split(folder: Path, split: Split) -> tuple[WindowDataset, PackingReport]:
    windows = Windows(*(np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in Windows._fields))
    return WindowDataset(windows=windows), PackingReport(**json.loads((folder / f"{split}.json").read_text()))


def _documents(config: DataConfig, split: Split) -> Iterator[str]:
    """Read one split, the training documents shuffled inside a buffer: no corpus need fit into memory."""
    if split == "validation" and not config.validation_fraction:
        return
    documents = read_documents(config.source, text_field=config.text_field, streaming=config.streaming)
    documents = (
        document
        for document in islice(documents, config.max_documents)
        if split_of(document, validation_fraction=config.validation_fraction) == split
    )
    if split == "validation" or config.shuffle_seed is None:
        yield from documents
        return
    random = Random(config.shuffle_seed)
    while buffer := list(islice(documents, SHUFFLE_BUFFER_DOCUMENTS)):
        random.shuffle(buffer)
        yield from buffer


def _pack(
    documents: Iterable[str], config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[Windows, PackingReport]]:
    eos_token_id, encode = require_eos_token(tokenizer), partial(encode_documents, tokenizer)
    return pack_stream(documents, encode=encode, seq_len=config.seq_len, eos_token_id=eos_token_id)


def _require_window(report: PackingReport, config: DataConfig, split: Split) -> None:
    if report.num_windows or (split == "validation" and not config.validation_fraction):
        return
    raise ValueError(
        f"the {split} split of {config.source!r} has {report.num_tokens} tokens in {report.num_documents} documents;"
        f" one window needs seq_len={config.seq_len}. Use a smaller seq_len, more documents (a text file is one,"
        f" a .jsonl holds many) or another validation_fraction than {config.validation_fraction} (0 for none)."
    )


def _with_progress(documents: Iterable[str], what: str) -> Iterator[str]:
    yield from tqdm(documents, desc=what, unit=" documents", disable=None)  # None: only on a terminal
