"""The order of streamed data, with a resumable position.

Rows are taken in windows, in the order of the files: a window is tokenised, shuffled and packed by itself, and steps
take its sequences.  Everything is a function of the seed and the position, so every process reads the whole stream and
takes its share of each step (`order.share`).  The next window is made while the last one is trained on: a thread reads
and packs, other processes tokenise, because a thread that does would stop the training thread, call by call.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from sora_llm.data.chunks import RawChunk, TokenChunk, Tokenizing, in_chunks
from sora_llm.data.dataset import TokenDataset, TokenRow
from sora_llm.data.order import PackedRows, arranged
from sora_llm.data.pool import Workers, own_cores
from sora_llm.data.readers import RowOrBad
from sora_llm.data.report import too_long, too_many_bad_rows
from sora_llm.errors import UserError

WINDOW_ROWS = 4096
"""Rows that are shuffled and packed together."""

_MOST_PROCESSES = 2  # used by default, for each process that trains, which keeps a core to itself
_ENOUGH_ROWS = 100  # if none of this many rows is usable, neither is the data set

Item = tuple[str, RowOrBad, int]
"""The location of a row, the row, and the index of its data set."""

RowReader = Callable[[int], Iterator[tuple[str, RowOrBad]]]
"""The rows of a data set with their locations, from row number n on."""

Counts = Mapping[str, int]
"""What became of the rows of a data set so far, in the form of `TokenChunk.counts`."""

Tokenise = Callable[[list[Item], Sequence[Counts]], tuple[Sequence[TokenRow], Sequence[Counts]]]
"""A window's rows and the counts before it → the rows to train on, in order, and the counts after it.  Called in
threads; may raise `UserError`."""


@dataclass(frozen=True)
class Cursor:
    """How far the stream has been read before a window."""

    window: int
    read: tuple[int, ...]
    """Rows read from each data set since its beginning or its last restart."""
    taken: tuple[int, ...]
    """Rows taken from each data set in total."""
    counts: tuple[Counts, ...]
    """For each data set."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cursor:
        """The cursor from its `asdict` form."""
        return cls(value["window"], *(tuple(value[name]) for name in ("read", "taken", "counts")))


@dataclass(frozen=True)
class Window:
    """A window's sequences in order, and where the next window begins."""

    start: Cursor
    end: Cursor
    dataset: TokenDataset
    sequences: list[PackedRows]
    begins_epoch: bool
    digest: str
    rows: _Rows
    """Positioned at `end`."""


