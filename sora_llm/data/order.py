"""Which rows an optimizer step takes, and which of them a process takes.

The order is a pure function of the seed, the epoch and the position in it: `EpochOrder.step` gives the rows that a step
takes from the whole data set, `share` the part that a process takes.  So a resumed run continues with the very next
row, even with a different number of processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from sora_llm.data.dataset import TokenDataset, TokenRow
from sora_llm.data.pack import best_fit_decreasing
from sora_llm.errors import UserError

_GROUPED_STEPS = 50  # without packing: steps whose rows are sorted by length together ...
_GROUPS_PER_EPOCH = 4  # ... but at least this many groups per epoch, or small data sets would lose their randomness


@dataclass(frozen=True)
class PackedRows:
    """One sequence of a batch: a row, or several rows packed together; or all rows of an epoch."""

    dataset: TokenDataset
    rows: np.ndarray
    """Row numbers in `dataset`."""

    def read(self) -> list[TokenRow]:
        """Ids and weights of the rows."""
        return [self.dataset[row] for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return int(self.dataset.lengths[self.rows].sum())

    @property
    def num_supervised(self) -> int:
        return int(self.dataset.supervised_lengths[self.rows].sum())

    @property
    def weight(self) -> float:
        """Summed weight of the supervised tokens."""
        return float(self.dataset.weight_sums[self.rows].sum())


@dataclass(frozen=True)
class Arranged:
    """Rows in sequences, in the order in which steps take them: sequence i is `rows[starts[i]:ends[i]]`."""

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, dataset: TokenDataset, start: int, stop: int) -> list[PackedRows]:
        """Sequences `start` to `stop` (at most to the end)."""
        return [
            PackedRows(dataset, self.rows[a:b])
            for a, b in zip(self.starts[start:stop], self.ends[start:stop], strict=True)
        ]


class Order(Protocol):
    """The interface through which training asks for rows."""

    def step(self, step: int) -> list[PackedRows]:
        """The sequences of optimizer step `step`, counted from 0, over all processes."""

    def steps_in(self, epochs: Fraction) -> int:
        """Optimizer steps in that many epochs."""

    def epochs_of(self, steps: int) -> float | None:
        """The number of epochs in the first `steps` optimizer steps; None if the length of an epoch is unknown."""

    def position(self) -> dict[str, Any] | None:
        """What a checkpoint has to store for `seek` to find the step after the last one."""

    def seek(self, position: Mapping[str, Any] | None) -> None:
        """Continue from a `position`."""

    def sample(self) -> TokenDataset:
        """Some rows, or all of them if all are available."""


class EpochOrder:
    """The order of a data set that is available as a whole.

    With packing, the epoch's rows are shuffled among the places that best-fit packing found for rows of their length,
    and the sequences are shuffled.  Without, rows of similar length go together: the shuffled rows are sorted by length
    within groups of many steps, and the steps are shuffled.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        rows_per_step: int,
        seed: int,
        pack_to: int | None = None,
        mixture: Sequence[float] | None = None,
    ) -> None:
        """Args:
        rows_per_step: G; sequences if rows are packed.
        pack_to: tokens of a packed sequence; None: one row each.
        mixture: weight of each data set (`dataset.sources`).  An epoch keeps its number of rows, and each data set gets
            its share; rows repeat only after all others of their data set.  None: every row once.
        """
        self.dataset, self.rows_per_step, self.seed, self.pack_to = dataset, rows_per_step, seed, pack_to
        self._drawn = None if mixture is None else _shares(dataset, mixture)
        self._first_steps = [0]  # of each epoch so far
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def step(self, step: int) -> list[PackedRows]:
        """The sequences of optimizer step `step`, counted from 0 over the whole run.  A step never crosses an epoch; an
        epoch's last step may be smaller."""
        epoch, position = self._locate(step)
        start = position * self.rows_per_step
        return self.epoch(epoch).take(self.dataset, start, start + self.rows_per_step)

    def steps_in(self, epochs: Fraction) -> int:
        """Optimizer steps in that many epochs, rounded up: ceil(N / G) each."""
        whole = int(epochs)
        rest = math.ceil((epochs - whole) * self._steps_of(whole)) if epochs > whole else 0
        return self._first_step(whole) + rest

    def epochs_of(self, steps: int) -> float:
        """The number of epochs in the first `steps` optimizer steps."""
        epoch, position = self._locate(steps)
        return epoch + position / self._steps_of(epoch)

    def rows_of(self, epoch: int) -> PackedRows:
        """All rows of an epoch; those of a mixture may repeat."""
        return PackedRows(self.dataset, self.epoch(epoch).rows)

    @property
    def first_fill_rate(self) -> float | None:
        """Tokens of the first epoch / token capacity of its packed sequences; None without packing."""
        return self.rows_of(0).num_tokens / (len(self.epoch(0)) * self.pack_to) if self.pack_to else None

    def position(self) -> None:
        """None: the order is a pure function of the step."""

    def seek(self, position: Mapping[str, Any] | None) -> None:
        """Nothing to do."""

    def sample(self) -> TokenDataset:
        """All rows."""
        return self.dataset

    def _locate(self, step: int) -> tuple[int, int]:
        if self._is_constant:
            return divmod(step, self._steps_of(0))
        epoch = 0
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self._first_step(epoch)

    @property
    def _is_constant(self) -> bool:
        """Whether every epoch has as many sequences as the first: packing a mixture is a new problem each time."""
        return self._drawn is None or self.pack_to is None

    def _first_step(self, epoch: int) -> int:
        if self._is_constant:
            return epoch * self._steps_of(0) if epoch else 0
        while len(self._first_steps) <= epoch:
            self._first_steps.append(self._first_steps[-1] + self._steps_of(len(self._first_steps) - 1))
        return self._first_steps[epoch]

    def _steps_of(self, epoch: int) -> int:
        return math.ceil(len(self.epoch(0 if self._is_constant else epoch)) / self.rows_per_step)

    def _epoch(self, epoch: int) -> Arranged:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        rows = np.arange(len(self.dataset)) if self._drawn is None else self._draw(epoch)
        return arranged(rows, self.dataset.lengths, self.rows_per_step, self.pack_to, rng)

    def _draw(self, epoch: int) -> np.ndarray:
        """An epoch's rows: from each data set, the next ones of an endless sequence of permutations."""
        assert self._drawn is not None
        drawn = []
        for source, count in enumerate(self._drawn):
            own = np.flatnonzero(self.dataset.sources == source)
            first, last = epoch * count, (epoch + 1) * count
            for turn in range(first // len(own), -(-last // len(own))):
                shuffled = np.random.Generator(np.random.PCG64([self.seed, source, turn])).permutation(own)
                drawn.append(shuffled[max(0, first - turn * len(own)) : last - turn * len(own)])
        return np.concatenate(drawn)


def _shares(dataset: TokenDataset, mixture: Sequence[float]) -> list[int]:
    """Rows of each data set in an epoch: weight / Σ weights of all rows, by largest remainder, at least one."""
    exact = np.array(mixture) / sum(mixture) * len(dataset)
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: len(dataset) - int(counts.sum())]:
        counts[source] += 1
    return [max(1, int(count)) for count in counts]


