"""From a source of documents to cached windows of tokens for training and validation."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from redraft.data.cache import cache_key, cached_folder, is_whole
from redraft.data.chat import encode_conversations, plain_text, with_chat_template
from redraft.data.config import DataConfig
from redraft.data.packing import (
    PackingReport,
    TargetWindows,
    WindowDataset,
    Windows,
    join_windows,
    pack_conversations,
    pack_stream,
)
from redraft.data.preferences import PreferenceDataset, prompt_of, read_preferences
from redraft.data.sources import BUILT, exists, read_documents, source_fingerprint
from redraft.data.splits import Split, split_of
from redraft.data.store import Batch, open_windows, write_windows
from redraft.data.tokenizer import (
    Tokenizer,
    encode_documents,
    load_tokenizer,
    require_eos_token,
    tokenizer_fingerprint,
    train_tokenizer,
)

FORMAT = 4  # of the cache: raise it where the same settings give other windows
SHUFFLE_BUFFER_DOCUMENTS = 1000
SPLITS: tuple[Split, ...] = ("train", "validation")
BUILT_SETTINGS = ("kind", "seq_len", "validation_fraction", "chat")
BUILT_ORDER = ("max_documents", "shuffle_seed")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """Training windows packed on the fly; each worker of a DataLoader packs every n-th document.

    Pass after pass without end where `is_endless`, each shuffled anew: the n-th window is a function of n alone, so
    skipping n windows resumes exactly, in whichever pass.
    """

    config: DataConfig
    tokenizer: Tokenizer
    is_endless: bool = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        numbers = count()
        for number_of_pass in count() if self.is_endless else range(1):
            yield from self._one_pass(number_of_pass, numbers)

    def _one_pass(self, number_of_pass: int, numbers: Iterator[int]) -> Iterator[dict[str, Tensor]]:
        documents, worker = _documents(self.config, "train", number_of_pass=number_of_pass), get_worker_info()
        report = PackingReport()
        if worker is not None:
            documents = islice(documents, worker.id, None, worker.num_workers)
        for windows, report in _pack(documents, self.config, self.tokenizer):  # noqa: B007
            dataset = _dataset(windows, self.config)
            yield from (dataset.row(index, number=next(numbers)) for index in range(len(dataset)))
        if worker is None or self.is_endless:
            _require_window(report, self.config, "train")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Both datasets, the tokenizer that made them, and what went into them."""

    train: WindowDataset | StreamedWindows | PreferenceDataset
    validation: WindowDataset | PreferenceDataset
    """Empty where validation_fraction is 0."""
    tokenizer: Tokenizer
    train_report: PackingReport | PreferenceDataset | None
    """None for a stream: it is not read yet. Pairs speak for themselves."""
    validation_report: PackingReport | PreferenceDataset
    generation: dict[str, Any] = field(default_factory=dict)
    """Settings of sampling that the checkpoint is to carry."""


def prepare(config: DataConfig, *, tokenizer: Tokenizer | None = None, objective: str = "masked") -> PreparedData:
    """Read, split, tokenise and pack a source; the same text and settings give the same windows, from the cache.

    `tokenizer` goes before `config.tokenizer`; a kind MODULE:FUNCTION is called with the config, `tokenizer=` and the
    kind of `objective=`. The cache's key holds the hash of the documents' text, so it is never
    stale. Raises ValueError for a source that cannot be read and for a split without one whole window.
    """
    if ":" in config.kind:
        rows: PreparedData = _import_function(config.kind)(config, tokenizer=tokenizer, objective=objective)
        return rows
    if exists(Path(config.source).expanduser() / BUILT):
        return _open_built(config, tokenizer)
    if config.streaming:
        return _prepare_stream(config, tokenizer)
    fingerprint = source_fingerprint(config.source, max_documents=config.max_documents, **_reading(config))
    tokenizer = _tokenizer(config, tokenizer, fingerprint)
    if config.kind == "preference":
        return _prepare_pairs(config, tokenizer)
    key = _key(config, tokenizer, fingerprint)
    build = partial(_write_splits, config=config, tokenizer=tokenizer)
    return _opened(cached_folder(_cache_dir(config) / f"windows-{key}", build=build), config, tokenizer)


