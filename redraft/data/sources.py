"""Read documents as strings from the standard library, files, folders, saved datasets, the hub, and mixtures."""

import hashlib
import heapq
import logging
import math
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from redraft.data.files import (
    TEXT_SUFFIXES,
    RecordAt,
    at_place,
    cut_at_blank_lines,
    field_text,
    known_suffixes,
    numbered_rows,
    one_line,
    read_file,
)
from redraft.data.installed import installed_packages, package_documents
from redraft.data.records import as_conversation, record_parser
from redraft.errors import unknown_name

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]

STDLIB, SITE_PACKAGES = "stdlib", "site-packages"
LONG_TEXT_CHARACTERS = 4096
CODE = (STDLIB, SITE_PACKAGES)
"""Sources that are parts of the running Python, whatever files have their names."""
NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BUILT = "redraft-data.json"  # the settings of a folder of `redraft data build`
SAVED_DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")
HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")
WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>[0-9.]+(e[+-]?[0-9]+)?)(/(?P<limit>[1-9][0-9]*))?")


class WeightedSource(NamedTuple):
    """One source of a mixture; `limit` is the number of its first documents that are used, or None for all."""

    source: str
    weight: float
    limit: int | None


def read_documents(
    source: str, *, text_field: str = "text", kind: str = "text", streaming: bool = False
) -> Iterator[str]:
    """Read a source's documents, always in the same order. Documents without a character (or null) are skipped.

    `stdlib`: the running Python's own library without its tests. `site-packages`: the sources of installed packages
    under permissive licences (`data.installed`). A file: .txt, .md and .py are one document each (a
    long one that is the whole source is cut at blank lines, see `cut_at_blank_lines`); .jsonl, .json (a list of
    records, or one), .csv and .parquet hold one per record in `text_field`. A folder: all such files below it sorted
    by path, without hidden ones; text that is not UTF-8 is skipped with a warning. A folder of datasets'
    `save_to_disk`, or a hub id, both with `@split` (default train), a hub id also with `:config`. A mixture of such
    sources: `SOURCE:WEIGHT,SOURCE:WEIGHT` (`parse_mixture`, `interleave`).
    `kind="chat"` and `"preference"` read records as conversations and pairs; a document is their JSON (`data.records`).
    A mixture of conversations may also hold these two, text files and folders of text files, as plain text.
    `streaming` does not download a hub dataset first; everything else is read lazily anyway.

    Raises ValueError for a source that does not exist or is not text, at once or at the wrong record.
    """
    if not path_exists(source) and (parts := parse_mixture(source)):
        yield from _read_mixture(parts, text_field=text_field, kind=kind, streaming=streaming)
        return
    unused, is_empty, is_text = Counter[str](), True, kind == "text"
    parse = partial(field_text, field=text_field) if is_text else record_parser(kind, unused)
    try:
        for where, record in _read_source(source, field=text_field if is_text else None, streaming=streaming):
            with at_place(where):
                document = parse(record)
            if document:
                is_empty = False
                yield document
    finally:  # also where reading stops early
        if unused:
            counts = ", ".join(f"{name} ({unused[name]:,})" for name in sorted(unused))
            warn_once(f"Fields of {source} that are not used, and how often they occur: {counts}.")
    if is_empty and source == SITE_PACKAGES:
        raise ValueError(f"no installed package under a permissive licence has sources. {SITE_PACKAGES!r} needs some.")
    if is_empty:
        wanted = {"text": "text", "chat": "conversation with an answer", "preference": "pair of answers"}[kind]
        raise ValueError(f"source {source!r} holds no {wanted}. Give a file with {wanted} in it, or a folder of such.")


def _read_mixture(parts: Sequence[WeightedSource], *, kind: str, **settings: Any) -> Iterator[str]:
    is_plain = [kind == "chat" and _is_plain_text(part.source) for part in parts]
    streams = []
    for part, plain in zip(parts, is_plain, strict=True):
        if path_exists(f"{part.source}/{BUILT}"):
            raise ValueError(f"built data cannot be mixed; got {part.source!r}. Mix the sources and build that.")
        if plain and not all(is_plain):
            documents: Iterator[str] = map(as_conversation, read_documents(part.source))
        else:
            documents = read_documents(part.source, kind=kind, **settings)
        streams.append((islice(documents, part.limit), part.weight))
    return interleave(streams)