def arranged(
    rows: np.ndarray, lengths: np.ndarray, rows_per_step: int, pack_to: int | None, rng: np.random.Generator
) -> Arranged:
    """`rows` shuffled, and packed or grouped by length."""
    rows = rows[rng.permutation(len(rows))]
    return (
        grouped_by_length(rows, lengths, rows_per_step, rng) if pack_to is None else packed(rows, lengths, pack_to, rng)
    )


def packed(rows: np.ndarray, lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> Arranged:
    """Shuffled `rows`, best-fit packed into sequences of up to `capacity` tokens; the sequences are shuffled."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]  # rows of equal length stay shuffled
    bins = best_fit_decreasing(lengths[rows], capacity)
    ends = np.cumsum(np.bincount(bins))
    order = rng.permutation(len(ends))
    return Arranged(rows[np.argsort(bins, kind="stable")], np.concatenate([[0], ends[:-1]])[order], ends[order])


def grouped_by_length(rows: np.ndarray, lengths: np.ndarray, rows_per_step: int, rng: np.random.Generator) -> Arranged:
    """Shuffled `rows`, one per sequence, arranged so that a step's rows have similar lengths; the steps are shuffled.

    Rows are sorted only within groups of some steps, so that each epoch combines different ones.  If a data set is too
    small for that, the order is simply shuffled.
    """
    steps_per_group = min(_GROUPED_STEPS, len(rows) // (_GROUPS_PER_EPOCH * rows_per_step))
    if steps_per_group > 1:
        group = steps_per_group * rows_per_step
        groups = (rows[start : start + group] for start in range(0, len(rows), group))
        rows = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in groups])
        full = len(rows) // rows_per_step * rows_per_step  # the smaller step stays last
        steps = rows[:full].reshape(-1, rows_per_step)
        rows = np.concatenate([steps[rng.permutation(len(steps))].reshape(-1), rows[full:]])
    starts = np.arange(len(rows))
    return Arranged(rows, starts, starts + 1)


def share(
    sequences: Sequence[PackedRows], process_index: int, num_processes: int, micro_batch_size: int
) -> list[list[PackedRows]]:
    """One process's micro-batches of a step, with sequences of similar length together.

    Every sequence is in exactly one micro-batch of one process, and every process has the same number of
    micro-batches, ⌈sequences / (num_processes · micro_batch_size)⌉, because all take part in the same collectives: if
    sequences run out, the last ones are smaller or empty (`collate` turns an empty one into a batch of zero weight).
    """
    longest_first = sorted(sequences, key=lambda sequence: -sequence.num_tokens)
    micro_batches = [longest_first[i : i + micro_batch_size] for i in range(0, len(longest_first), micro_batch_size)]
    micro_batches += [[]] * (-len(micro_batches) % num_processes)
    return micro_batches[process_index::num_processes]


def fill_rate(dataset: TokenDataset, capacity: int) -> float:
    """Tokens of all rows / token capacity of their packed sequences."""
    bins = best_fit_decreasing(-np.sort(-dataset.lengths), capacity)
    return float(dataset.num_tokens / ((bins.max(initial=0) + 1) * capacity))


def split_validation(dataset: TokenDataset, val_set_size: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
    """(train, dev): disjoint, drawn by `seed`, each in the order of the files.

    Everything made from one row of a file, such as instances of an instruction or pieces of a text, is on one side, so
    the last file row drawn may add more dev rows than were asked for.

    Args:
        val_set_size: below 1 a fraction of the rows (at least one row), else a number of rows.

    Raises:
        UserError: `val_set_size` is not such a number, or leaves nothing to train on.
    """
    is_fraction = 0 < val_set_size < 1
    if not is_fraction and (val_set_size < 1 or val_set_size != int(val_set_size)):
        raise UserError(f"data.val_set_size is {val_set_size}: give a fraction below 1 or a whole number of rows")
    num_dev = max(1, round(val_set_size * len(dataset))) if is_fraction else int(val_set_size)
    if num_dev >= len(dataset):
        raise UserError(
            f"data.val_set_size takes {num_dev} of the {len(dataset)} rows that are kept, which leaves none to train "
            "on (sora-llm preprocess says what became of the others)"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(dataset))
    _, made_of, sizes = np.unique(dataset.origins, return_inverse=True, return_counts=True)
    _, first = np.unique(made_of[order], return_index=True)
    drawn = made_of[order][np.sort(first)]  # rows of the files, in the order in which the first of each is drawn
    num_drawn = int(np.searchsorted(np.cumsum(sizes[drawn]), num_dev)) + 1
    is_dev = np.isin(made_of, drawn[:num_drawn])
    if is_dev.all():
        raise UserError(
            f"data.val_set_size takes {num_dev} of {len(dataset)} rows, and with those that were made of the same rows "
            "of the files it leaves none to train on"
        )
    return dataset.select(np.flatnonzero(~is_dev)), dataset.select(np.flatnonzero(is_dev))
