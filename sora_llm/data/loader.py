"""Data sets → cached tokens (`prepare`), and tokens → batches in an order that depends on nothing but the seed.

The order of rows is a pure function of the seed and the position in the run: `step_rows` says which rows an
optimizer step takes, `share` which of them a process takes.  So a run goes on with the very next row after a resume,
also with another number of processes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sora_llm.data.formats import BadRow, DatasetSpec, RowOrBad, check_paths, read_rows, source_digest, to_example
from sora_llm.data.tokenize import resolve_template, tokenize_example
from sora_llm.errors import RunFailed, UserError

IGNORED = -100  # torch's cross-entropy skips targets with this label
_FORMAT_VERSION = 1  # of the cache: raise it when the same input gives other tokens or files
_SERIAL_ROWS = 2000  # fewer rows than this are tokenised sooner than processes are started
_CHUNK_ROWS = 200
_REPORTED_BAD_ROWS = 20
_QUOTED_BAD_ROWS = 3

ExcessLength = Literal["drop", "truncate", "error"]
TokenRow = tuple[np.ndarray, np.ndarray]
"""Token ids (int32) and which of them are supervised (bool)."""


# ----- what preparation gives -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataReport:
    """What became of the rows; cached with the tokens."""

    rows_read: int
    rows_kept: int
    num_bad_rows: int
    bad_rows: tuple[tuple[str, str], ...]
    """(location, reason) of the first bad rows."""
    too_long: int
    """Rows dropped because they exceed sequence_len."""
    truncated: int
    """Rows cut to sequence_len, also those that were dropped then."""
    no_supervised: int
    """Rows dropped because no token of them would be trained on (after truncation)."""
    duplicates: int
    """Rows with the same tokens and mask as an earlier one, whether dropped or not."""
    tokens: int
    supervised_tokens: int
    max_length: int

    def to_json(self) -> dict[str, Any]:
        """As json holds it: `json.dumps(report.to_json())`."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> DataReport:
        """Reads what `prepare` has written.  Raises `UserError` if it is damaged."""
        try:
            value = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            return cls(**{**value, "bad_rows": tuple((location, reason) for location, reason in value["bad_rows"])})
        except (OSError, ValueError, TypeError, KeyError):
            raise _damaged(folder) from None


def _damaged(folder: Path) -> UserError:
    return UserError(f"the cached data in {folder} is damaged: delete this folder and start again")


class TokenDataset:
    """Tokenised rows in three memory-mapped files: reading a row touches its own tokens only, and processes on one
    machine share the memory."""

    def __init__(
        self, tokens: np.ndarray, supervised: np.ndarray, spans: np.ndarray, supervised_lengths: np.ndarray
    ) -> None:
        """Args:
        tokens, supervised: all rows one after the other.
        spans: (rows, 2), where in them each row starts and ends.
        supervised_lengths: (rows,), supervised tokens of each row.
        """
        self._tokens, self._supervised, self._spans = tokens, supervised, spans
        self.lengths: np.ndarray = spans[:, 1] - spans[:, 0]
        self.supervised_lengths = supervised_lengths

    @classmethod
    def load(cls, folder: Path) -> TokenDataset:
        """Opens what `prepare` has written.  Raises `UserError` if files are missing or cut short."""
        try:
            lengths, supervised_lengths = np.load(folder / "lengths.npy")
            tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            supervised = np.memmap(folder / "supervised.bin", dtype=np.bool_, mode="r")
            intact = len(tokens) == len(supervised) == lengths.sum()
        except (OSError, ValueError):
            intact = False
        if not intact:
            raise _damaged(folder)
        ends = np.cumsum(lengths)
        return cls(tokens, supervised, np.stack([ends - lengths, ends], axis=1), supervised_lengths)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> TokenRow:
        start, end = self._spans[row]
        return np.asarray(self._tokens[start:end]), np.asarray(self._supervised[start:end])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_lengths.sum())

    def select(self, rows: Sequence[int] | np.ndarray) -> TokenDataset:
        """The given rows in the given order, without copying their tokens."""
        return TokenDataset(self._tokens, self._supervised, self._spans[rows], self.supervised_lengths[rows])


# ----- preparation ----------------------------------------------------------------------------------------------------