def build_data(config: DataConfig, out: Path) -> PreparedData:
    """Write a source's windows and their tokenizer into a folder that `DataConfig.source` takes in place of the source.

    The folder appears when it is whole; what a killed build left is begun again. Raises ValueError where `out` holds
    anything else.
    """
    if config.kind == "preference" or ":" in config.kind:
        raise ValueError(f"rows of kind {config.kind} are read as they are and not built. Train on the source.")
    fingerprint = source_fingerprint(config.source, max_documents=config.max_documents, **_reading(config))
    tokenizer = _tokenizer(config, None, fingerprint)
    built = {name: value for name, value in asdict(config).items() if name in (*BUILT_SETTINGS, *BUILT_ORDER)}
    content = json.dumps({"key": _key(config, tokenizer, fingerprint), "source": config.source, "settings": built})

    def build(folder: Path) -> None:
        _write_splits(folder, config=config, tokenizer=tokenizer)
        tokenizer.save_pretrained(folder)
        (folder / BUILT).write_text(content)

    if out.exists() and not (is_whole(out) and (out / BUILT).exists() and (out / BUILT).read_text() == content):
        raise ValueError(f"{str(out)!r} holds something else than this build. Choose another folder or remove it.")
    return _opened(cached_folder(out, build=build), config, tokenizer)


def _open_built(config: DataConfig, tokenizer: Tokenizer | None) -> PreparedData:
    """Open a folder of `build_data`. Raises ValueError where it is damaged or was built otherwise."""
    folder = Path(config.source).expanduser()
    if not is_whole(folder):
        raise ValueError(f"the built data in {str(folder)!r} are damaged or not whole. Build them again.")
    built, wanted = json.loads((folder / BUILT).read_text())["settings"], asdict(config)
    for name in BUILT_SETTINGS:
        if built[name] != wanted[name] and (name != "chat" or config.kind == "chat"):
            raise ValueError(
                f"{str(folder)!r} was built with {name}={built[name]!r}; got {wanted[name]!r}. Set data.{name} to it,"
                " or build again."
            )
    for name in BUILT_ORDER:
        if (value := getattr(config, name)) not in (
            DataConfig.__dataclass_fields__[name].default,
            built.get(name, value),
        ):
            raise ValueError(
                f"{str(folder)!r} is built data, whose documents are chosen and ordered; got {name}={value!r}. Leave"
                f" data.{name} out, or build again with it."
            )
    own = load_tokenizer(folder)
    if tokenizer is None and config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(own):
        raise ValueError(
            f"{str(folder)!r} was built with another tokenizer than {config.tokenizer or 'the one given'}."
            " Leave data.tokenizer out to take its own, or build again."
        )
    return _opened(folder, config, own)


