"""Data sets → cached tokens: `prepare`.

Rows are read by one process and tokenised in chunks by several, each chunk into a few arrays (chunks.py, pool.py).
This process appends the arrays to files and counts rows (report.py).  The files are written once for all processes of a
run and all later runs (cache.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sora_llm.data.cache import fill_once, remembered_sha256
from sora_llm.data.chunks import RawChunk, TokenChunk, Tokenizing, in_chunks
from sora_llm.data.dataset import TokenDataset, TokenWriter
from sora_llm.data.order import fill_rate
from sora_llm.data.pool import map_in_order, own_cores
from sora_llm.data.progress import RowProgress
from sora_llm.data.report import (
    REPORTED_BAD_ROWS,
    DataReport,
    DatasetReport,
    count_tokens,
    length_histogram,
    refuse_unusable,
    sample_rows,
)
from sora_llm.data.sources import DatasetSpec, check_paths, read_rows, source_digest
from sora_llm.errors import UserError
from sora_llm.files import cache_home, user_path

_FORMAT_VERSION = 12  # of the cache: raise it when the same input gives different tokens or files
_SERIAL_CHUNKS = 10  # fewer chunks than this are tokenised faster than processes start
_MOST_PROCESSES = 8  # used by default: more would wait for the one that reads
_MAX_REASONS = 50  # that are counted individually: reasons may quote the row


def prepare(
    work: Tokenizing,
    *,
    max_bad_row_fraction: float = 0.01,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    wait_first: float = 0.0,
) -> tuple[TokenDataset, DataReport]:
    """The tokens of all data sets, one after the other, from the cache if the same data has been prepared before.

    The cache key is derived from the contents of the files, the template, the tokenizer and the options.  Any number of
    processes and machines may prepare the same data at once: one writes, the others wait for it without a collective
    and without a time limit, see `fill_once`.  Every process finds problems with the rows in the writer's report.

    Args:
        max_bad_row_fraction: of the rows read; with more malformed rows than that, the run stops.
        num_proc: processes that tokenise; None uses one per core, up to 8, if the data set is large.
        cache_dir: default `default_cache_dir()`.
        wait_first: seconds for which this process lets others become the writer.

    Raises:
        UserError: invalid files (or one that changes during reading) or columns; a row too long if that is an error,
            too many bad rows, a data set without a supervised token.
        RunFailed: a process that tokenises was killed.
    """
    if num_proc is not None and num_proc < 1:
        raise UserError(f"data.num_proc is {num_proc}; it is a number of processes, at least 1")
    check_paths(work.specs)
    cache = user_path(str(cache_dir), "data.cache_dir") if cache_dir is not None else default_cache_dir()
    sources = _sources(work.specs, cache / "digests")
    folder = cache / _key(work, sources)

    def fill(temporary: Path) -> None:
        _fill(temporary, work, num_proc)
        for spec, before, after in zip(work.specs, sources, _sources(work.specs, cache / "digests"), strict=True):
            if after != before:  # these tokens match neither version
                raise UserError(
                    f"data set {spec.path} changed while it was being read; start again once it is complete"
                )

    was_there = fill_once(folder, fill, wait_first)
    report = DataReport.load(folder, from_cache=was_there)
    refuse_unusable(report, max_bad_row_fraction)
    return TokenDataset.load(folder), report


def sample(work: Tokenizing, num_rows: int, max_bad_row_fraction: float = 0.01) -> tuple[TokenDataset, DataReport]:
    """Like `prepare`, but for only the first `num_rows` rows of each data set, and without the cache."""
    check_paths(work.specs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _fill(folder, work, 1, num_rows)
        rows, report = TokenDataset.load(folder), DataReport.load(folder, from_cache=False)
    refuse_unusable(report, max_bad_row_fraction)
    return rows, replace(report, cache_folder="")  # (mapped files stay readable)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/sora_llm/data, below ~/.cache if the variable is not set."""
    return cache_home() / "sora_llm" / "data"


def _sources(specs: Sequence[DatasetSpec], digests: Path) -> list[str]:
    """A hash of each data set's current sources; those of large files are remembered in the folder `digests`."""
    return [source_digest(spec, partial(remembered_sha256, memory=digests)) for spec in specs]


