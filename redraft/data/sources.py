"""Documents as plain strings from the standard library, files, folders, saved datasets and the hub."""

import hashlib
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from redraft.data.files import (
    SUFFIXES,
    TEXT_SUFFIXES,
    Record,
    cut_at_blank_lines,
    listed,
    one_line,
    read_records,
    read_text,
    rows_of_dataset,
    text_of,
    why_not_text,
)
from redraft.data.mixture import interleave, parse_mixture
from redraft.data.records import Kind, as_conversation, record_parser, warn_once

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
LONG_TEXT_CHARACTERS = 4096
NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BUILT = "redraft-data.json"  # what a folder of `redraft data build` was built from
SAVED_DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")
HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


Parse = Callable[[str, Any], str | None]
"""Where a record stands and the record -> its document."""


def read_documents(
    source: str,
    *,
    text_field: str = "text",
    kind: Kind = "text",
    skip_bad: bool = False,
    streaming: bool = False,
) -> Iterator[str]:
    """Read a source's documents, always in the same order. Documents without a character (or null) are skipped.

    `stdlib`: the running Python's own library without its tests. A file: .txt, .md and .py are one document each (a
    long one that is the whole source is cut at blank lines, see `cut_at_blank_lines`); .jsonl, .json (a list of
    records, or one), .csv and .parquet hold one per record in `text_field`. A folder: all such files below it sorted
    by path, without hidden ones; text that is not UTF-8 is skipped with a warning. A folder of datasets'
    `save_to_disk`, or a hub id, both with `@split` (default train), a hub id also with `:config`. A mixture of such
    sources: `SOURCE:WEIGHT,SOURCE:WEIGHT` (`data.mixture`).
    `kind="chat"` and `"preference"` read records as conversations and pairs; a document is their JSON (`data.records`);
    `skip_bad` skips malformed ones. In a mixture of conversations `stdlib`, text files and folders of such alone may
    take part, as plain text.
    `streaming` does not download a hub dataset first; everything else is read lazily anyway.

    Raises ValueError for what does not exist or cannot be read as text, here or at the record that is wrong.
    """
    if not exists(Path(source).expanduser()) and (parts := parse_mixture(source)):
        for part in parts:
            if exists(Path(part.source).expanduser() / BUILT):
                raise ValueError(
                    f"built data cannot be mixed; got {part.source!r}. Build the mixture, or mix the sources."
                )
        read = partial(read_documents, text_field=text_field, kind=kind, skip_bad=skip_bad, streaming=streaming)
        is_plain = [kind == "chat" and _is_plain_text(part.source) for part in parts]
        streams = [
            map(as_conversation, read_documents(part.source)) if plain and not all(is_plain) else read(part.source)
            for part, plain in zip(parts, is_plain, strict=True)
        ]
        return interleave([(islice(own, part.limit), part.weight) for own, part in zip(streams, parts, strict=True)])
    unused = Counter[str]()
    if source == STDLIB and kind == "text":
        return _not_empty(_read_stdlib(), source, kind, unused)
    field = text_field if kind == "text" else None
    parse = _text_parser(text_field) if kind == "text" else record_parser(kind, skip_bad=skip_bad, unused=unused)
    return _not_empty(_read_source(source, field=field, parse=parse, streaming=streaming), source, kind, unused)


def _is_plain_text(source: str) -> bool:
    path = Path(source).expanduser()
    if source == STDLIB or not exists(path) or not path.is_dir():
        return source == STDLIB or path.suffix in TEXT_SUFFIXES
    suffixes = {file.suffix for file in _walk(path)} & {*SUFFIXES}
    return bool(suffixes) and suffixes <= TEXT_SUFFIXES


def _read_source(source: str, *, field: str | None, parse: Parse, streaming: bool) -> Iterator[str | None]:
    if exists(path := Path(source).expanduser()):
        return _read_path(path, split=None, field=field, parse=parse)
    if "@" in source and (path := Path(source.rpartition("@")[0]).expanduser()).is_dir():
        return _read_path(path, split=source.rpartition("@")[2], field=field, parse=parse)
    return _read_hub(source, field=field, parse=parse, streaming=streaming)


def _text_parser(text_field: str) -> Parse:
    return lambda where, record: text_of(record, text_field, where=where)


def exists(path: Path) -> bool:
    """Say whether there is such a path; one too long to be any is none."""
    try:
        return path.exists()
    except OSError:
        return False