def _opened(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> PreparedData:
    (train, train_report), (validation, validation_report) = (open_windows(folder, split) for split in SPLITS)
    return PreparedData(
        train=_dataset(train, config),
        validation=_dataset(validation, replace(config, random_length=0.0)),
        tokenizer=tokenizer,
        train_report=train_report,
        validation_report=validation_report,
    )


def _dataset(windows: Windows | TargetWindows, config: DataConfig) -> WindowDataset:
    is_trimmed = config.kind == "chat" and config.chat.batching == "grouped"
    return WindowDataset(windows=windows, is_trimmed=is_trimmed, random_length=config.random_length)


def _key(config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> str:
    is_chat = config.kind == "chat"
    return cache_key(
        format=FORMAT,
        source=fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        seq_len=config.seq_len,
        validation_fraction=config.validation_fraction,
        shuffle_seed=config.shuffle_seed,
        chat=asdict(config.chat) | {"rendered": tokenizer.chat_template} if is_chat else None,
    )


def _prepare_stream(config: DataConfig, tokenizer: Tokenizer | None) -> PreparedData:
    if tokenizer is None:
        if config.tokenizer is None:
            raise ValueError("streaming needs a tokenizer; got None. Give a folder or hub id, or do not stream.")
        tokenizer = load_tokenizer(config.tokenizer)
    if config.kind == "chat":
        tokenizer = with_chat_template(tokenizer, config.chat)
    batches = _pack(_documents(config, "validation"), config, tokenizer)
    windows, report = join_windows(batches, seq_len=config.seq_len, num_windows=config.validation_windows)
    _require_window(report, config, "validation")
    return PreparedData(
        train=StreamedWindows(config=config, tokenizer=tokenizer),
        validation=_dataset(windows, replace(config, random_length=0.0)),
        tokenizer=tokenizer,
        train_report=None,
        validation_report=report,
    )


def _prepare_pairs(config: DataConfig, tokenizer: Tokenizer) -> PreparedData:
    """Read both splits of pairs; they are few, and kept in memory."""
    read = partial(
        read_preferences,
        config.source,
        tokenizer=tokenizer,
        seq_len=config.seq_len,
        chat=config.chat,
        max_documents=config.max_documents,
    )
    fraction = config.validation_fraction
    train = read(split="train", validation_fraction=fraction)
    empty = PreferenceDataset(pairs=[], num_too_long=0)
    validation = read(split="validation", validation_fraction=fraction) if fraction else empty
    return PreparedData(
        train=train, validation=validation, tokenizer=tokenizer, train_report=train, validation_report=validation
    )


def _import_function(name: str) -> Any:
    """Import MODULE:FUNCTION. Raises ValueError where it is not there."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.kind {name} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redraft" / "data"


def _reading(config: DataConfig) -> dict[str, Any]:
    """Settings of `read_documents`."""
    return {"text_field": config.text_field, "kind": config.kind, "skip_bad": config.chat.skip_bad}


def _tokenizer(config: DataConfig, tokenizer: Tokenizer | None, fingerprint: str) -> Tokenizer:
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else _trained_tokenizer(config, fingerprint)
    return tokenizer if config.kind == "text" else with_chat_template(tokenizer, config.chat)


def _trained_tokenizer(config: DataConfig, fingerprint: str) -> Tokenizer:
    settings = {"validation_fraction": config.validation_fraction, "vocab_size": config.vocab_size}
    key = cache_key(format=FORMAT, source=fingerprint, **settings)
    build = partial(_write_tokenizer, config=config)
    return load_tokenizer(cached_folder(_cache_dir(config) / f"tokenizer-{key}", build=build))


def _write_tokenizer(folder: Path, *, config: DataConfig) -> None:
    documents = _documents(config, "train")
    if (first := next(documents, None)) is None:
        _require_window(PackingReport(), config, "train")
    documents = _with_progress(chain(filter(None, [first]), documents), "train the tokenizer")
    texts = documents if config.kind == "text" else map(plain_text, documents)
    train_tokenizer(texts, vocab_size=config.vocab_size).save_pretrained(folder)


def _write_splits(folder: Path, *, config: DataConfig, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        batches = _pack(_with_progress(_documents(config, split), f"tokenise {split}"), config, tokenizer)
        report = write_windows(folder, split, batches, seq_len=config.seq_len, vocab_size=len(tokenizer))
        _require_window(report, config, split)


def _documents(config: DataConfig, split: Split, *, number_of_pass: int = 0) -> Iterator[str]:
    """Read one split, the training documents shuffled inside a buffer: no corpus need fit into memory."""
    if split == "validation" and not config.validation_fraction:
        return
    documents = read_documents(config.source, streaming=config.streaming, **_reading(config))
    key = prompt_of if config.kind == "preference" else str
    documents = (
        document
        for document in islice(documents, config.max_documents)
        if split_of(key(document), validation_fraction=config.validation_fraction) == split
    )
    if split == "validation" or config.shuffle_seed is None:
        yield from documents
        return
    random = Random(config.shuffle_seed + number_of_pass)
    while buffer := list(islice(documents, SHUFFLE_BUFFER_DOCUMENTS)):
        random.shuffle(buffer)
        yield from buffer


def _pack(documents: Iterable[str], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Batch]:
    eos_token_id = require_eos_token(tokenizer)
    if config.kind == "text":
        encode = partial(encode_documents, tokenizer)
        return pack_stream(documents, encode=encode, seq_len=config.seq_len, eos_token_id=eos_token_id)
    return pack_conversations(
        documents,
        encode=partial(encode_conversations, tokenizer, config=config.chat, seq_len=config.seq_len),
        seq_len=config.seq_len,
        pad_token_id=eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        one_per_window=config.chat.batching == "grouped",
    )


def _require_window(report: PackingReport, config: DataConfig, split: Split) -> None:
    if report.num_windows or (split == "validation" and not config.validation_fraction):
        return
    if report.num_too_long:
        raise ValueError(
            f"all {report.num_too_long} conversations of the {split} split of {config.source!r} are longer than"
            f" seq_len={config.seq_len}. Use a larger seq_len."
        )
    raise ValueError(
        f"the {split} split of {config.source!r} has {report.num_tokens} tokens in {report.num_documents} documents;"
        f" one window needs seq_len={config.seq_len}. Use a smaller seq_len, more documents (a text file is one,"
        f" a .jsonl holds many) or another validation_fraction than {config.validation_fraction} (0 for none)."
    )


def _with_progress(documents: Iterable[str], what: str) -> Iterator[str]:
    yield from tqdm(documents, desc=what, unit=" documents", disable=None)  # None: only on a terminal
