"""Files of rows in every format, and what is read of them: for tests of data."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow.ipc
import pytest

from sora_llm.data.formats import to_examples
from sora_llm.data.sources import DatasetSpec, read_rows
from sora_llm.errors import UserError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(path: Path, content: str | bytes) -> str:
    """A file with this content, compressed where its name says so; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def json_lines(*rows: object) -> str:
    """The content of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path: str, type_: str = "completion", **spec: object) -> list:
    """The rows of a data set with their locations."""
    return list(read_rows(DatasetSpec(path, type_, **spec)))  # type: ignore[arg-type]


def example_of(row: dict, type_: str, **spec: object):
    """The one example that a row becomes."""
    (example,) = to_examples(row, DatasetSpec("rows.jsonl", type_, **spec))  # type: ignore[arg-type]
    return example


def to_parquet(path: Path, rows: list[dict]) -> str:
    """A file as `datasets` writes it; returns its path."""
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def to_arrow_stream(path: Path, rows: list[dict]) -> str:
    """A file as the cache of `datasets` has it; returns its path."""
    table = datasets.Dataset.from_list(rows).data.table
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    return str(path)


def to_arrow_file(path: Path, rows: list[dict]) -> str:
    """The other of Arrow's two formats of a file; returns its path."""
    table = datasets.Dataset.from_list(rows).data.table
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return str(path)


def refused(match: str):
    """Where bad input ends the run."""
    return pytest.raises(UserError, match=match)
