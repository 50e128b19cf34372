"""Rows of files, and what they say: `read_rows` (bytes → rows with a location), `to_example` (row → example).

Nothing here knows a tokenizer.  A row that cannot be used is a `BadRow`, counted by the caller; a file or a
setting that cannot be used is a `UserError`, which ends the run.

Locations: ``file:line`` (json lines, csv, txt), ``file#index`` (a json list, parquet; from 0) and
``hub_id[split]#index``.
"""

from __future__ import annotations

import csv
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sora_llm.errors import UserError

FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("text",),
    "prompt_completion": ("prompt", "completion"),
}
"""Each type of data set and our fields, the keys that `DatasetSpec.columns` may map."""

_OPTIONAL_FIELDS = {"input"}
_PEEKED_ROWS = 100  # a column that none of the first rows has is taken for a mistake in the config
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_WEIGHT_KEYS = ("loss_weight", "weight", "train")  # LLaMA-Factory's, OpenAI's and axolotl's names for one idea


class BadRow(Exception):
    """A row that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of the config: where its rows are and how to read them."""

    path: str
    """A file, a folder, a glob or a hub id."""
    type: str
    """One of `FIELDS`."""
    split: str | None = None
    """Of a hub data set ("train" where none is given); a local file has no splits."""
    revision: str | None = None
    """Of a hub data set."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field → the column of the file that holds it, where the names differ."""
    separator: str = ""
    """Written between prompt and completion of prompt_completion."""

    def column(self, name: str) -> str:
        """The file's column that holds our field `name`."""
        return self.columns.get(name, name)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    supervise: bool | None = None
    """What the row itself says about training on this turn; None leaves it to the options."""
    input: str = ""
    """Alpaca's input: the alpaca template gives it a section of its own, others see it below the content."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PromptCompletion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


Example = Conversation | PromptCompletion | Text
Row = dict[str, Any]
RowOrBad = Row | BadRow


# ----- what can be said before a row is read ------------------------------------------------------------------------


def check_paths(specs: Sequence[DatasetSpec]) -> None:
    """Find what is wrong with the data sets without reading them: types, columns, files missing, empty, unreadable
    or of an unknown kind.  Raises `UserError`.  Hub ids are not looked up."""
    if not specs:
        raise UserError("data.datasets is empty: name at least one data set")
    for spec in specs:
        _check_settings(spec)
        if is_local(spec.path):
            for file in _local_files(spec):
                _check_file(file)


def is_local(path: str) -> bool:
    """Whether `path` means this machine rather than the hub, also when nothing is there: a misspelt file name
    should be called missing, not looked up on the network.  A hub id is "name" or "owner/name"."""
    if path.startswith((".", "~", "/")) or _is_glob(path) or _kind(Path(path)) or path.count("/") > 1:
        return True
    return Path(path).exists() or ("/" in path and Path(path).parent.is_dir())


def source_digest(spec: DatasetSpec) -> str:
    """A hash of what the rows are made of: the bytes of the files, or the fingerprint of a hub data set."""
    if not is_local(spec.path):
        return str(_load_hub(spec.path, spec.split or "train", spec.revision)._fingerprint)
    digest = hashlib.sha256()
    for file in _local_files(spec):
        with _reading(file), file.open("rb") as stream:
            # Each file is hashed by itself: two files cut at another place are other rows.
            digest.update(f"{file.name}:{_stream_digest(stream)}\n".encode())
    return digest.hexdigest()


def _stream_digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_settings(spec: DatasetSpec) -> None:
    if spec.type not in FIELDS:
        raise UserError(f"data set {spec.path}: type {spec.type!r} is unknown; known are {', '.join(FIELDS)}")
    for name in spec.columns:
        if name not in FIELDS[spec.type]:
            raise UserError(
                f"data set {spec.path}: columns maps {name!r}, which is no field of type {spec.type}; its fields are "
                f"{', '.join(FIELDS[spec.type])}"
            )
    if spec.separator and spec.type != "prompt_completion":
        raise UserError(f"data set {spec.path}: separator is for type prompt_completion, not {spec.type}; remove it")
    if is_local(spec.path) and spec.split not in (None, "train"):
        raise UserError(
            f"data set {spec.path}: split {spec.split!r} is for hub data sets, local files have no splits; remove it "
            "and name the files of that split in path"
        )
    if is_local(spec.path) and spec.revision is not None:
        raise UserError(f"data set {spec.path}: revision is for hub data sets, this is a local path; remove it")


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"data set {file} does not exist" if not file.exists() else f"data set {file} is not a file")
    if not os.access(file, os.R_OK):
        raise UserError(f"data set {file} cannot be read: permission denied")
    if file.stat().st_size == 0:
        raise UserError(f"data set {file} is empty")


# ----- files ----------------------------------------------------------------------------------------------------------


def _is_glob(path: str) -> bool:
    return not Path(path).exists() and glob.has_magic(path)


def _kind(file: Path) -> str | None:
    """The key of `_READERS` that fits the file's name, None where there is none."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in _READERS or (kind == ".parquet" and name.endswith(".gz")):
        return None
    return kind