def source_fingerprint(source: str, *, max_documents: int | None = None, **settings: Any) -> str:
    """Return the sha256 of a source's documents and their order; where they are stored does not matter.

    `settings` are those of `read_documents`.
    """
    digest = hashlib.sha256()
    for document in islice(read_documents(source, **settings), max_documents):
        content = document.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _not_empty(documents: Iterable[str | None], source: str, kind: Kind, unused: Mapping[str, int]) -> Iterator[str]:
    """Raise ValueError where there is no document. At the end, or where reading stops, tell the fields not used."""
    is_empty = True
    try:
        for document in documents:
            if document:
                is_empty = False
                yield document
    finally:
        if unused:
            counts = ", ".join(f"{name} ({unused[name]:,})" for name in sorted(unused))
            warn_once(f"Fields of {source} that are not used, and how often they occur: {counts}.")
    if is_empty:
        wanted = {"text": "text", "chat": "conversation with an answer", "preference": "pair of answers"}[kind]
        raise ValueError(f"source {source!r} holds no {wanted}. Give a file with {wanted} in it, or a folder of such.")


def _walk(folder: Path, *, pruned: Collection[str] = ("__pycache__",)) -> list[Path]:
    """List the files below a folder, sorted by path, without hidden ones; folders that are not read are told."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_tell_unread):
        folders[:] = [name for name in folders if name not in pruned and not name.startswith(".")]
        for link in (path for name in folders if (path := Path(parent, name)).is_symlink()):
            warn_once(f"Skipped {link}: it is a link to a folder. Make that folder a source of its own.")
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files, key=Path.as_posix)


def _tell_unread(error: OSError) -> None:
    warn_once(f"Skipped {error.filename}: it cannot be read ({error.strerror}).")


def _read_stdlib() -> Iterator[str]:
    for path in _walk(Path(sysconfig.get_path("stdlib")), pruned=NOT_SOURCES):
        if path.suffix == ".py" and not why_not_text(content := path.read_bytes()):
            yield content.decode("utf-8-sig")


def _read_path(path: Path, *, split: str | None, field: str | None, parse: Parse) -> Iterator[str | None]:
    if path.is_dir() and any((path / name).exists() for name in SAVED_DATASET_FILES):
        rows = rows_of_dataset(_load_saved(path, split=split or "train"), where=str(path), field=field)
        return _parsed(rows, parse)
    if split is not None:
        raise ValueError(f"only a dataset has splits; {str(path)!r} is a folder of files. Leave @{split} out.")
    if path.is_dir():
        return _read_folder(path, field=field, parse=parse)
    if reason := _why_unread(path):
        raise ValueError(f"{str(path)!r} is no source: {reason}. Give a file or a folder.")
    if field is None or path.suffix not in TEXT_SUFFIXES:
        return _parsed(read_records(path, field=field), parse)
    # The text is the whole corpus: as one document it could not be split into training and validation.
    return cut_at_blank_lines(read_text(path), at_least=LONG_TEXT_CHARACTERS)


def _parsed(records: Iterable[Record], parse: Parse) -> Iterator[str | None]:
    return (parse(where, record) for where, record in records)


def _read_folder(folder: Path, *, field: str | None, parse: Parse) -> Iterator[str | None]:
    suffixes = [suffix for suffix in SUFFIXES if field is not None or suffix not in TEXT_SUFFIXES]
    files = [path for path in _walk(folder) if path.suffix in suffixes]
    if not files:
        raise ValueError(f"folder {str(folder)!r} holds no file to read. Known are {', '.join(suffixes)}.")
    for path in files:
        if reason := _why_unread(path):
            warn_once(f"Skipped {path}: {reason}.")
        elif path.suffix not in TEXT_SUFFIXES:
            yield from _parsed(read_records(path, field=field), parse)
        elif reason := why_not_text(content := path.read_bytes()):
            warn_once(f"Skipped {path}: it {reason}.")
        else:
            yield content.decode("utf-8-sig")


def _why_unread(path: Path) -> str | None:
    """Say why a path cannot be read as a file: opening a pipe would wait for a writer. None where it can."""
    try:
        if not path.is_file():
            return "it is no regular file" if path.exists() else "it is a link to nothing"
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def _load_saved(folder: Path, *, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        if split in parts:  # a wrong offset in a mapped file would end the process
            parts[split].data.table.validate(full=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"dataset {str(folder)!r} is damaged ({one_line(error)}). Save it again.") from error
    if split not in parts:
        raise ValueError(f"{str(folder)!r} has no split {split!r}; it has {listed(split, parts)}.")
    return parts[split]


def _read_hub(source: str, *, field: str | None, parse: Parse, streaming: bool) -> Iterator[str | None]:
    if source == STDLIB:
        raise ValueError(
            f"{STDLIB!r} holds documents, not records. Use data.kind text, or mix it with a source of records."
        )
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
            f"no file or folder {source!r}, and the hub did not give it: {' '.join(str(error).split()).rstrip('.')}."
            f"{_similar_paths(source)} Give an existing path, {STDLIB!r}, or a hub id that is reachable or cached."
        ) from error
    return _parsed(rows_of_dataset(dataset, where=source, field=field), parse)


def _similar_paths(source: str) -> str:
    parent = Path(source).expanduser().parent
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    candidates = [*siblings, STDLIB] if source == Path(source).name else siblings
    nearest = get_close_matches(Path(source).name, candidates, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
