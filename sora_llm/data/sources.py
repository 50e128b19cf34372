"""Reading rows: `read_rows` (files, folders, globs, hub data sets → rows with a location).

Nothing here knows what a row means.  A line that is not a row is a `BadRow`, counted by the caller; an unusable file or
setting is a `UserError`, which ends the run.

Locations: ``file:line`` (JSON lines, csv, txt), ``file#index`` (a JSON list, parquet, arrow; from 0) and
``hub_id[split]#index``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from sora_llm.data.local_files import check_file, is_local, local_files
from sora_llm.data.readers import READERS, Placed, Row, RowOrBad, as_table_row, kind_of, reading, type_in_words
from sora_llm.errors import UserError, first_line
from sora_llm.files import file_sha256
from sora_llm.row_types import FIELDS, IN_PARTS

OPTIONAL_FIELDS = {"input"}
_PEEKED_ROWS = 100  # a column missing from all of the first rows is taken for a mistake in the config


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of the config: where its rows are and how to read them."""

    path: str
    """A file, a folder, a glob or a hub id."""
    type: str
    """One of `FIELDS`."""
    split: str | None = None
    """Of a hub data set ("train" if none is given); a local file has no splits."""
    name: str | None = None
    """Of a hub data set that has several configurations: which one."""
    revision: str | None = None
    """Of a hub data set."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field → the column of the file that holds it, if the names differ."""
    separator: str = ""
    """Written between prompt and completion of prompt_completion."""
    function: str | None = None
    """For type custom: "module:function", which makes messages from a row."""
    weight: float | None = None
    """Share of the rows in a mixture of data sets; None: every row once."""
    streaming: bool = False
    """Read while training instead of before it."""

    def column(self, name: str) -> str:
        """The file's column that holds our field `name`."""
        return self.columns.get(name, name)


# ----- checks before a row is read ----------------------------------------------------------------------------------


def check_paths(specs: Sequence[DatasetSpec]) -> None:
    """Find problems with the data sets without reading them; hub ids are not looked up.

    Raises:
        UserError: invalid types or columns, functions that cannot be imported, files missing, empty, unreadable or of
            an unknown kind.
    """
    if not specs:
        raise UserError("data.datasets is empty: name at least one data set")
    for spec in specs:
        _check_settings(spec)
        if is_local(spec.path):
            for file in local_files(spec.path, spec.type):
                check_file(file)


def source_digest(spec: DatasetSpec, file_digest: Callable[[Path], str] = file_sha256) -> str:
    """A hash of the sources of the rows: the bytes of the files, or the fingerprint of a hub data set (a streamed one
    has none), and the source of the module by which a custom function is named and of the one that defines it (not of
    modules that these import).

    Raises:
        UserError: one of these modules has changed since the function was loaded.
    """
    digest = hashlib.sha256()
    if spec.function is not None:
        for module in _modules_of(spec.function, load_function(spec.function)):
            source = _source_when_loaded(module)
            if source != _source_of(module):  # else the old code would keep running under the new one's key
                raise UserError(
                    f"data set {spec.path}: {module.__file__} has changed since function {spec.function!r} was loaded "
                    "from it; start this program again, so that it runs what is there now"
                )
            digest.update(f"function:{source}\n".encode())
    if not is_local(spec.path):
        digest.update(_load_hub(spec.path, spec.name, spec.split, spec.revision, spec.streaming)._fingerprint.encode())
        return digest.hexdigest()
    for file in local_files(spec.path, spec.type):
        with reading(file):
            # Each file is hashed by itself: two files cut at a different place are different rows.
            digest.update(f"{file.name}:{file_digest(file)}\n".encode())
    return digest.hexdigest()


def _check_settings(spec: DatasetSpec) -> None:
    if spec.type not in FIELDS:
        raise UserError(f"data set {spec.path}: type {spec.type!r} is unknown; known are {', '.join(FIELDS)}")
    for name in spec.columns:
        if name not in FIELDS[spec.type]:
            raise UserError(
                f"data set {spec.path}: columns maps {name!r}, which is not a field of type {spec.type}; its fields "
                f"are {', '.join(FIELDS[spec.type]) or 'up to its function'}"
            )
    _check_function(spec)
    if spec.separator and spec.type != "prompt_completion":
        raise UserError(f"data set {spec.path}: separator is for type prompt_completion, not {spec.type}; remove it")
    if is_local(spec.path) and spec.split not in (None, "train"):
        raise UserError(
            f"data set {spec.path}: split {spec.split!r} is for hub data sets, local files have no splits; remove it "
            "and name the files of that split in path"
        )
    for key, value in (("name", spec.name), ("revision", spec.revision)):
        if is_local(spec.path) and value is not None:
            raise UserError(f"data set {spec.path}: {key} is for hub data sets, this is a local path; remove it")


def _check_function(spec: DatasetSpec) -> None:
    if (spec.function is None) == (spec.type == "custom"):
        raise UserError(
            f"data set {spec.path}: type custom needs a function (module:function), other types take none; the type is "
            f"{spec.type}: {'name the function' if spec.function is None else 'remove it'}"
        )
    if spec.function is not None:
        try:
            load_function(spec.function)
        except UserError as error:
            raise UserError(f"data set {spec.path}: {error}") from error