def documents_fingerprint(documents: Iterable[str]) -> str:
    """Return the sha256 of documents and their order; where they are stored does not matter."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def split_of(document: str, *, validation_fraction: float, seed: int = 0) -> Split:
    """Choose a document's split by the hash of its text alone.

    P(validation) = validation_fraction over documents, not over tokens. Exact duplicates have the same split, and a
    document keeps its split when the corpus is re-ordered or grows. A larger fraction only adds to validation.
    """
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


def parse_mixture(source: str) -> list[WeightedSource] | None:
    """Read `SOURCE:WEIGHT[/LIMIT],...`; None for a text without a comma, which is one source.

    The weight is what follows a part's last colon, so a hub id keeps its own: `owner/name:config@train:0.3`.
    """
    if "," not in source:
        return None
    parts = []
    for text in map(str.strip, source.split(",")):
        match = WEIGHTED.fullmatch(text)
        try:
            weight = float(match["weight"]) if match else 0.0
        except ValueError:
            weight = 0.0
        if match is None or not 0 < weight < math.inf:
            raise ValueError(
                f"a mixture must be SOURCE:WEIGHT,SOURCE:WEIGHT with positive weights, and /LIMIT after a weight for"
                f" the first LIMIT documents only; got {text!r} in {source!r}."
            )
        parts.append(WeightedSource(match["source"], weight, int(match["limit"]) if match["limit"] else None))
    return parts


def interleave(streams: Sequence[tuple[Iterator[str], float]]) -> Iterator[str]:
    """Take documents in turns so that each stream's share of the text (UTF-8 bytes) follows its weight.

    The next document comes from the stream with the smallest bytes / weight so far. This is deterministic, and any
    beginning of the mixture has the right shares, to within one document. The mixture ends with the first stream that
    ends, so that no document is repeated and the shares stay right.
    """
    queue = [(0.0, index) for index in range(len(streams))]
    while True:
        taken, index = heapq.heappop(queue)
        documents, weight = streams[index]
        if (document := next(documents, None)) is None:
            return
        heapq.heappush(queue, (taken + len(document.encode()) / weight, index))
        yield document


@cache
def warn_once(message: str) -> None:
    """Log a warning once, although the same data are read several times."""
    logger.warning("%s", message)


def path_exists(source: str) -> bool:
    """Say whether a source is a path that exists; a text too long for a path is none."""
    return os.path.exists(os.path.expanduser(source))  # noqa: PTH110, PTH111 (Path.exists raises for a long one)


def _is_plain_text(source: str) -> bool:
    path = Path(source).expanduser()
    if source in CODE or not path_exists(source) or not path.is_dir():
        return source in CODE or path.suffix in TEXT_SUFFIXES
    suffixes = {file.suffix for file in _walk(path)} & {*known_suffixes("text")}
    return bool(suffixes) and suffixes <= {*TEXT_SUFFIXES}


def _read_source(source: str, *, field: str | None, streaming: bool) -> Iterator[RecordAt]:
    """Find out what a source is, and read its records; of datasets and parquet only `field`, if it is given."""
    path, split = Path(source).expanduser(), ""
    if source in CODE and field is None:
        raise ValueError(
            f"{source!r} holds documents, not records. Use data.kind text, or mix it with a source of records."
        )
    if source == SITE_PACKAGES:
        documents = package_documents(installed_packages())
        return ((str(path), {field: text}) for _, path, text in documents)
    if source == STDLIB:
        stdlib = _walk(Path(sysconfig.get_path("stdlib")), pruned=NOT_SOURCES)
        return _read_files([path for path in stdlib if path.suffix == ".py"], field=field)
    if not path_exists(source):
        folder, _, split = source.rpartition("@")
        path = Path(folder).expanduser()
        if not folder or not path.is_dir():
            return _read_hub(source, field=field, streaming=streaming)
    if path.is_dir() and any((path / name).exists() for name in SAVED_DATASET_FILES):
        return _rows_of(_load_saved(path, split=split or "train"), where=str(path), field=field)
    if split:
        raise ValueError(f"only a dataset has splits; {str(path)!r} is a folder of files. Leave @{split} out.")
    if path.is_dir():
        suffixes = known_suffixes(field)
        if files := [file for file in _walk(path) if file.suffix in suffixes]:
            return _read_files(files, field=field)
        raise ValueError(f"folder {str(path)!r} holds no file that can be read: {', '.join(suffixes)}.")
    records = read_file(path, field=field)
    if path.suffix not in TEXT_SUFFIXES:
        return records
    # The text is the whole corpus: as one document it could not be split into training and validation.
    [(where, record)] = records
    return ((where, {field: part}) for part in cut_at_blank_lines(record[field], min_characters=LONG_TEXT_CHARACTERS))


def _walk(folder: Path, *, pruned: Collection[str] = ("__pycache__",)) -> list[Path]:
    """List the files below a folder, sorted by path, without hidden ones; warn of folders that are not read."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_warn_of_folder):
        folders[:] = [name for name in folders if name not in pruned and not name.startswith(".")]
        for link in (path for name in folders if (path := Path(parent, name)).is_symlink()):
            warn_once(f"Skipped {link}: it is a link to a folder. Give that folder as a source of its own.")
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files, key=Path.as_posix)


def _warn_of_folder(error: OSError) -> None:
    warn_once(f"Skipped {error.filename}: it cannot be read ({error.strerror}).")


def _read_files(files: Iterable[Path], *, field: str | None) -> Iterator[RecordAt]:
    for path in files:
        try:
            records = read_file(path, field=field)
        except ValueError as error:
            warn_once(f"Skipped a file: {error}")
        else:
            yield from records


def _rows_of(dataset: Any, *, where: str, field: str | None) -> Iterator[RecordAt]:
    if field in (dataset.column_names or ()):  # a stream may not know its columns
        dataset = dataset.select_columns([field])
    return numbered_rows(dataset, where=where)


def _load_saved(folder: Path, *, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        if split in splits:  # else a wrong offset in a mapped file would crash the process
            splits[split].data.table.validate(full=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"dataset {str(folder)!r} is damaged ({one_line(error)}). Save it again.") from error
    if split not in splits:
        raise unknown_name(f"split of {str(folder)!r}", split, splits)
    return splits[split]


def _read_hub(source: str, *, field: str | None, streaming: bool) -> Iterator[RecordAt]:
    match = HUB_ID.fullmatch(source)
    remedy = f"{_similar_paths(source)} Give an existing path, {STDLIB!r}, {SITE_PACKAGES!r} or a hub id"
    if match is None or Path(source).suffix in known_suffixes("text"):
        raise ValueError(f"no file or folder {source!r}.{remedy}.")
    import datasets

    try:
        dataset = datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train", streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"no file or folder {source!r}, and the hub did not give it: {one_line(error)}."
            f"{remedy} that is reachable or cached."
        ) from error
    return _rows_of(dataset, where=source, field=field)


def _similar_paths(source: str) -> str:
    parent = Path(source).expanduser().parent
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    candidates = [*siblings, *CODE] if source == Path(source).name else siblings
    nearest = get_close_matches(Path(source).name, candidates, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