class StreamOrder:
    """The order of streamed data sets.

    Without `mixture` they are read one after the other, which is an epoch, and then again; a step never crosses an
    epoch.  With it, rows are drawn so that the share of each data set always stays as close to its weight as possible,
    and a data set that ends starts over; there are no epochs.
    """

    def __init__(
        self,
        sources: Sequence[RowReader],
        tokenise: Tokenise,
        rows_per_step: int,
        seed: int,
        pack_to: int | None = None,
        mixture: Sequence[float] | None = None,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """rows_per_step, pack_to, mixture: as for `EpochOrder`."""
        self._sources, self._tokenise, self._mixture = list(sources), tokenise, mixture
        self._rows_per_step, self._seed, self._pack_to, self._window_rows = rows_per_step, seed, pack_to, window_rows
        self._last: list[PackedRows] = []
        self._next_step = 0
        nothing = (0,) * len(self._sources)
        self._restart(Cursor(0, nothing, nothing, tuple({} for _ in self._sources)), next_step=0)

    def step(self, step: int) -> list[PackedRows]:
        """The sequences of optimizer step `step`.  Steps must be requested in order; the last one may be requested
        again.

        Raises:
            UserError: rows that cannot be read, too many bad ones, none to train on.
        """
        if step == self._next_step - 1:
            return self._last
        assert step == self._next_step, f"step {step} of a stream whose next step is {self._next_step}"
        taken: list[PackedRows] = []
        while len(taken) < self._rows_per_step:
            if self._waiting:
                taken.append(self._waiting.popleft())
                self._offset += 1
            elif self._next_window().begins_epoch and taken:
                break
        self._last, self._next_step = taken, step + 1
        return taken

    def steps_in(self, epochs: Fraction) -> int:
        """UserError: the length of an epoch is unknown, so runs on streamed data are specified in steps."""
        raise UserError("data.datasets are streamed: set train.max_steps, and train.num_train_epochs to null")

    def epochs_of(self, steps: int) -> None:
        """None: the number of rows of a stream is unknown."""

    def position(self) -> dict[str, Any]:
        """Where the next step begins, as values for JSON."""
        assert self._window is not None
        return {
            "step": self._next_step,
            "cursor": asdict(self._window.start),
            "offset": self._offset,
            "digest": self._window.digest,
        }

    def seek(self, position: Mapping[str, Any] | None) -> None:
        """Go to a `position`; UserError if its window now has different rows."""
        assert position is not None
        self._restart(Cursor.from_json(position["cursor"]), position["step"])
        if self._next_window().digest != position["digest"]:
            raise UserError(
                "the streamed data is not what the checkpoint was trained on: restore the files, or name a new "
                "output.output_dir"
            )
        for _ in range(position["offset"]):
            self._waiting.popleft()
        self._offset = position["offset"]

    def sample(self) -> TokenDataset:
        """Rows of the current window."""
        return self._present().dataset

    @property
    def digest(self) -> str:
        """The digest of the current window's rows: equal digests mean equal data, as far as it has been read."""
        return self._present().digest

    @property
    def counts(self) -> tuple[Counts, ...]:
        """What became of the rows of each data set, up to the end of the current window."""
        return self._present().end.counts

    def _present(self) -> Window:
        return self._next_window() if self._window is None else self._window

    # ----- windows ----------------------------------------------------------------------------------------------------

    def _restart(self, cursor: Cursor, next_step: int) -> None:
        self._waiting: deque[PackedRows] = deque()
        self._window: Window | None = None
        self._offset = 0
        self._next_step = next_step
        self._last = []
        rows = _Rows(self._sources, self._mixture, cursor)
        self._coming = self._begin(rows, cursor)

    def _next_window(self) -> Window:
        """Move on to the window built in the background, and start building the one after it."""
        self._window = self._coming.result()
        self._waiting.extend(self._window.sequences)
        self._offset = 0
        self._coming = self._begin(self._window.rows, self._window.end)
        return self._window

    def _begin(self, stream: _Rows, start: Cursor) -> Future[Window]:
        """Build a window in a daemon thread, which does not keep an ending process alive."""
        window: Future[Window] = Future()

        def make() -> None:
            try:
                window.set_result(self._read_window(stream, start))
            except BaseException as error:
                window.set_exception(error)

        threading.Thread(target=make, name="stream", daemon=True).start()
        return window

    def _read_window(self, stream: _Rows, start: Cursor) -> Window:
        """The window that begins at `start`, the position of `stream`."""
        items, begins_epoch = stream.take(self._window_rows)
        kept, counts = self._tokenise(items, start.counts)
        rows = TokenDataset.of(kept)
        if not len(rows) and (len(items) == self._window_rows or not any(start.read)):
            raise UserError(f"none of the {len(items)} streamed rows from {items[0][0]} on is left to train on")
        rng = np.random.Generator(np.random.PCG64([self._seed, start.window]))
        order = arranged(np.arange(len(rows)), rows.lengths, self._rows_per_step, self._pack_to, rng)
        digest = hashlib.sha256(b"".join(part.tobytes() for row in range(len(rows)) for part in rows[row])).hexdigest()
        end = Cursor(start.window + 1, tuple(stream.read), tuple(stream.taken), tuple(counts))
        return Window(start, end, rows, order.take(rows, 0, len(order)), begins_epoch, digest, stream)


class WindowTokenizer:
    """Implements `Tokenise` for data sets, in processes of its own."""

    def __init__(self, work: Tokenizing, max_bad_row_fraction: float, num_proc: int | None) -> None:
        """Args:
        max_bad_row_fraction: of the rows so far; if more are malformed after a window, the run stops.
        num_proc: processes that tokenise; None uses up to 2, and leaves a core to training.
        """
        self._work = work
        self._max_bad_row_fraction = max_bad_row_fraction
        processes = num_proc or max(1, min(_MOST_PROCESSES, own_cores() - 1))
        self._workers: Workers[RawChunk, TokenChunk] = Workers(work.tokenize, processes)

    def close(self) -> None:
        """End the processes."""
        self._workers.close()

    def __call__(self, items: list[Item], before: Sequence[Counts]) -> tuple[list[TokenRow], list[Counts]]:
        """UserError: too many bad rows, a row too long if that is an error, or a data set with nothing to train on."""
        rows: list[TokenRow] = []
        bad_rows: list[tuple[str, str]] = []
        counted = [Counter(so_far) for so_far in before]
        raw = (
            (source, chunk)
            for source in range(len(before))
            for chunk in in_chunks((place, row) for place, row, number in items if number == source)
        )
        with closing(self._workers.map_in_order(raw)) as chunks:
            for chunk in chunks:
                if self._work.excess_length == "error" and chunk.first_too_long is not None:
                    raise too_long(*chunk.first_too_long, self._work.sequence_len)
                counted[chunk.source].update(chunk.counts)
                bad_rows += chunk.bad_rows
                rows += chunk.rows()
        # asdict would turn a Counter, item by item, into one that counts the items.
        counts: list[Counts] = [dict(one) for one in counted]
        self._check(counts, bad_rows)
        return rows, counts

    def _check(self, counts: Sequence[Counts], bad_rows: Sequence[tuple[str, str]]) -> None:
        rows_read, num_bad_rows = (sum(one.get(key, 0) for one in counts) for key in ("rows_read", "num_bad_rows"))
        if num_bad_rows > self._max_bad_row_fraction * rows_read:
            raise too_many_bad_rows(num_bad_rows, rows_read, bad_rows, self._max_bad_row_fraction)
        for spec, one in zip(self._work.specs, counts, strict=True):
            if one.get("rows_read", 0) >= _ENOUGH_ROWS and not one.get("rows_kept", 0):
                raise UserError(
                    f"data set {spec.path}: none of the first {one['rows_read']:,} streamed rows is left to train on: "
                    f"{one['num_bad_rows']:,} malformed, {one['too_long']:,} longer than data.sequence_len = "
                    f"{self._work.sequence_len}, {one['no_supervised']:,} without a supervised token"
                )


class _Rows:
    """The rows of several sources as one stream, from a cursor on."""

    def __init__(self, sources: Sequence[RowReader], mixture: Sequence[float] | None, start: Cursor) -> None:
        self._sources, self._mixture = sources, mixture
        self.read, self.taken = list(start.read), list(start.taken)
        self._open: dict[int, Iterator[tuple[str, RowOrBad]]] = {}
        # For reading one after the other: the last source that was begun.
        self._current = max((source for source, count in enumerate(self.read) if count), default=0)

    def take(self, num_rows: int) -> tuple[list[Item], bool]:
        """The next rows, and whether an epoch begins with them; rows of two epochs are never mixed."""
        items: list[Item] = []
        begins_epoch = not any(self.read)
        while len(items) < num_rows:
            source = self._current if self._mixture is None else self._furthest_behind()
            if source not in self._open:
                self._open[source] = self._sources[source](self.read[source])
            found = next(self._open[source], None)
            if found is not None:
                items.append((*found, source))
                self.read[source] += 1
                self.taken[source] += 1
            elif self._mixture is not None:
                self._begin_again(source)
            elif source + 1 < len(self._sources):
                self._current += 1
            else:
                self._current = 0
                for each in range(len(self._sources)):
                    self._begin_again(each)
                if items:
                    break
                begins_epoch = True
        return items, begins_epoch

    def _begin_again(self, source: int) -> None:
        assert self.read[source], "a source without rows raises an error of its own"
        self.read[source] = 0
        self._open.pop(source, None)

    def _furthest_behind(self) -> int:
        """The source whose share of the rows, counting the next one, would be furthest below its weight."""
        assert self._mixture is not None
        due = (sum(self.taken) + 1) / sum(self._mixture)
        return max(range(len(self.taken)), key=lambda i: (self._mixture[i] * due - self.taken[i], -i))  # type: ignore[index]