def prepare(
    specs: Sequence[DatasetSpec],
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    train_on_inputs: bool = False,
    train_on_last_turn_only: bool = False,
    sequence_len: int = 2048,
    excess_length: ExcessLength = "drop",
    max_bad_row_fraction: float = 0.01,
    drop_duplicates: bool = False,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[TokenDataset, DataReport]:
    """The tokens of all data sets, one after the other, from the cache where the same has been prepared before.

    The cache's key is made of the contents of the files, the template, the tokenizer and the options.  Any number of
    processes may prepare the same at once: each works in a folder of its own, the first to finish renames it.

    Args:
        chat_template: see `resolve_template`.
        sequence_len: tokens of the longest row that is kept whole.
        excess_length: what happens to longer rows; "error" names the first.
        max_bad_row_fraction: of the rows read; with more malformed rows than that the run stops.
        num_proc: processes that tokenise; None takes up to 4 where the data set is large.
        cache_dir: default `default_cache_dir()`.

    Raises `UserError`: files, columns, template; too many bad rows; no row left.  Raises `RunFailed` if a process that
    tokenises is killed.
    """
    _check_options(tokenizer, train_on_inputs, train_on_last_turn_only, sequence_len, excess_length, num_proc)
    check_paths(specs)
    work = _Work(
        tuple(specs),
        tokenizer,
        resolve_template(tokenizer, chat_template),
        train_on_inputs,
        train_on_last_turn_only,
        sequence_len,
        excess_length,
        drop_duplicates,
    )
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = cache / work.key()
    if not folder.exists():
        _write_cache(folder, work, num_proc)
    report = DataReport.load(folder)
    _check_report(report, sequence_len, max_bad_row_fraction)
    return TokenDataset.load(folder), report


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/sora_llm/data, below ~/.cache where the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sora_llm" / "data"


def _check_options(
    tokenizer: Any,
    train_on_inputs: bool,
    train_on_last_turn_only: bool,
    sequence_len: int,
    excess_length: str,
    num_proc: int | None,
) -> None:
    if train_on_inputs and train_on_last_turn_only:
        raise UserError("data.train_on_inputs and data.train_on_last_turn_only exclude each other: set one of them")
    if sequence_len < 2:
        raise UserError(f"data.sequence_len is {sequence_len}; a row needs at least 2 tokens, one to predict another")
    if excess_length not in ("drop", "truncate", "error"):
        raise UserError(f"data.excess_length is {excess_length!r}; known are drop, truncate and error")
    if num_proc is not None and num_proc < 1:
        raise UserError(f"data.num_proc is {num_proc}; it is a number of processes, at least 1")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, with which answers end: choose a model that has one")


@dataclass(frozen=True)
class _Work:
    """All that the tokens depend on."""

    specs: tuple[DatasetSpec, ...]
    tokenizer: Any
    template: str
    train_on_inputs: bool
    train_on_last_turn_only: bool
    sequence_len: int
    excess_length: ExcessLength
    drop_duplicates: bool

    def key(self) -> str:
        """Name of the cache folder: a hash of everything that can change a token."""
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "tokenizer"}
        parts = {
            **options,
            "specs": [asdict(spec) | {"columns": dict(spec.columns)} for spec in self.specs],
            "sources": [source_digest(spec) for spec in self.specs],
            "tokenizer": _tokenizer_digest(self.tokenizer),
            "format": _FORMAT_VERSION,
            "versions": [version("transformers"), version("tokenizers")],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def tokenize(self, item: _Item) -> _Result:
        """Ids and mask of a row, or why there are none."""
        location, row, spec_index = item
        if isinstance(row, BadRow):
            return location, row
        spec = self.specs[spec_index]
        try:
            ids, supervised = tokenize_example(
                to_example(row, spec),
                self.tokenizer,
                self.template,
                train_on_inputs=self.train_on_inputs,
                train_on_last_turn_only=self.train_on_last_turn_only,
                separator=spec.separator,
            )
        except BadRow as bad:
            return location, bad
        return location, (np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))


_Item = tuple[str, RowOrBad, int]
_Result = tuple[str, TokenRow | BadRow]