@functools.lru_cache(maxsize=64)
def load_function(name: str) -> Callable[[Row], Any]:
    """The function that a data set of type custom names as "module:function".  Modules are also found in the current
    folder, which is not on a console script's path.

    Raises:
        UserError: the name has another form, the module cannot be imported, or it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"function {name!r} is not of the form module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever its code raises
        raise UserError(
            f"function {name!r}: module {module_name} cannot be imported ({type(error).__name__}: {error}); it is "
            "looked for in the current folder and on PYTHONPATH"
        ) from error
    place = f"module {module_name} ({getattr(module, '__file__', 'built in')})"
    if not hasattr(module, function_name):
        raise UserError(f"function {name!r}: {place} has no {function_name!r}")
    function: Callable[[Row], Any] = getattr(module, function_name)
    if not callable(function):
        raise UserError(f"function {name!r}: {function_name} of {place} is {type_in_words(function)}, not a function")
    for of_function in _modules_of(name, function):
        _source_when_loaded(of_function)
    return function


def _modules_of(name: str, function: Any) -> list[ModuleType]:
    """The module by which a function is named and the one that defines it."""
    function = inspect.unwrap(function)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    names = dict.fromkeys((name.partition(":")[0], str(getattr(function, "__module__", None))))
    return [sys.modules[module] for module in names if module in sys.modules]


@functools.cache
def _source_when_loaded(module: ModuleType) -> str | None:
    """`_source_of` as of the first call."""
    return _source_of(module)


def _source_of(module: ModuleType) -> str | None:
    """The digest of a module's file, None if it has none, as modules in C or in an archive."""
    file = getattr(module, "__file__", None)
    return file_sha256(Path(file)) if file and Path(file).is_file() else None


# ----- rows -----------------------------------------------------------------------------------------------------------


def read_rows(spec: DatasetSpec, skip: int = 0) -> Iterator[tuple[str, RowOrBad]]:
    """The rows of a data set in order, each with its location.  A line that is not a row comes as a `BadRow`.

    Args:
        skip: leave out that many rows, bad ones included; the rest keep their locations.  They are counted, not parsed.

    Raises:
        UserError: a file (or hub data set) that cannot be read or has no rows, or a column that none of its first rows
            has, which is a mistake in the config, not in a row.
    """
    _check_settings(spec)
    if not is_local(spec.path):
        name = f"{'/'.join(filter(None, (spec.path, spec.name)))}[{spec.split or 'train'}]"
        yield from _checked(name, _read_hub(name, spec, skip), spec, skip)
        return
    for file in local_files(spec.path, spec.type):
        check_file(file)
        with reading(file):
            placed = READERS[str(kind_of(file))](file)
            skipped = sum(1 for _ in itertools.islice(placed, skip))
            skip -= skipped
            yield from _checked(str(file), placed, spec, skipped)


def _checked(name: str, placed: Placed, spec: DatasetSpec, skipped: int) -> Iterator[tuple[str, RowOrBad]]:
    rows = ((position, make()) for position, make in placed)
    head = list(itertools.islice(rows, _PEEKED_ROWS))
    if not head and not skipped:
        raise UserError(f"data set {name} holds no rows")
    if not skipped:  # rows in the middle may all lack a column that is seldom filled
        _check_columns(name, [row for _, row in head if isinstance(row, dict)], spec)
    for position, row in itertools.chain(head, rows):
        yield name + position, row


def _check_columns(name: str, rows: list[Row], spec: DatasetSpec) -> None:
    present = {column for row in rows for column in row}
    for our_field in FIELDS[spec.type]:
        column = spec.column(our_field)
        wanted = our_field not in OPTIONAL_FIELDS or our_field in spec.columns
        if rows and wanted and column not in present and not is_in_parts(present, our_field, spec):
            has = ", ".join(sorted(repr(one) if one != one.strip() else one for one in map(str, present))) or "none"
            raise UserError(
                f"data set {name} has no column {column!r} (the {our_field} of type {spec.type}); it has {has}: "
                f"{_what_fits(present, spec)}"
            )


def _what_fits(columns: Collection[str], spec: DatasetSpec) -> str:
    """What to do with rows of these columns, which lack one that the data set's type or `columns` requires."""
    if {"chosen", "rejected"} <= set(columns):
        return "preference data is not supported; map a column with answers in columns"
    fitting = [
        kind
        for kind, names in FIELDS.items()
        if names and kind != spec.type and set(names) - OPTIONAL_FIELDS <= set(columns)
    ]
    if fitting and not spec.columns:
        return f"type {' or '.join(fitting)} fits"
    return "name the right one in columns, or another type"


def is_in_parts(columns: Collection[str], our_field: str, spec: DatasetSpec) -> bool:
    """Whether other columns hold the parts of a missing field."""
    parts = IN_PARTS.get(our_field, ())
    return bool(parts) and our_field not in spec.columns and our_field not in columns and set(parts) <= set(columns)


def _read_hub(name: str, spec: DatasetSpec, skip: int) -> Placed:
    dataset = _load_hub(spec.path, spec.name, spec.split, spec.revision, spec.streaming)
    if skip and not spec.streaming and skip >= len(dataset):  # which dataset.skip does not accept
        return
    rows = iter(dataset.skip(skip) if skip else dataset)
    for index in itertools.count(skip):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # network, a damaged file of the data set: each has its own class
            raise UserError(f"data set {name}#{index} cannot be read: {first_line(error)}") from error
        yield f"#{index}", partial(as_table_row, row)


@functools.lru_cache(maxsize=4)  # the cache's key and the rows need the same data set
def _load_hub(path: str, name: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    split = split or "train"
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # hub, http, offline mode, wrong split, missing name: each has its own class
        reason = " ".join(str(error).split())[:300] or type(error).__name__  # its second line has the names there are
        which = f"split {split!r}" if name is None else f"name {name!r}, split {split!r}"
        raise UserError(
            f"data set {path!r} ({which}) is neither a file or folder here nor could it be loaded from the hub: "
            f"{reason}"
        ) from error