def _local_files(spec: DatasetSpec) -> list[Path]:
    """The files behind `spec.path`, sorted; each of a kind that can be read."""
    path = Path(spec.path).expanduser()
    if _is_glob(spec.path):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
        files = sorted(Path(name) for name in found if Path(name).is_file())
        if not files:
            raise UserError(f"data set {spec.path}: no file matches this pattern")
    elif path.is_dir():
        files = _folder_files(path, spec.type)
    else:
        files = [path]
    for file in files:
        _check_kind(file, spec.type)
    return files


def _folder_files(folder: Path, type_: str) -> list[Path]:
    """The data files anywhere below a folder, without hidden ones.  Text files count only where text is wanted: the
    README beside conversations is not data."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _kind(file) is not None
        and (type_ == "completion" or _kind(file) != ".txt")
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"data set {folder}: the folder holds no {_kinds_in_words()} file")
    return files


def _check_kind(file: Path, type_: str) -> None:
    if _kind(file) is None:
        if not file.exists():
            raise UserError(f"data set {file} does not exist")
        raise UserError(f"data set {file} is of an unknown kind; known are {_kinds_in_words()}")
    if _kind(file) == ".txt" and type_ != "completion":
        raise UserError(f"data set {file}: a .txt file holds plain text, which only type completion can read")


def _kinds_in_words() -> str:
    return ", ".join(_READERS) + " (.gz of all but parquet)"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what can go wrong while a file is read into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"data set {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"data set {file} is not UTF-8 text: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data set {file} cannot be read: {error}") from None


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _open_text(file: Path) -> IO[str]:
    """Text without the byte order mark that spreadsheets write, line ends as they are (csv needs them)."""
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


# ----- rows: every reader yields (":line" or "#index", row) -----------------------------------------------------------

Placed = Iterator[tuple[str, RowOrBad]]


def read_rows(spec: DatasetSpec) -> Iterator[tuple[str, RowOrBad]]:
    """All rows of a data set in order, each with its location.  A line that is no row comes as a `BadRow`.

    Raises `UserError` for a file (or hub data set) that cannot be read or holds no rows, and for a column that none
    of its first rows has: that is a mistake in the config, not in a row.
    """
    _check_settings(spec)
    if not is_local(spec.path):
        split = spec.split or "train"
        rows = _read_list(_load_hub(spec.path, split, spec.revision))
        yield from _checked(f"{spec.path}[{split}]", rows, spec)
        return
    for file in _local_files(spec):
        _check_file(file)
        with _reading(file):
            yield from _checked(str(file), _READERS[str(_kind(file))](file), spec)


def _checked(name: str, rows: Placed, spec: DatasetSpec) -> Iterator[tuple[str, RowOrBad]]:
    head = list(itertools.islice(rows, _PEEKED_ROWS))
    if not head:
        raise UserError(f"data set {name} holds no rows")
    _check_columns(name, [row for _, row in head if isinstance(row, dict)], spec)
    for position, row in itertools.chain(head, rows):
        yield name + position, row


def _check_columns(name: str, rows: list[Row], spec: DatasetSpec) -> None:
    present = {column for row in rows for column in row}
    for our_field in FIELDS[spec.type]:
        column = spec.column(our_field)
        wanted = our_field not in _OPTIONAL_FIELDS or our_field in spec.columns
        if rows and wanted and column not in present:
            raise UserError(
                f"data set {name} has no column {column!r} (the {our_field} of type {spec.type}); it has "
                f"{', '.join(sorted(map(str, present))) or 'none'}: name the right one in columns, or another type"
            )


def _read_list(rows: Iterable[Any]) -> Placed:
    for index, row in enumerate(rows):
        yield f"#{index}", _as_row(row)


def _as_row(value: Any) -> RowOrBad:
    return value if isinstance(value, dict) else BadRow(f"the row is {_type_in_words(value)}, not an object with keys")


def _parse_json_lines(lines: Iterable[bytes]) -> Placed:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f":{number}", _as_row(json.loads(line))
            except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
                yield f":{number}", BadRow(f"not valid JSON ({error})")


def _read_json_lines(file: Path) -> Placed:
    with _open(file) as lines:
        yield from _parse_json_lines(lines)


def _read_json(file: Path) -> Placed:
    """A list of rows, {"data": [rows]}, or json lines under the wrong name."""
    with _open(file) as stream:
        content = stream.read()
    if _holds_json_lines(content):
        yield from _parse_json_lines(content.splitlines())
        return
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"data set {file}:{error.lineno} is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"data set {file} is nested too deeply to be read") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(
            f'data set {file} holds neither a list of rows, nor {{"data": [rows]}}, nor one JSON object per line'
        )
    yield from _read_list(rows)


def _holds_json_lines(content: bytes) -> bool:
    lines = content.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and (b"".join(lines[1:]).strip() != b"" or not isinstance(first.get("data"), list))


def _read_csv(file: Path) -> Placed:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long conversation
    with _open_text(file) as stream:
        # strict: without it a quote that is never closed swallows the rest of the file in silence.
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                yield f":{_first_line(reader.line_num, row)}", _csv_row(row)
        except csv.Error as error:
            raise UserError(f"data set {file}:{reader.line_num} is not valid csv: {error}") from None


def _first_line(last_line: int, row: dict[Any, Any]) -> int:
    return last_line - sum(value.count("\n") for value in row.values() if isinstance(value, str))


def _csv_row(row: dict[Any, Any]) -> RowOrBad:
    if None in row:  # DictReader keeps fields without a column under None ...
        return BadRow("the row has more fields than the header")
    if None in row.values():  # ... and gives columns without a field the value None
        return BadRow("the row has fewer fields than the header")
    return row


def _read_parquet(file: Path) -> Placed:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        yield from _read_list(row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"data set {file} is not a readable parquet file: {error}") from None


def _read_text(file: Path) -> Placed:
    """Plain text: one row per paragraph, that is per block of lines between blank lines.  (A row per line would cut
    sentences of wrapped text, a row per file would be one row too long to train on.)"""
    with _open_text(file) as stream:
        numbered = enumerate(stream, start=1)
        for blank, block in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
            if not blank:
                lines = list(block)
                yield f":{lines[0][0]}", {"text": "".join(line for _, line in lines).rstrip("\r\n")}


_READERS: dict[str, Callable[[Path], Placed]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


@functools.lru_cache(maxsize=4)  # the cache's key and the rows need the same data set
def _load_hub(path: str, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # hub, http, offline mode, wrong split, missing config: each has a class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set {path!r} (split {split!r}) is neither a file or folder here nor could it be loaded from the "
            f"hub: {reason}"
        ) from error


# ----- row → example --------------------------------------------------------------------------------------------------


def to_example(row: Row, spec: DatasetSpec) -> Example:
    """What a row says, independent of its format.  Raises `BadRow` with the reason where it says nothing usable."""
    return _BUILDERS[spec.type](row, spec)


def _alpaca(row: Row, spec: DatasetSpec) -> Conversation:
    question = Message("user", _filled_text(row, spec, "instruction"), input=_text(row, spec, "input"))
    return Conversation((question, Message("assistant", _filled_text(row, spec, "output"))))


def _prompt_completion(row: Row, spec: DatasetSpec) -> PromptCompletion:
    return PromptCompletion(_text(row, spec, "prompt"), _filled_text(row, spec, "completion"))


def _completion(row: Row, spec: DatasetSpec) -> Text:
    return Text(_filled_text(row, spec, "text"))


def _openai(row: Row, spec: DatasetSpec) -> Conversation:
    return _conversation(row, spec, "messages", (("role", "content"),), _ROLES)


def _sharegpt(row: Row, spec: DatasetSpec) -> Conversation:
    return _conversation(row, spec, "conversations", (("from", "value"), ("role", "content")), _SHAREGPT_ROLES)


_BUILDERS: dict[str, Callable[[Row, DatasetSpec], Example]] = {
    "alpaca": _alpaca,
    "messages": _openai,
    "sharegpt": _sharegpt,
    "completion": _completion,
    "prompt_completion": _prompt_completion,
}


def _text(row: Row, spec: DatasetSpec, name: str) -> str:
    column = spec.column(name)
    value = row.get(column)
    if value is None and name in _OPTIONAL_FIELDS:
        return ""
    if column not in row:
        raise BadRow(f"{column} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{column} is {_type_in_words(value)}, not text")
    return value


def _filled_text(row: Row, spec: DatasetSpec, name: str) -> str:
    text = _text(row, spec, name)
    if not text.strip():
        raise BadRow(f"{spec.column(name)} is empty")
    return text


def _conversation(
    row: Row, spec: DatasetSpec, name: str, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str]
) -> Conversation:
    column = spec.column(name)
    turns = row.get(column)
    if not isinstance(turns, list):
        raise BadRow(f"{column} is {_type_in_words(turns)}, not a list" if column in row else f"{column} is missing")
    if not turns:
        raise BadRow(f"{column} is empty")
    if row.get("tools"):
        raise BadRow("tools are not supported")
    return Conversation(tuple(_message(turn, f"{column}[{i}]", keys, roles) for i, turn in enumerate(turns)))


def _message(turn: Any, place: str, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {_type_in_words(turn)}, not an object with keys")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow(f"{place} calls a tool, which is not supported")
    # Of the accepted pairs of keys the first whose role is there; tables fill absent keys with null.
    role_key, content_key = next((pair for pair in keys if turn.get(pair[0]) is not None), keys[0])
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise BadRow(f"{place}.{role_key} is {role!r}; known are {', '.join(roles)}")
    message = Message(roles[role], _content(turn.get(content_key), f"{place}.{content_key}"), _supervise(turn, place))
    if message.role == "assistant" and not message.content.strip():
        raise BadRow(f"{place}.{content_key}, an assistant's turn, is empty")
    return message


def _content(content: Any, place: str) -> str:
    """Text, or a list of typed parts of which every one is text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{place} is {_type_in_words(content)}, not text or a list of text parts")
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadRow(f"{place} is {kind!r}, and only parts of type 'text' can be trained on")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if not isinstance(text, str):
        raise BadRow(f"{place} has no text")
    return text


def _supervise(turn: dict[str, Any], place: str) -> bool | None:
    """What the turn's own weight or flag says: train on it, or not, or (None) nothing."""
    weights = {key: turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):  # True and False are 1 and 0
            raise BadRow(f"{place}.{key} is {weight!r}; only 0 and 1 are available")
    if len(set(weights.values())) > 1:
        raise BadRow(f"{place} contradicts itself: {weights}")
    return bool(next(iter(weights.values()))) if weights else None


def _type_in_words(value: Any) -> str:
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
