"""Small data sets that are prepared, and how often: for tests of preparation and of its cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from data_files import json_lines, write

from sora_llm.data import prepare
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.report import DataReport
from sora_llm.data.sources import DatasetSpec
from sora_llm.data.templates import resolve_template

TEXTS = [{"text": letter * 3} for letter in "abcdefghij"]  # 5 tokens each with BOS and eos


def run(
    specs: list[DatasetSpec],
    tokenizer,
    *,
    chat_template: str | None = None,
    cache_dir: Path,
    num_proc: int | None = None,
    max_bad_row_fraction: float = 0.01,
    wait_first: float = 0.0,
    **options: object,
) -> tuple[TokenDataset, DataReport]:
    """`prepare` with the options of `Tokenizing`."""
    work = Tokenizing(tuple(specs), tokenizer, resolve_template(tokenizer, chat_template), **options)  # type: ignore[arg-type]
    return prepare.prepare(
        work,
        cache_dir=cache_dir,
        num_proc=num_proc,
        max_bad_row_fraction=max_bad_row_fraction,
        wait_first=wait_first,
    )


def texts(folder: Path, *rows: object, name: str = "a.jsonl") -> DatasetSpec:
    """A file of plain texts."""
    return DatasetSpec(write(folder / name, json_lines(*rows)), "completion")


def decoded(dataset: TokenDataset, tokenizer) -> list[str]:
    """The rows as text, special tokens included."""
    return [tokenizer.decode(dataset[i][0]) for i in range(len(dataset))]


@pytest.fixture
def prepared(tmp_path, byte):
    """A function that prepares rows of text, always with the same cache."""

    def prepare_texts(*rows: object, **options: object) -> tuple[TokenDataset, DataReport]:
        options = {"cache_dir": tmp_path / "cache", **options}
        return run([texts(tmp_path, *rows)], byte, **options)  # type: ignore[arg-type]

    return prepare_texts


@pytest.fixture
def fills(monkeypatch, tmp_path):
    """A line for each time that tokens were made rather than taken from the cache, whatever the process."""

    class Fills:
        path = tmp_path / "fills"

        def __len__(self) -> int:
            return len(self.path.read_text().splitlines()) if self.path.exists() else 0

    fill = prepare._fill

    def counted(*arguments: object) -> None:
        with Fills.path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        fill(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_fill", counted)
    return Fills()


def refuse(*arguments: object, **options: object) -> None:
    """What a place does where nothing may be written."""
    raise PermissionError(errno.EACCES, "Permission denied")
