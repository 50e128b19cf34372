"""Reading the rows of one file, by kind: JSON lines, a JSON list, csv, parquet, arrow, plain text.

A line that is not a row is a `BadRow`, counted by the caller; a file that cannot be read any further is a `UserError`
that names the line reached.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, AnyStr

from sora_llm.errors import UserError


class BadRow(Exception):
    """A row that cannot be trained on; the message is the reason."""


Row = dict[str, Any]
RowOrBad = Row | BadRow
Placed = Iterator[tuple[str, Callable[[], RowOrBad]]]
"""Where each row is (":line", from 1, or "#index", from 0) and what makes it: skipped rows are not made."""

_MAX_DEPTH = 100
TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"


def type_in_words(value: Any) -> str:
    """The type of a value, in JSON terms."""
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def as_row(value: Any) -> RowOrBad:
    """The value if it is a row, else a `BadRow`."""
    if not isinstance(value, dict):
        return BadRow(f"the row is {type_in_words(value)}, not an object with keys")
    return BadRow(TOO_DEEP) if nested_too_deeply(value) else value


def as_table_row(value: Any) -> RowOrBad:
    """A row of a table with typed columns, without the nulls that fill in an object's missing keys.  (The row's own
    keys are the columns, which stay.)"""
    return as_row({key: _without_nulls(item) for key, item in value.items()} if isinstance(value, dict) else value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def nested_too_deeply(value: Any) -> bool:
    """Whether lists and objects are nested so deeply that sending a row to another process or writing it in a template
    could fail: both recurse, as reading JSON does."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ())
        ]
        if not level:
            return False
    return True


# ----- bytes and lines ------------------------------------------------------------------------------------------------


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the file system's errors on reading a file into `UserError`s."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"data set {file} does not exist") from None
    except OSError as error:
        raise UserError(f"data set {file} cannot be read: {error}") from None


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _open_text(file: Path) -> IO[str]:
    """Text without the byte order mark that spreadsheets write, with line ends unchanged (csv needs them).  Bytes that
    are not UTF-8 become surrogates, so that they spoil one row (`_not_utf8`) and not the file."""
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _not_utf8(text: str, first_line: int) -> BadRow | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line, byte = first_line + text.count("\n", 0, error.start), ord(text[error.start]) - 0xDC00
        return BadRow(f"line {line} is not UTF-8 text: it holds byte {byte:#04x}")
    return None


def _numbered(file: Path, stream: Iterable[AnyStr]) -> Iterator[tuple[int, AnyStr]]:
    """Lines and their numbers; a `UserError` with the number reached if a compressed file or a disk is damaged."""
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data set {file}:{number + 1} cannot be read: {error}") from None


# ----- json -----------------------------------------------------------------------------------------------------------


def _read_json_lines(file: Path) -> Placed:
    with _open(file) as stream:
        yield from _json_lines(_numbered(file, stream))


def _json_lines(numbered: Iterable[tuple[int, bytes]]) -> Placed:
    for number, line in numbered:
        if line.strip():
            yield f":{number}", partial(_json_row, line)


