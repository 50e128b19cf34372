"""Row statistics of the data sets: `DataReport`, stored with the cached tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sora_llm.data.dataset import TokenDataset, damaged
from sora_llm.errors import UserError

REPORTED_BAD_ROWS = 20
_QUOTED_BAD_ROWS = 3
_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows of one data set, or of all."""

    rows_read: int = 0
    """Rows of the files."""
    rows_kept: int = 0
    """Rows to train on; self_instruct and splitting make several from one row of a file."""
    num_bad_rows: int = 0
    """Rows of the files that cannot be used."""
    too_long: int = 0
    """Rows dropped because they exceed sequence_len."""
    truncated: int = 0
    """Rows cut to sequence_len, including those dropped afterwards."""
    split: int = 0
    """Rows of plain text split into several of at most sequence_len."""
    no_supervised: int = 0
    """Rows dropped because none of their tokens would be trained on (after truncation)."""
    duplicates: int = 0
    """Rows with the same tokens and weights as an earlier one of any data set, whether dropped or not."""
    special_written: int = 0
    """Rows with a special token in a message, see `special_tokens_written`, including repeated ones."""
    tokens: int = 0
    """Of the rows to train on."""
    supervised_tokens: int = 0

    @property
    def supervised_fraction(self) -> float:
        """The share of tokens that are trained on."""
        return self.supervised_tokens / max(1, self.tokens)


@dataclass(frozen=True, kw_only=True)
class DatasetReport(Counts):
    """What became of the rows of one data set."""

    path: str
    type: str
    unsupervised: Mapping[str, int] = field(default_factory=dict)
    """Why rows have no supervised token → how many of `no_supervised`."""


