"""From a source of documents to cached windows of tokens for training and validation."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from redraft.data.cache import cache_key, cached_folder, is_whole
from redraft.data.chat import encode_conversations, encode_pairs, plain_text, with_chat_template
from redraft.data.config import DataConfig
from redraft.data.packing import (
    Packed,
    PackingReport,
    PairDataset,
    WindowDataset,
    Windows,
    pack_conversations,
    pack_documents,
)
from redraft.data.sources import BUILT, Split, documents_fingerprint, path_exists, read_documents, split_of
from redraft.data.tokenizer import (
    Tokenizer,
    encode_documents,
    load_fast_tokenizer,
    require_eos_token,
    tokenizer_fingerprint,
    train_tokenizer,
)
from redraft.errors import import_own

FORMAT = 6  # of the cache: raise it when a code change makes other windows from the same settings
SHUFFLE_BUFFER_DOCUMENTS = 1000
STREAM_VALIDATION_WINDOWS = 64
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """Windows packed on the fly; each worker of a DataLoader packs every n-th document.

    If `is_endless`, pass follows pass, each with another order. The n-th window is a function of n alone, so skipping n
    windows resumes exactly, in any pass.
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: Split = "train"
    is_endless: bool = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        numbers, worker = count(), get_worker_info()
        for number_of_pass in count() if self.is_endless else range(1):
            documents, total = _documents(self.config, self.split, number_of_pass=number_of_pass), PackingReport()
            if worker is not None:
                documents = islice(documents, worker.id, None, worker.num_workers)
            for windows, report in _pack(documents, self.config, self.tokenizer):
                total += report
                rows = _rows(windows, self.config, self.split)
                yield from (rows.row(index, number=next(numbers)) for index in range(len(rows)))
            if worker is None or self.is_endless:
                _require_window(total, self.config, self.split)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Both datasets, the tokenizer that made them, and what went into them."""

    train: WindowDataset | StreamedWindows | PairDataset
    validation: WindowDataset | PairDataset | list[dict[str, Tensor]]
    """Empty where validation_fraction is 0."""
    tokenizer: Tokenizer
    train_report: PackingReport | None = None
    """None for a stream: it is not read yet."""
    validation_report: PackingReport | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    """Sampling settings to save with the checkpoint."""


def prepare(config: DataConfig, *, tokenizer: Tokenizer | None = None, objective: str = "masked") -> PreparedData:
    """Read, split, tokenise and pack a source; the same text and settings give the same windows, from the cache.

    `tokenizer` replaces `config.tokenizer`. A kind MODULE:FUNCTION is called with the config, `tokenizer=` and the kind
    of the objective as `objective=`. The cache's key contains the hash of the documents' text, so the cache is never
    stale. Raises ValueError for a source that cannot be read and for a split without one whole window.
    """
    if ":" in config.kind:
        rows: PreparedData = import_own("data.kind", config.kind)(config, tokenizer=tokenizer, objective=objective)
        return rows
    if path_exists(f"{config.source}/{BUILT}"):
        return _open_built(config, tokenizer)
    if config.streaming:
        return _prepare_stream(config, tokenizer)
    fingerprint = documents_fingerprint(_read(config))
    tokenizer = _tokenizer(config, tokenizer, fingerprint)
    build = partial(_write_splits, config=config, tokenizer=tokenizer)
    settings = _window_settings(config) | {"template": tokenizer.chat_template}
    key = cache_key(format=FORMAT, source=fingerprint, tokenizer=tokenizer_fingerprint(tokenizer), **settings)
    folder = cached_folder(_cache_folder() / f"windows-{key}", build=build)
    return _open_splits(folder, config, tokenizer)


def build_data(config: DataConfig, out: Path) -> PreparedData:
    """Write a source's windows and their tokenizer into a folder that `DataConfig.source` takes in place of the source.

    The folder appears when it is complete; a killed build starts again from the beginning. Raises ValueError where
    `out` exists.
    """
    if ":" in config.kind:
        raise ValueError(f"data of kind {config.kind} cannot be built: a function makes the rows of each run.")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists. Choose another folder or remove it.")
    tokenizer = _tokenizer(config, None, documents_fingerprint(_read(config)))

    def build(folder: Path) -> None:
        _write_splits(folder, config=config, tokenizer=tokenizer)
        tokenizer.save_pretrained(folder)
        (folder / BUILT).write_text(json.dumps(_window_settings(config) | {"max_documents": config.max_documents}))

    return _open_splits(cached_folder(out, build=build), config, tokenizer)


def _open_built(config: DataConfig, tokenizer: Tokenizer | None) -> PreparedData:
    """Open a folder of `build_data`. Raises ValueError where it is damaged or was built with other settings."""
    folder = Path(config.source).expanduser()
    if not is_whole(folder):
        raise ValueError(f"the built data in {str(folder)!r} are damaged or incomplete. Build them again.")
    built, wanted = json.loads((folder / BUILT).read_text()), _window_settings(config)
    if config.max_documents is not None:
        wanted["max_documents"] = config.max_documents
    for name, value in wanted.items():
        if built.get(name) != value:
            raise ValueError(
                f"{str(folder)!r} was built with {name}={built.get(name)!r}; got {value!r}. Set data.{name} to the"
                " former, or build again."
            )
    saved = load_fast_tokenizer(folder)
    if tokenizer is None and config.tokenizer:
        tokenizer = load_fast_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(saved):
        raise ValueError(
            f"{str(folder)!r} was built with another tokenizer than {config.tokenizer or 'the one given'}."
            " Leave data.tokenizer out to take the built one, or build again."
        )
    return _open_splits(folder, config, saved)


def _prepare_stream(config: DataConfig, tokenizer: Tokenizer | None) -> PreparedData:
    if tokenizer is None and config.tokenizer is None:
        raise ValueError("streaming needs a tokenizer; got None. Give a folder or hub id, or do not stream.")
    tokenizer = _tokenizer(config, tokenizer, fingerprint="")
    validation = StreamedWindows(config=config, tokenizer=tokenizer, split="validation")
    return PreparedData(
        train=StreamedWindows(config=config, tokenizer=tokenizer),
        validation=list(islice(validation, STREAM_VALIDATION_WINDOWS)),
        tokenizer=tokenizer,
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redraft" / "data"


def _window_settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings that the windows depend on, besides the text and the tokenizer."""
    chat = None if config.kind == "text" else asdict(config.chat)
    return {name: getattr(config, name) for name in ("kind", "seq_len", "validation_fraction")} | {"chat": chat}