def _tokenizer_digest(tokenizer: Any) -> str:
    """A hash of how a tokenizer turns text into ids: all of a fast one, vocabulary and class of another."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{content}\n{special}".encode()).hexdigest()


def _check_report(report: DataReport, sequence_len: int, max_bad_row_fraction: float) -> None:
    if report.num_bad_rows > max_bad_row_fraction * report.rows_read:
        quoted = "; ".join(f"{location}: {reason}" for location, reason in report.bad_rows[:_QUOTED_BAD_ROWS])
        more = "; ..." if report.num_bad_rows > _QUOTED_BAD_ROWS else ""
        raise UserError(
            f"{report.num_bad_rows} of {report.rows_read} rows cannot be used, more than data.max_bad_row_fraction = "
            f"{max_bad_row_fraction:g} allows: {quoted}{more}"
        )
    if report.rows_kept == 0:
        raise UserError(
            f"none of the {report.rows_read} rows is left to train on: {report.too_long} are longer than "
            f"data.sequence_len = {sequence_len}, {report.no_supervised} have no supervised token, "
            f"{report.num_bad_rows} are malformed"
        )


# ----- the cache ------------------------------------------------------------------------------------------------------


def _write_cache(folder: Path, work: _Work, num_proc: int | None) -> None:
    """Everything into a temporary folder, then one rename: `folder` exists only when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            _fill_cache(temporary, work, num_proc)
            _rename_unless_exists(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone by then if all went well
    except OSError as error:  # reading the data raises UserError: this is about the cache
        raise UserError(
            f"the data cache {folder.parent} cannot be written ({error.strerror or error}): set data.cache_dir to a "
            "folder with space"
        ) from None


def _rename_unless_exists(temporary: Path, folder: Path) -> None:
    try:
        temporary.replace(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same content
            raise


def _fill_cache(folder: Path, work: _Work, num_proc: int | None) -> None:
    counts: Counter[str] = Counter()
    bad_rows: list[tuple[str, str]] = []
    lengths: list[tuple[int, int]] = []
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        (folder / "supervised.bin").open("wb") as supervised_file,
        closing(_tokenized(work, num_proc)) as results,  # ends its processes also when a row stops the run
    ):
        for ids, supervised in _kept_rows(results, work, counts, bad_rows):
            tokens_file.write(ids.tobytes())
            supervised_file.write(supervised.tobytes())
            lengths.append((len(ids), int(supervised.sum())))
    table = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    np.save(folder / "lengths.npy", table)
    report = DataReport(
        rows_read=counts["rows_read"],
        rows_kept=len(lengths),
        num_bad_rows=counts["bad"],
        bad_rows=tuple(bad_rows),
        too_long=counts["too_long"],
        truncated=counts["truncated"],
        no_supervised=counts["no_supervised"],
        duplicates=counts["duplicates"],
        tokens=int(table[0].sum()),
        supervised_tokens=int(table[1].sum()),
        max_length=int(table[0].max(initial=0)),
    )
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def _kept_rows(
    results: Iterable[_Result], work: _Work, counts: Counter[str], bad_rows: list[tuple[str, str]]
) -> Iterator[TokenRow]:
    """The rows to train on, in order; `counts` and the first `bad_rows` say what became of the others."""
    seen: set[bytes] = set()
    for location, result in results:
        counts["rows_read"] += 1
        if isinstance(result, BadRow):
            counts["bad"] += 1
            if len(bad_rows) < _REPORTED_BAD_ROWS:
                bad_rows.append((location, str(result)))
            continue
        row = _within_length(location, result, work, counts)
        if row is None:
            continue
        ids, supervised = row
        if not supervised.any():
            counts["no_supervised"] += 1
            continue
        digest = hashlib.blake2b(ids.tobytes() + supervised.tobytes(), digest_size=16).digest()
        if digest in seen:
            counts["duplicates"] += 1
            if work.drop_duplicates:
                continue
        seen.add(digest)
        yield row


def _within_length(location: str, row: TokenRow, work: _Work, counts: Counter[str]) -> TokenRow | None:
    """The row, cut if need be, or None if it is to be dropped."""
    ids, supervised = row
    if len(ids) <= work.sequence_len:
        return row
    if work.excess_length == "error":
        raise UserError(
            f"{location} has {len(ids)} tokens, more than data.sequence_len = {work.sequence_len}: raise it, or set "
            "data.excess_length to drop or truncate"
        )
    if work.excess_length == "drop":
        counts["too_long"] += 1
        return None
    counts["truncated"] += 1
    return ids[: work.sequence_len], supervised[: work.sequence_len]


# ----- tokenising with several processes ------------------------------------------------------------------------------


def _tokenized(work: _Work, num_proc: int | None) -> Generator[_Result]:
    """All rows tokenised, in the order of the files however many processes do it."""
    items: Iterator[_Item] = (
        (location, row, index) for index, spec in enumerate(work.specs) for location, row in read_rows(spec)
    )
    head = list(itertools.islice(items, _SERIAL_ROWS))
    processes = num_proc or min(4, len(os.sched_getaffinity(0)))
    if processes > 1 and len(head) == _SERIAL_ROWS:
        yield from _tokenized_in_pool(itertools.chain(head, items), work, processes)
    else:
        yield from map(work.tokenize, itertools.chain(head, items))


def _tokenized_in_pool(items: Iterator[_Item], work: _Work, processes: int) -> Iterator[_Result]:
    with ExitStack() as stack:
        stack.enter_context(_single_threaded_tokenizers())
        # Forked, not spawned: a spawned worker imports the caller's main module again, which costs seconds of
        # imports and breaks scripts without a __main__ guard.  The workers run no torch and no collective.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(processes, context, _start_worker, (work,))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[list[_Result]]] = deque()
        try:
            while chunk := list(itertools.islice(items, _CHUNK_ROWS)):
                waiting.append(pool.submit(_tokenize_chunk, chunk))
                if len(waiting) > 2 * processes:  # a window, so that memory does not grow with the data set
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise RunFailed(
                "a process that tokenised the data was killed, perhaps for lack of memory: start again with "
                "data.num_proc=1"
            ) from None


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Keeps the tokenizers library from warning about threads that a fork has lost."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_work_of_process: _Work  # of a worker: sent once, not with every chunk


def _start_worker(work: _Work) -> None:
    global _work_of_process
    _work_of_process = work
    # Not the trainer's handlers, which a fork inherits: they only note that a stop was asked for.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for chunks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _tokenize_chunk(chunk: list[_Item]) -> list[_Result]:
    return [_work_of_process.tokenize(item) for item in chunk]


# ----- order ----------------------------------------------------------------------------------------------------------


def split_validation(dataset: TokenDataset, val_set_size: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
    """(train, dev): disjoint, drawn by `seed`, each in the order of the files.

    Args:
        val_set_size: below 1 a fraction of the rows (at least one row), else a number of rows.

    Raises `UserError` where it is no such number or leaves nothing to train on.
    """
    is_fraction = 0 < val_set_size < 1
    if not is_fraction and (val_set_size < 1 or val_set_size != int(val_set_size)):
        raise UserError(f"data.val_set_size is {val_set_size}: give a fraction below 1 or a whole number of rows")
    num_dev = max(1, round(val_set_size * len(dataset))) if is_fraction else int(val_set_size)
    if num_dev >= len(dataset):
        raise UserError(f"data.val_set_size takes {num_dev} of {len(dataset)} rows, which leaves none to train on")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(dataset))
    return dataset.select(np.sort(order[num_dev:])), dataset.select(np.sort(order[:num_dev]))


@functools.lru_cache(maxsize=4)  # every step of an epoch asks for the same permutation
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation that depends on nothing but the arguments."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    order.setflags(write=False)
    return order


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of an epoch, ceil(N / G): the last, smaller one counts."""
    return math.ceil(num_rows / rows_per_step)


def step_rows(num_rows: int, rows_per_step: int, seed: int, step: int) -> list[int]:
    """The rows of an optimizer step, counted from 0 over the whole run.  A step never crosses an epoch; an epoch's
    last step may be smaller."""
    epoch, position = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    return epoch_order(num_rows, seed, epoch)[position * rows_per_step :][:rows_per_step].tolist()


def share(rows: Sequence[int], process_index: int, num_processes: int, micro_batch_size: int) -> list[list[int]]:
    """One process's micro-batches of a step.

    Every row is in exactly one micro-batch of one process, and every process has the same number of micro-batches,
    ⌈rows / (num_processes · micro_batch_size)⌉, because each takes part in the same collectives: where rows run out,
    the last ones are smaller or empty (`collate` makes a batch of zero weight of an empty one).
    """
    micro_batches = [list(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]
    micro_batches += [[]] * (-len(micro_batches) % num_processes)
    return micro_batches[process_index::num_processes]


# ----- batches --------------------------------------------------------------------------------------------------------


def collate(
    rows: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]],
    pad_id: int,
    pad_to: int | None = None,
) -> dict[str, torch.Tensor]:
    """A padded batch: `input_ids` and `labels`, both (B, T) int64.

    Labels are the ids where supervised and -100 elsewhere, not shifted.  Padding is on the right and masked by its
    position: where pad_id is eos, the real eos tokens stay supervised.  There is no attention mask: under causal
    attention no token sees the padding to its right, and the padding's own outputs have no label.

    Args:
        pad_to: T, at least the longest row; default the longest row.

    No rows give a 1 × 2 batch without labels, so that a process without rows takes part with zero weight.
    """
    longest = max((len(ids) for ids, _ in rows), default=2)
    width = longest if pad_to is None else pad_to
    assert width >= longest, f"a row of {longest} tokens does not fit into {width}"
    input_ids = torch.full((max(len(rows), 1), width), pad_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (ids, supervised) in enumerate(rows):
        row = torch.as_tensor(np.asarray(ids, dtype=np.int64))
        input_ids[i, : len(row)] = row
        labels[i, : len(row)] = row.masked_fill(torch.as_tensor(~np.asarray(supervised, dtype=np.bool_)), IGNORED)
    return {"input_ids": input_ids, "labels": labels}