def _key(work: Tokenizing, sources: Sequence[str]) -> str:
    """Name of the cache folder: a hash of everything that can change a token."""
    options = {item.name: getattr(work, item.name) for item in fields(work) if item.name not in ("specs", "tokenizer")}
    parts = {
        **options,
        "specs": [_what_changes_tokens(spec) for spec in work.specs],
        "sources": sources,
        "tokenizer": _tokenizer_digest(work.tokenizer),
        "format": _FORMAT_VERSION,
        "versions": [version("transformers"), version("tokenizers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _what_changes_tokens(spec: DatasetSpec) -> dict[str, Any]:
    """A data set's settings, except those that only determine when its rows are read and how often they are used."""
    settings = {item.name: getattr(spec, item.name) for item in fields(spec)}
    return {name: value for name, value in settings.items() if name not in ("weight", "streaming")} | {
        "columns": dict(spec.columns)
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    """A hash of how a tokenizer turns text into ids: the serialised content of a fast one, vocabulary and class of a
    slow one, and the settings of either, except where it was loaded from."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not _is_place(name)}
    settings |= {"special": tokenizer.special_tokens_map, "split": getattr(tokenizer, "split_special_tokens", None)}
    return hashlib.sha256(f"{content}\n{json.dumps(settings, sort_keys=True, default=str)}".encode()).hexdigest()


def _is_place(name: str) -> bool:
    return name.endswith(("_file", "_path", "_dir")) or name in ("name_or_path", "is_local", "local_files_only")


# ----- rows → files ---------------------------------------------------------------------------------------------------


def _fill(folder: Path, work: Tokenizing, num_proc: int | None, rows_each: int | None = None) -> None:
    """Write tokens and report into `folder`, for all rows or for the first `rows_each` of each data set."""
    tally, seen, digest, rows_read = _Tally(work), _SeenBefore(), _Digest(), 0
    with (
        closing(TokenWriter(folder)) as writer,
        closing(RowProgress()) as progress,
        closing(_tokenized(work, num_proc, rows_each)) as chunks,  # ends its processes also when this one is stopped
    ):
        for chunk in chunks:
            repeated = seen.add(chunk.hashes)
            rows = chunk.without(repeated) if work.drop_duplicates else chunk
            writer.extend(rows.ids, rows.weights, rows.lengths, rows.source, rows_read + rows.origins)
            rows_read += rows.rows_read
            digest.add(rows)
            tally.add(chunk, int(repeated.sum()))
            progress.add(chunk.rows_read)
            if work.excess_length == "error" and chunk.first_too_long is not None:
                break  # keep what was read, so that every process finds the row in the report
    tally.report(TokenDataset.load(folder), digest.hex()).save(folder)


def _tokenized(work: Tokenizing, num_proc: int | None, rows_each: int | None) -> Generator[TokenChunk]:
    """All rows, in the order of the files, however many processes tokenise."""
    chunks = (
        chunk for source in range(len(work.specs)) for chunk in _raw_chunks(work.specs[source], source, rows_each)
    )
    head = list(itertools.islice(chunks, _SERIAL_CHUNKS))
    is_large = len(head) == _SERIAL_CHUNKS
    processes = (num_proc or min(_MOST_PROCESSES, own_cores())) if is_large else 1
    with closing(map_in_order(work.tokenize, itertools.chain(head, chunks), processes)) as results:
        yield from results


def _raw_chunks(spec: DatasetSpec, source: int, rows_each: int | None) -> Iterator[RawChunk]:
    for chunk in in_chunks(itertools.islice(read_rows(spec), rows_each)):
        yield source, chunk


class _SeenBefore:
    """Which hashes have come before, in 8 bytes each (a set of Python's integers takes ten times that).

    They are kept in sorted runs, each at least twice as long as the next.  Of n different rows two have the same
    64-bit hash with probability n² / 2⁶⁵: one in a million for four million rows.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) bool: whether each has come before, in an earlier call or earlier in this one."""
        new, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(hashes), dtype=bool)
        repeated[first] = False
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            repeated |= run[places] == hashes
        new = new[~repeated[first]]
        if len(new):
            self._runs.append(new)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return repeated


class _Digest:
    """SHA-256 of all rows in order and of their sources, independent of how they are cut into chunks."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def add(self, rows: TokenChunk) -> None:
        sources = np.full(len(rows.lengths), rows.source, dtype=np.int64)
        for part, array in zip(self._parts, (rows.ids, rows.weights, rows.lengths, sources), strict=True):
            part.update(array.tobytes())

    def hex(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


class _Tally:
    """Counts what becomes of the rows while they are written."""

    def __init__(self, work: Tokenizing) -> None:
        self._work = work
        self._counts: list[Counter[str]] = [Counter() for _ in work.specs]
        self._unsupervised: list[Counter[str]] = [Counter() for _ in work.specs]
        self._bad_rows: list[tuple[str, str]] = []
        self._bad_reasons: Counter[str] = Counter()
        self._first_too_long: tuple[str, int] | None = None
        self._first_special_written: tuple[str, str] | None = None

    def add(self, chunk: TokenChunk, duplicates: int) -> None:
        dropped = duplicates if self._work.drop_duplicates else 0
        self._counts[chunk.source].update(chunk.counts)
        self._counts[chunk.source].update(rows_kept=-dropped, duplicates=duplicates)
        self._unsupervised[chunk.source].update(chunk.unsupervised)
        self._bad_rows += chunk.bad_rows[: REPORTED_BAD_ROWS - len(self._bad_rows)]
        for _, reason in chunk.bad_rows:
            kind = re.sub(r"\d+", "#", reason)
            is_counted = kind in self._bad_reasons or len(self._bad_reasons) < _MAX_REASONS
            self._bad_reasons[kind if is_counted else "other reasons"] += 1
        self._first_too_long = self._first_too_long or chunk.first_too_long
        self._first_special_written = self._first_special_written or chunk.first_special_written

    def report(self, rows: TokenDataset, digest: str) -> DataReport:
        work, lengths = self._work, rows.lengths
        tokens = count_tokens(rows, len(work.specs))
        for counts, (read, supervised) in zip(self._counts, tokens, strict=True):
            counts.update(tokens=read, supervised_tokens=supervised)
        totals: Mapping[str, Any] = sum(self._counts, Counter())
        return DataReport(
            **totals,
            datasets=tuple(
                DatasetReport(path=spec.path, type=spec.type, unsupervised=dict(why.most_common()), **counts)
                for spec, counts, why in zip(work.specs, self._counts, self._unsupervised, strict=True)
            ),
            sequence_len=work.sequence_len,
            excess_length=work.excess_length,
            drop_duplicates=work.drop_duplicates,
            bad_rows=tuple(self._bad_rows),
            bad_reasons=dict(self._bad_reasons.most_common()),
            first_too_long=self._first_too_long,
            first_special_written=self._first_special_written,
            max_length=int(lengths.max(initial=0)),
            mean_length=float(lengths.mean()) if len(rows) else 0.0,
            median_length=float(np.median(lengths)) if len(rows) else 0.0,
            length_histogram=length_histogram(lengths),
            fill_rate=fill_rate(rows, work.sequence_len) if len(rows) else 0.0,
            samples=sample_rows(len(rows)),
            digest=digest,
        )
