"""Documents of one file, and what is wrong with it where it cannot be read."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = {".txt", ".md", ".py"}
SUFFIXES = [*sorted(TEXT_SUFFIXES), ".jsonl", ".json", ".csv", ".parquet"]


Record = tuple[str, Any]
"""A record and where it stands."""


def read_text(path: Path) -> str:
    """Read a text file; ValueError where it is no UTF-8 text."""
    return _decode(path.read_bytes(), where=str(path))


def read_records(path: Path, *, field: str | None = None) -> Iterator[Record]:
    """Read a table or a list of records; of a table only the column `field`, if it is given."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix in TEXT_SUFFIXES:
        raise ValueError(f"{str(path)!r} is text, which holds no records. Give one of {', '.join(readers)}.")
    if path.suffix not in readers:
        raise ValueError(f"{str(path)!r} is of no known kind ({path.suffix!r}). Known are {', '.join(SUFFIXES)}.")
    return readers[path.suffix](path, field)


def cut_at_blank_lines(document: str, *, at_least: int) -> Iterator[str]:
    """Cut a long text at blank lines into parts of at least so many characters; joined they are the text again."""
    start = 0
    for run in re.finditer(r"\s{2,}", document):  # linear in long runs too
        for newline in re.finditer(r"\n", run[0][: max(run[0].rfind("\n"), 0)]):
            if (border := run.start() + newline.end()) - start >= at_least:
                yield document[start:border]
                start = border
    if start < len(document):
        yield document[start:]


def _read_jsonl(path: Path, _: str | None) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _parse_json(_decode(line, where=where), where=where)


def _read_json(path: Path, _: str | None) -> Iterator[Record]:
    content = _decode(path.read_bytes(), where=str(path))
    records = _parse_json(content, where=str(path)) if content.strip() else []
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        yield f"{path}, record {number}", record


def _read_csv(path: Path, field: str | None) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default is less than a document
    content = _decode(path.read_bytes(), where=str(path))
    reader = csv.reader(StringIO(content, newline=""), strict=True)
    header: list[str] = []
    begin = 1
    try:
        for row in reader:
            where, begin = f"{path}, line {begin}", reader.line_num + 1
            if len(row) < 2 and not "".join(row).strip():  # an empty line
                continue
            if not header:
                header = _header(row, field, where=where)
            elif len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} fields, but the header has {len(header)} ({', '.join(header)[:60]})."
                    " Put quotes around fields that hold commas, line ends or quotes."
                )
            else:
                values = dict(zip(header, row, strict=True))
                yield where, {field: values[field]} if field else values
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: not a CSV table ({error}). Quote such fields.") from error


def _header(row: list[str], field: str | None, *, where: str) -> list[str]:
    if twice := [name for name, count in Counter(row).items() if count > 1 and name]:
        raise ValueError(f"{where}: the header has {twice[0]!r} twice. Rename one of them.")
    if field is not None:
        require_field(row, field, where=where)
    return row


def _read_parquet(path: Path, field: str | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        if field is not None:
            require_field(table.schema_arrow.names, field, where=str(path))
        number = 0
        for batch in table.iter_batches(columns=[field] if field else None):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet file, or damaged ({one_line(error)}). Write it again.") from error


def rows_of_dataset(dataset: Any, *, where: str, field: str | None) -> Iterator[Record]:
    """Read the rows of a `datasets` dataset, in memory or streamed; only `field`, if it is given."""
    import pyarrow

    number = 0
    try:
        for batch in dataset.iter(batch_size=1000):
            if field is not None:
                require_field(batch, field, where=where)
            columns = {field: batch[field]} if field is not None else dict(batch)
            for row in zip(*columns.values(), strict=True):
                number += 1
                yield f"{where}, row {number}", dict(zip(columns, row, strict=True))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: nothing can be read after row {number} ({one_line(error)}). Save it again."
        ) from error


def why_not_text(content: bytes) -> str | None:
    """Say why bytes are not UTF-8 text; None where they are."""
    if b"\0" in content:
        return "holds NUL bytes"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start})"
    return None


def _decode(content: bytes, *, where: str) -> str:
    if reason := why_not_text(content):
        raise ValueError(f"{where} {reason}: not a text file. Convert it to UTF-8 text.")
    return content.decode("utf-8-sig")  # newlines stay as they are, a byte-order mark is no text


def _parse_json(content: str, *, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = where if content.count("\n") <= 1 else f"{where}, line {error.lineno}"
        raise ValueError(f"{place}: not JSON ({error.msg}, column {error.colno}). Mend or remove it.") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        raise ValueError(f"{where}: JSON that cannot be read ({one_line(error)}). Mend or remove it.") from error


def one_line(error: BaseException) -> str:
    """Return an error's message in one short line."""
    return " ".join(str(error).split())[:200].rstrip(".")


def text_of(record: Any, text_field: str, *, where: str) -> str | None:
    """Take the document (or null) out of a record; ValueError where there is none."""
    if not isinstance(record, Mapping):
        raise ValueError(f'{where}: a record must be {{"{text_field}": "..."}}; got {type(record).__name__}. Wrap it.')
    require_field(record, text_field, where=where)
    return require_text(record[text_field], text_field, where=where)


def require_field(fields: Iterable[str], text_field: str, *, where: str) -> None:
    """Raise ValueError with the fields that there are."""
    if text_field not in fields:
        names = set(fields)
        is_chat = not names.isdisjoint(("messages", "conversations", "prompt", "instruction"))
        remedy = "Use --data.kind chat (or preference) for conversations" if is_chat else "Set --data.text-field"
        raise ValueError(f"{where}: no field {text_field!r}; it has {listed(text_field, names)}. {remedy}.")


def require_text(document: Any, text_field: str, *, where: str) -> str | None:
    """Return the document (or null); ValueError where it is no text."""
    if document is not None and not isinstance(document, str):
        got = type(document).__name__
        raise ValueError(f"{where}: field {text_field!r} must be a string; got {got}. Set --data.text-field.")
    if document and not document.isascii() and re.search("[\ud800-\udfff]", document):
        raise ValueError(f"{where}: field {text_field!r} holds a lone surrogate, which is no character. Remove it.")
    return document


def listed(name: str, names: Iterable[str]) -> str:
    """List the valid names and the one nearest to `name`."""
    names = sorted(map(str, names))
    nearest = get_close_matches(name, names, n=1)
    return ", ".join(names) + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
