"""Tokenised rows, memory-mapped: written by preparation and read by training."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sora_llm.errors import UserError

TokenRow = tuple[np.ndarray, np.ndarray]
"""Token ids (int32) and the weight of each as a target (float32): 0 is context, 1 the usual weight of an answer."""


class TokenDataset:
    """Tokenised rows, one after the other in two arrays.  When memory-mapped, reading a row touches only its own
    tokens, and processes on one machine share the memory."""

    def __init__(self, tokens: np.ndarray, weights: np.ndarray, spans: np.ndarray, table: np.ndarray) -> None:
        """Args:
        tokens, weights: of all rows, one after the other (int32, float32).
        spans: (rows, 2), where each row starts and ends in them.
        table: (rows, 4) float64: each row's supervised tokens, their summed weight, the index of its data set, and the
            number of the file row that it was made from, shared by all rows made from it.
        """
        self._tokens, self._weights, self._spans, self._table = tokens, weights, spans, table
        self.lengths: np.ndarray = spans[:, 1] - spans[:, 0]
        self.supervised_lengths: np.ndarray = table[:, 0].astype(np.int64)
        self.weight_sums: np.ndarray = table[:, 1]
        self.sources: np.ndarray = table[:, 2].astype(np.int64)
        self.origins: np.ndarray = table[:, 3].astype(np.int64)

    @classmethod
    def of(cls, rows: Iterable[TokenRow], sources: Sequence[int] | None = None) -> TokenDataset:
        """Rows in memory, each with its own origin, all from data set 0 unless `sources` says otherwise."""
        listed = list(rows)
        ends = np.cumsum([len(ids) for ids, _ in listed], dtype=np.int64)
        lengths = np.diff(ends, prepend=0)
        tokens = np.concatenate([ids for ids, _ in listed]) if listed else np.zeros(0)
        weights = np.concatenate([row_weights for _, row_weights in listed]) if listed else np.zeros(0)
        table = [
            ((row_weights > 0).sum(), row_weights.sum(dtype=np.float64), 0 if sources is None else sources[i], i)
            for i, (_, row_weights) in enumerate(listed)
        ]
        return cls(
            tokens.astype(np.int32),
            weights.astype(np.float32),
            np.stack([ends - lengths, ends], axis=1),
            np.array(table, dtype=np.float64).reshape(-1, 4),
        )

    @classmethod
    def load(cls, folder: Path) -> TokenDataset:
        """Load what a `TokenWriter` has written; UserError if files are missing or truncated."""
        try:
            lengths = np.load(folder / "lengths.npy")
            table = np.load(folder / "table.npy")
            tokens = _mapped(folder / "tokens.bin", np.int32)
            weights = _mapped(folder / "weights.bin", np.float32)
            intact = len(tokens) == len(weights) == lengths.sum() and len(table) == len(lengths)
        except (OSError, ValueError):
            intact = False
        if not intact:
            raise damaged(folder)
        ends = np.cumsum(lengths)
        return cls(tokens, weights, np.stack([ends - lengths, ends], axis=1), table)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> TokenRow:
        start, end = self._spans[row]
        return np.asarray(self._tokens[start:end]), np.asarray(self._weights[start:end])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_lengths.sum())

    def select(self, rows: Sequence[int] | np.ndarray) -> TokenDataset:
        """The given rows in the given order, without copying their tokens."""
        return TokenDataset(self._tokens, self._weights, self._spans[rows], self._table[rows])


class TokenWriter:
    """Writes rows in the format of `TokenDataset.load`, without holding them in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._weights = (folder / "weights.bin").open("wb")
        self._lengths, self._table = array("q"), array("d")  # 40 bytes a row: lists of numbers would take 200

    def extend(
        self, ids: np.ndarray, weights: np.ndarray, lengths: np.ndarray, source: int, origins: np.ndarray
    ) -> None:
        """Append rows of data set `source`, one after the other in `ids` and `weights`, none of them empty; `origins`
        (rows,) are the numbers of the file rows they were made from."""
        if len(lengths) == 0:
            return
        starts = np.cumsum(lengths) - lengths
        supervised = np.add.reduceat(weights > 0, starts, dtype=np.float64)
        weight_sums = np.add.reduceat(weights, starts, dtype=np.float64)
        self._tokens.write(ids.astype(np.int32, copy=False).tobytes())
        self._weights.write(weights.astype(np.float32, copy=False).tobytes())
        self._lengths.frombytes(lengths.astype(np.int64, copy=False).tobytes())
        columns = [supervised, weight_sums, np.full(len(lengths), source), origins]
        self._table.frombytes(np.stack(columns, axis=1, dtype=np.float64).tobytes())

    def close(self) -> None:
        """Finish the files."""
        self._tokens.close()
        self._weights.close()
        np.save(self.folder / "lengths.npy", np.frombuffer(self._lengths, dtype=np.int64))
        np.save(self.folder / "table.npy", np.frombuffer(self._table, dtype=np.float64).reshape(-1, 4))


def _mapped(file: Path, dtype: type) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)  # no empty maps


def damaged(folder: Path) -> UserError:
    """The error for a cache folder that cannot be read."""
    return UserError(f"the cached data in {folder} is damaged: delete this folder and start again")
