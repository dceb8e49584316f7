"""Read documents and records of one file or dataset, with errors that name the place."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from redraft.errors import unknown_name

TEXT_SUFFIXES = (".md", ".py", ".txt")

RecordAt = tuple[str, Any]
"""The place of a record, for errors, and the record. A text file is one record with one field."""


@contextmanager
def at_place(where: str) -> Iterator[None]:
    """Put the place of the record before the message of every ValueError."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{where}: a record nested too deeply. Edit or remove it.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def known_suffixes(field: str | None) -> tuple[str, ...]:
    """List the files that can be read: those of records, and text where a `field` for it is given."""
    return (*READERS,) if field is None else (*TEXT_SUFFIXES, *READERS)


def read_file(path: Path, *, field: str | None) -> Iterator[RecordAt]:
    """Read a file's records; a text file is one record, with its text in `field` (None: records only).

    Raises ValueError at once for a file that cannot be read as what its name says, and later for a damaged record.
    """
    suffixes = known_suffixes(field)
    if path.suffix not in suffixes:
        what = "records" if field is None else "documents"
        raise ValueError(f"{str(path)!r} holds no {what}. Give a folder, or a file of {', '.join(suffixes)}.")
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError(f"{path} is not a regular file, or a broken link. Leave it out.")
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). Leave it out.") from error
    if path.suffix in TEXT_SUFFIXES:
        return iter([(str(path), {field: read_text(path)})])
    return READERS[path.suffix](path)


def read_text(path: Path) -> str:
    """Read a text file. Raises ValueError where it is not UTF-8 text."""
    return _decode(path.read_bytes(), where=str(path))


def cut_at_blank_lines(document: str, *, min_characters: int) -> Iterator[str]:
    """Cut a long text at blank lines into parts of at least so many characters, without losing a character."""
    start = 0
    for run in re.finditer(r"\s{2,}", document):  # this takes linear time in long runs too
        for newline in re.finditer(r"\n", run[0][: max(run[0].rfind("\n"), 0)]):
            if (border := run.start() + newline.end()) - start >= min_characters:
                yield document[start:border]
                start = border
    if start < len(document):
        yield document[start:]


def _read_jsonl(path: Path) -> Iterator[RecordAt]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _parse_json(_decode(line, where=where), where=where)


def _read_json(path: Path) -> Iterator[RecordAt]:
    content = read_text(path)
    records = _parse_json(content, where=str(path)) if content.strip() else []
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        yield f"{path}, record {number}", record


def _read_csv(path: Path) -> Iterator[RecordAt]:
    csv.field_size_limit(2**31 - 1)  # the default is less than a document
    reader = csv.reader(StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    next_line = 1
    try:
        for row in reader:
            where, next_line = f"{path}, line {next_line}", reader.line_num + 1
            if len(row) < 2 and not "".join(row).strip():  # an empty line
                continue
            if header and len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} fields, but the header has {len(header)} ({', '.join(header)[:60]})."
                    " Put quotes around fields that hold commas, line ends or quotes."
                )
            if header:
                yield where, dict(zip(header, row, strict=True))
            elif doubled := [name for name in row if name and row.count(name) > 1]:
                raise ValueError(f"{where}: the header has {doubled[0]!r} twice. Rename one of them.")
            header = header or row
    except csv.Error as error:
        raise ValueError(f"{path}, line {next_line}: not a CSV table ({error}). Quote such fields.") from error


def _read_parquet(path: Path) -> Iterator[RecordAt]:
    import pyarrow.parquet

    def rows() -> Iterator[Any]:
        for batch in pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).iter_batches():
            yield from batch.to_pylist()

    return numbered_rows(rows(), where=str(path))


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
"""Files of records, by the end of their name."""


def numbered_rows(rows: Iterable[Any], *, where: str) -> Iterator[RecordAt]:
    """Number the rows of a parquet file or a dataset. Raises ValueError for a row that cannot be read."""
    import pyarrow

    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{where}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: damaged, or in another format, after row {number} ({one_line(error)}). Write it again."
        ) from error


def _decode(content: bytes, *, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")  # newlines stay as they are, a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}). Convert it to UTF-8 text.") from error
    if "\0" in text:
        raise ValueError(f"{where} holds NUL bytes, so it is not text. Convert it to UTF-8 text.")
    return text


def _parse_json(content: str, *, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = where if content.count("\n") <= 1 else f"{where}, line {error.lineno}"
        raise ValueError(f"{place}: not JSON ({error.msg}, column {error.colno}). Edit or remove it.") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        raise ValueError(f"{where}: JSON that cannot be read ({one_line(error)}). Edit or remove it.") from error


def one_line(error: BaseException) -> str:
    """Return an error's message in one short line."""
    return " ".join(str(error).split())[:200].rstrip(".")


def field_text(record: Any, *, field: str) -> str | None:
    """Return the document (or null) of a record. Raises ValueError where the record has no such field."""
    if not isinstance(record, Mapping):
        raise ValueError(f'a record must be {{"{field}": "..."}}; got {type(record).__name__}. Edit the file.')
    if field not in record:
        is_chat = not record.keys().isdisjoint(("messages", "conversations", "prompt", "instruction"))
        remedy = "Use --data.kind chat (or preference) for conversations" if is_chat else "Set --data.text-field"
        raise ValueError(f"{unknown_name('field', field, map(str, record))} {remedy}.")
    return None if record[field] is None else require_text(record[field], field)


def require_text(value: Any, field: str) -> str:
    """Return the text of a field. Raises ValueError where it is not a string."""
    if not isinstance(value, str):
        got = type(value).__name__
        raise ValueError(f"field {field!r} must be a string; got {got}. Edit the record, or name another field.")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"field {field!r} holds a lone surrogate, which is not a character. Remove it.")
    return value