def _tokenizer(config: DataConfig, tokenizer: Tokenizer | None, fingerprint: str) -> Tokenizer:
    """Take the tokenizer that is given, or load it, or train it on the training documents, from the cache."""
    if tokenizer is None and config.tokenizer:
        tokenizer = load_fast_tokenizer(config.tokenizer)
    if tokenizer is None:
        settings = {"validation_fraction": config.validation_fraction, "vocab_size": config.vocab_size}
        key = cache_key(format=FORMAT, source=fingerprint, **settings)
        build = partial(_write_tokenizer, config=config)
        tokenizer = load_fast_tokenizer(cached_folder(_cache_folder() / f"tokenizer-{key}", build=build))
    return tokenizer if config.kind == "text" else with_chat_template(tokenizer, config.chat)


def _write_tokenizer(folder: Path, *, config: DataConfig) -> None:
    documents = _documents(config, "train")
    if (first := next(documents, None)) is None:
        _require_window(PackingReport(), config, "train")
    documents = _with_progress(chain(filter(None, [first]), documents), "train the tokenizer")
    texts = documents if config.kind == "text" else map(plain_text, documents)
    train_tokenizer(texts, vocab_size=config.vocab_size).save_pretrained(folder)


def _write_splits(folder: Path, *, config: DataConfig, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        packed = _pack(_with_progress(_documents(config, split), f"tokenise {split}"), config, tokenizer)
        report = write_windows(folder, split, packed, seq_len=config.seq_len, vocab_size=len(tokenizer))
        _require_window(report, config, split)


def write_windows(folder: Path, split: Split, packed: Packed, *, seq_len: int, vocab_size: int) -> PackingReport:
    """Write a split into one binary file of rows, and return its report; one batch is in memory at a time.

    A column takes the smallest unsigned dtype that holds every token id or segment of the split.
    """
    largest = {"input_ids": vocab_size, "segment_ids": seq_len, "is_target": 1}
    total, columns = PackingReport(), list[Any]()
    with (folder / f"{split}.bin").open("wb") as file:
        for windows, report in packed:
            total += report
            columns = [(name, np.min_scalar_type(largest[name]).str, [seq_len]) for name in windows.columns()]
            rows = np.empty(len(windows.input_ids), [(name, kind, (seq_len,)) for name, kind, _ in columns])
            for name, values in windows.columns().items():
                rows[name] = values
            file.write(rows.tobytes())
    (folder / f"{split}.json").write_text(json.dumps({"columns": columns, "report": asdict(total)}))
    return total


def open_windows(folder: Path, split: Split) -> tuple[Windows, PackingReport]:
    """Map the windows of a split, without reading them."""
    saved = json.loads((folder / f"{split}.json").read_text())
    report = PackingReport(**saved["report"])
    if not report.num_windows:
        return Windows(*np.empty((2, 0, 1), np.uint16)), report
    rows = np.memmap(
        folder / f"{split}.bin", [(name, kind, tuple(shape)) for name, kind, shape in saved["columns"]], "r"
    )
    return Windows(**{name: rows[name] for name, *_ in saved["columns"]}), report


def _open_splits(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> PreparedData:
    (train, train_report), (validation, validation_report) = (open_windows(folder, split) for split in SPLITS)
    return PreparedData(
        train=_dataset(train, config, "train"),
        validation=_dataset(validation, config, "validation"),
        tokenizer=tokenizer,
        train_report=train_report,
        validation_report=validation_report,
    )


def _is_one_per_window(config: DataConfig) -> bool:
    return config.kind == "preference" or (config.kind == "chat" and config.chat.batching == "grouped")


def _rows(windows: Windows, config: DataConfig, split: Split) -> WindowDataset:
    random_length = config.random_length if split == "train" else 0.0
    return WindowDataset(windows=windows, is_trimmed=_is_one_per_window(config), random_length=random_length)


def _dataset(windows: Windows, config: DataConfig, split: Split) -> WindowDataset | PairDataset:
    rows = _rows(windows, config, split)
    return PairDataset(rows=rows) if config.kind == "preference" else rows


def _read(config: DataConfig) -> Iterator[str]:
    documents = read_documents(
        config.source, text_field=config.text_field, kind=config.kind, streaming=config.streaming
    )
    return islice(documents, config.max_documents)


def _documents(config: DataConfig, split: Split, *, number_of_pass: int = 0) -> Iterator[str]:
    """Read one split; training documents are shuffled inside a buffer, as a corpus may not fit into memory."""
    if split == "validation" and not config.validation_fraction:
        return
    key_of = _prompt_of if config.kind == "preference" else str
    fraction = config.validation_fraction
    documents = (text for text in _read(config) if split_of(key_of(text), validation_fraction=fraction) == split)
    if split == "validation" or config.kind == "preference":
        yield from documents
        return
    random = Random(number_of_pass)
    while buffer := list(islice(documents, SHUFFLE_BUFFER_DOCUMENTS)):
        random.shuffle(buffer)
        yield from buffer


def _prompt_of(pair: str) -> str:
    """Return the prompt of a pair (JSON) as JSON: splitting by it puts no prompt into both splits."""
    return json.dumps(json.loads(pair)[0][:-1])


def _pack(documents: Iterable[str], config: DataConfig, tokenizer: Tokenizer) -> Packed:
    eos_token_id = require_eos_token(tokenizer)
    if config.kind == "text":
        encode = partial(encode_documents, tokenizer)
        return pack_documents(documents, encode=encode, seq_len=config.seq_len, eos_token_id=eos_token_id)
    encode_chat = encode_pairs if config.kind == "preference" else encode_conversations
    return pack_conversations(
        documents,
        encode=partial(encode_chat, tokenizer, config=config.chat, seq_len=config.seq_len),
        seq_len=config.seq_len,
        pad_token_id=eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        one_per_window=_is_one_per_window(config),
    )


def _require_window(report: PackingReport, config: DataConfig, split: Split) -> None:
    if report.num_windows or (split == "validation" and not config.validation_fraction):
        return
    too_long = f", {report.num_too_long} conversations too long" if report.num_too_long else ""
    raise ValueError(
        f"the {split} split of {config.source!r} fills no window of seq_len={config.seq_len}: {report.num_tokens}"
        f" tokens in {report.num_documents} documents{too_long}. Use another seq_len, more documents (a text file is"
        f" one, a .jsonl holds many) or another validation_fraction than {config.validation_fraction} (0 for none)."
    )


def _with_progress(documents: Iterable[str], what: str) -> Iterator[str]:
    yield from tqdm(documents, desc=what, unit=" documents", disable=None)  # None: only on a terminal