@dataclass(frozen=True, kw_only=True)
class DataReport(Counts):
    """What became of the rows of all data sets, and what the rows to train on look like."""

    datasets: tuple[DatasetReport, ...]
    """In the order of the config."""
    sequence_len: int
    excess_length: str
    drop_duplicates: bool
    bad_rows: tuple[tuple[str, str], ...]
    """(location, reason) of the first bad rows."""
    bad_reasons: Mapping[str, int]
    """Reason → bad rows, the most frequent first; numbers in reasons are written as #."""
    first_too_long: tuple[str, int] | None
    """(location, tokens) of the first row that exceeds sequence_len."""
    first_special_written: tuple[str, str] | None
    """(location, token) of the first of `special_written`."""
    max_length: int
    mean_length: float
    median_length: float
    """Tokens of the rows to train on."""
    length_histogram: tuple[tuple[int, int, int], ...]
    """(shortest, longest, rows) of each bin, from the shortest row's to the longest row's."""
    fill_rate: float
    """Tokens / token capacity if the rows are packed into sequences of sequence_len."""
    samples: tuple[int, ...]
    """Row numbers to look at: the first, the middle and the last one."""
    digest: str
    """SHA-256 of the tokens and weights of all rows in order: equal digests mean equal training data."""
    cache_folder: str = field(default="", compare=False)
    from_cache: bool = field(default=False, compare=False)
    """Whether the tokens were already in the cache."""

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, computed figures included."""
        content = asdict(self) | {"supervised_fraction": self.supervised_fraction}
        for written, dataset in zip(content["datasets"], self.datasets, strict=True):
            written["supervised_fraction"] = dataset.supervised_fraction
        return content

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataReport:
        """The report that `to_json` wrote; KeyError or TypeError for any other value."""
        content = {item.name: value[item.name] for item in fields(cls)}
        names = [item.name for item in fields(DatasetReport)]
        too_long, special = content["first_too_long"], content["first_special_written"]
        return cls(
            **content
            | {
                "datasets": tuple(DatasetReport(**{name: one[name] for name in names}) for one in value["datasets"]),
                "bad_rows": tuple((location, reason) for location, reason in value["bad_rows"]),
                "first_too_long": None if too_long is None else (too_long[0], too_long[1]),
                "first_special_written": None if special is None else (special[0], special[1]),
                "length_histogram": tuple((low, high, rows) for low, high, rows in value["length_histogram"]),
                "samples": tuple(value["samples"]),
            }
        )

    def save(self, folder: Path) -> None:
        """Write the report next to the tokens."""
        (folder / _FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, from_cache: bool) -> DataReport:
        """Load what `save` has written; UserError if it is damaged."""
        try:
            report = cls.from_json(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            raise damaged(folder) from None
        return replace(report, cache_folder=str(folder), from_cache=from_cache)


# ----- what stops a run -----------------------------------------------------------------------------------------------


def refuse_unusable(report: DataReport, max_bad_row_fraction: float) -> None:
    """UserError if no run should start: a row is too long and that is an error, more than `max_bad_row_fraction` of the
    rows read are malformed, or a data set has nothing to train on."""
    if report.excess_length == "error" and report.first_too_long is not None:
        raise too_long(*report.first_too_long, report.sequence_len)
    if report.num_bad_rows > max_bad_row_fraction * report.rows_read:
        raise too_many_bad_rows(report.num_bad_rows, report.rows_read, report.bad_rows, max_bad_row_fraction)
    for dataset in report.datasets:
        if dataset.supervised_tokens == 0:
            raise UserError(
                f"data set {dataset.path}: none of the {dataset.rows_read} rows is kept: "
                f"{', '.join(drop_reasons(dataset, report))}"
            )


def too_long(location: str, num_tokens: int, sequence_len: int) -> UserError:
    """The error for a row that is too long when that is an error."""
    return UserError(
        f"{location} has {num_tokens} tokens, more than data.sequence_len = {sequence_len}: raise it, or set "
        "data.excess_length to drop, truncate or, for plain text, split"
    )


def too_many_bad_rows(num_bad: int, num_read: int, bad_rows: Sequence[tuple[str, str]], allowed: float) -> UserError:
    """The error for more malformed rows than allowed."""
    quoted = "; ".join(f"{location}: {reason}" for location, reason in bad_rows[:_QUOTED_BAD_ROWS])
    more = ""
    if num_bad > _QUOTED_BAD_ROWS:
        more = "; ... (sora-llm preprocess CONFIG data.max_bad_row_fraction=1 counts them by reason)"
    return UserError(
        f"{num_bad} of {num_read} rows cannot be used, more than data.max_bad_row_fraction = {allowed:g} allows: "
        f"{quoted}{more}"
    )


def drop_reasons(counts: DatasetReport, report: DataReport) -> Iterator[str]:
    """Why rows of a data set were dropped, a phrase for each reason: "3 are malformed"."""
    if counts.num_bad_rows:
        yield f"{counts.num_bad_rows:,} {_are(counts.num_bad_rows)} malformed"
    if counts.too_long:
        yield f"{counts.too_long:,} {_are(counts.too_long)} longer than data.sequence_len = {report.sequence_len:,}"
    if counts.no_supervised:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in counts.unsupervised.items())
        has = "has" if counts.no_supervised == 1 else "have"
        yield f"{counts.no_supervised:,} {has} no supervised token ({reasons})"
    if counts.duplicates and report.drop_duplicates:
        yield f"{counts.duplicates:,} {_are(counts.duplicates)} the same as earlier ones"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


# ----- what the rows look like ----------------------------------------------------------------------------------------


def count_tokens(rows: TokenDataset, num_datasets: int) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of each data set."""
    tokens = np.bincount(rows.sources, weights=rows.lengths, minlength=num_datasets)
    supervised = np.bincount(rows.sources, weights=rows.supervised_lengths, minlength=num_datasets)
    return [(int(a), int(b)) for a, b in zip(tokens, supervised, strict=True)]


def length_histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(shortest, longest, rows) of bins that end at 2ᵏ and at 1½·2ᵏ, the usual values of sequence_len."""
    if len(lengths) == 0:
        return ()
    ends = np.array([1, *(2**k * f // 2 for k in range(1, 40) for f in (2, 3))])  # 1, 2, 3, 4, 6, 8, 12, 16, ...
    bins = np.searchsorted(ends, lengths)
    counts = np.bincount(bins)
    return tuple(
        (int(ends[i - 1] + 1 if i else 0), int(ends[i]), int(counts[i])) for i in range(bins.min(), len(counts))
    )


def sample_rows(num_rows: int) -> tuple[int, ...]:
    """The first, the middle and the last row, without repeats."""
    return tuple(sorted({0, num_rows // 2, num_rows - 1})) if num_rows else ()
