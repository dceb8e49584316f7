"""Documents as plain strings from the standard library, files, folders, saved datasets and the hub."""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from redraft.data.files import (
    SUFFIXES,
    TEXT_SUFFIXES,
    cut_at_blank_lines,
    listed,
    read_file,
    require_field,
    require_text,
    why_not_text,
)

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
LONG_TEXT_CHARACTERS = 4096
NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SAVED_DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")
HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


def read_documents(source: str, *, text_field: str = "text", streaming: bool = False) -> Iterator[str]:
    """Read a source's documents, always in the same order. Documents without a character (or null) are skipped.

    `stdlib`: the running Python's own library without its tests. A file: .txt, .md and .py are one document each (a
    long one that is the whole source is cut at blank lines, see `cut_at_blank_lines`); .jsonl, .json (a list of
    records, or one), .csv and .parquet hold one per record in `text_field`. A folder: all such files below it sorted
    by path, without hidden ones; text that is not UTF-8 is skipped with a warning. A folder of datasets'
    `save_to_disk`, or a hub id, both with `@split` (default train), a hub id also with `:config`.
    `streaming` does not download a hub dataset first; everything else is read lazily anyway.

    Raises ValueError for what does not exist or cannot be read as text, here or at the record that is wrong.
    """
    documents: Iterator[str | None]
    if source == STDLIB:
        documents = _read_stdlib()
    elif (path := Path(source).expanduser()).exists():
        documents = _read_path(path, split=None, text_field=text_field)
    elif "@" in source and (path := Path(source.rpartition("@")[0]).expanduser()).is_dir():
        documents = _read_path(path, split=source.rpartition("@")[2], text_field=text_field)
    else:
        documents = _read_hub(source, text_field=text_field, streaming=streaming)
    return _not_empty(documents, source)


def source_fingerprint(source: str, *, text_field: str = "text", max_documents: int | None = None) -> str:
    """Return the sha256 of a source's documents and their order; where they are stored does not matter."""
    digest = hashlib.sha256()
    for document in islice(read_documents(source, text_field=text_field), max_documents):
        content = document.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _not_empty(documents: Iterable[str | None], source: str) -> Iterator[str]:
    is_empty = True
    for document in documents:
        if document:
            is_empty = False
            yield document
    if is_empty:
        raise ValueError(f"source {source!r} holds no text. Give a file with text in it, or a folder of such files.")


def _walk(folder: Path, *, pruned: set[str]) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in pruned and not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _read_stdlib() -> Iterator[str]:
    for path in _walk(Path(sysconfig.get_path("stdlib")), pruned=NOT_SOURCES):
        if path.suffix == ".py" and not why_not_text(content := path.read_bytes()):
            yield content.decode("utf-8-sig")


def _read_path(path: Path, *, split: str | None, text_field: str) -> Iterator[str | None]:
    if path.is_dir() and any((path / name).exists() for name in SAVED_DATASET_FILES):
        return _read_saved_dataset(path, split=split or "train", text_field=text_field)
    if split is not None:
        raise ValueError(f"only a dataset has splits; {str(path)!r} is a folder of files. Leave @{split} out.")
    if path.is_dir():
        return _read_folder(path, text_field=text_field)
    documents = read_file(path, text_field=text_field)
    if path.suffix not in TEXT_SUFFIXES:
        return documents
    # The text is the whole corpus: as one document it could not be split into training and validation.
    return (part for text in documents if text for part in cut_at_blank_lines(text, at_least=LONG_TEXT_CHARACTERS))


def _read_folder(folder: Path, *, text_field: str) -> Iterator[str | None]:
    files = [path for path in _walk(folder, pruned={"__pycache__"}) if path.suffix in SUFFIXES]
    if not files:
        raise ValueError(f"folder {str(folder)!r} holds no file to read. Known are {', '.join(SUFFIXES)}.")
    for path in files:
        if path.suffix in TEXT_SUFFIXES and (reason := why_not_text(path.read_bytes())):
            logger.warning("Skipped %s: it %s.", path, reason)
        else:
            yield from read_file(path, text_field=text_field)


def _read_saved_dataset(folder: Path, *, split: str, text_field: str) -> Iterator[str | None]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {str(folder)!r} is damaged ({error}). Save it again.") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{str(folder)!r} has no split {split!r}; it has {listed(split, dataset)}.")
        dataset = dataset[split]
    return _read_rows(dataset, text_field, where=str(folder))


def _read_hub(source: str, *, text_field: str, streaming: bool) -> Iterator[str | None]:
    match = HUB_ID.fullmatch(source)
    if not match or Path(source).suffix in SUFFIXES:
        raise ValueError(
            f"no file or folder {source!r}.{_similar_paths(source)} Give an existing path, {STDLIB!r} or a hub id."
        )
    import datasets

    name, config, split = match["name"], match["config"], match["split"] or "train"
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"no file or folder {source!r}, and the hub did not give it: {' '.join(str(error).split())}"
            f"{_similar_paths(source)} Give an existing path, {STDLIB!r}, or a hub id that is reachable or cached."
        ) from error
    return _read_rows(dataset, text_field, where=source)


def _read_rows(dataset: Any, text_field: str, *, where: str) -> Iterator[str | None]:
    for batch in dataset.iter(batch_size=1000):
        require_field(batch, text_field, where=where)
        for document in batch[text_field]:
            yield require_text(document, text_field, where=where)


def _similar_paths(source: str) -> str:
    parent = Path(source).expanduser().parent
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    candidates = [*siblings, STDLIB] if source == Path(source).name else siblings
    nearest = get_close_matches(Path(source).name, candidates, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