def _json_row(line: bytes) -> RowOrBad:
    try:
        return as_row(json.loads(line))
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 text: it holds byte {error.object[error.start]:#04x}")
    except ValueError as error:  # a number with thousands of digits
        return BadRow(f"not valid JSON: {error}")
    except RecursionError:
        return BadRow(TOO_DEEP)


def _read_json(file: Path) -> Placed:
    """A list of rows, {"data": [rows]}, or JSON lines under the wrong name."""
    with _open(file) as stream:
        content = b"".join(line for _, line in _numbered(file, stream))
    if _holds_json_lines(content):
        yield from _json_lines(enumerate(content.splitlines(), start=1))
        return
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"data set {file}:{error.lineno} is not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(f"data set {file}:{line} is not UTF-8 text: it holds byte {byte:#04x}") from None
    except ValueError as error:
        raise UserError(f"data set {file} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"data set {file} is {TOO_DEEP}") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(
            f'data set {file} holds neither a list of rows, nor {{"data": [rows]}}, nor one JSON object per line'
        )
    for index, row in enumerate(rows):
        yield f"#{index}", partial(as_row, row)


def _holds_json_lines(content: bytes) -> bool:
    lines = content.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and (b"".join(lines[1:]).strip() != b"" or not isinstance(first.get("data"), list))


# ----- csv, parquet, arrow, plain text --------------------------------------------------------------------------------


def _read_csv(file: Path) -> Placed:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long conversation
    with _open_text(file) as stream:
        records = _csv_records(file, stream)
        line, header = next(records, (1, []))
        if isinstance(header, BadRow):
            raise UserError(f"data set {file}:{line} is not a csv header: {header}")
        if repeated := [name for name in header if header.count(name) > 1]:
            raise UserError(f"data set {file}:{line} names the column {repeated[0]!r} twice; rename one of them")
        for line, fields in records:
            yield f":{line}", partial(_csv_row, header, fields)


def _csv_records(file: Path, stream: IO[str]) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The fields of each record, and the line on which it begins."""
    # strict: without it a quote that is never closed silently swallows the rest of the file.
    reader = csv.reader((line for _, line in _numbered(file, stream)), strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if reader.line_num > first_line:
                raise UserError(
                    f"data set {file}:{first_line} is not valid csv: a quote in this row is unterminated or closed "
                    f"incorrectly, so the row continues to line {reader.line_num} ({error})"
                ) from None
            yield first_line, BadRow(f"not valid csv: {error}")
            continue
        if fields is None:
            return
        if fields:  # a blank line has none
            yield first_line, _not_utf8(",".join(fields), first_line) or fields


def _csv_row(header: list[str], fields: list[str] | BadRow) -> RowOrBad:
    if isinstance(fields, BadRow):
        return fields
    if len(fields) != len(header):
        return BadRow(f"the row has {'more' if len(fields) > len(header) else 'fewer'} fields than the header")
    return dict(zip(header, map(_unix_lines, fields), strict=True))


def _read_parquet(file: Path) -> Placed:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1024)

    return _rows_of(batches(), file, "parquet")


def _read_arrow(file: Path) -> Placed:
    """Arrow files: `datasets` writes the stream format (save_to_disk, its cache), others write the file format."""
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                yield from (table.get_batch(number) for number in range(table.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    return _rows_of(batches(), file, "arrow")


def _rows_of(batches: Iterator[Any], file: Path, kind: str) -> Placed:
    import pyarrow

    index = 0
    try:
        for batch in batches:
            for i in range(batch.num_rows):
                yield f"#{index}", partial(_row_of_batch, batch, i)
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data set {file} is not a readable {kind} file from row #{index} on: {error}") from None


def _row_of_batch(batch: Any, i: int) -> RowOrBad:
    try:
        return as_table_row(batch.slice(i, 1).to_pylist()[0])
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, times beyond Python's
        return BadRow(f"the row cannot be read: {error}")


def _read_text(file: Path) -> Placed:
    """Plain text: one row per paragraph, a block of lines between blank lines.  (One row per line would cut sentences
    of wrapped text, one per file would be too long to train on.)"""
    with _open_text(file) as stream:
        numbered = _numbered(file, stream)
        for blank, block in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
            if not blank:
                lines = list(block)
                yield f":{lines[0][0]}", partial(_text_row, lines)


def _text_row(lines: list[tuple[int, str]]) -> RowOrBad:
    text = _unix_lines("".join(line for _, line in lines)).rstrip("\r\n")
    return _not_utf8(text, lines[0][0]) or {"text": text}


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n")  # a model need not learn \\r


READERS: dict[str, Callable[[Path], Placed]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
"""The reader of a file, by the suffix of its name (without .gz)."""


def kind_of(file: Path) -> str | None:
    """The key of `READERS` that matches the file's name, None if there is none."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in READERS or (kind in (".parquet", ".arrow") and name.endswith(".gz")):
        return None
    return kind
