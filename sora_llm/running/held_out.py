"""Whether an adapter may have been trained on the rows it is evaluated on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from sora_llm.config import CHANGES_NO_ROW, Config, Data, Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.local_files import is_local, local_files
from sora_llm.errors import UserError
from sora_llm.files import expand_home
from sora_llm.running.data_lineage import LineageEntry


def has_same_split(one: Config, other: Config) -> bool:
    """Whether two configs hold out the same dev rows: the same rows kept from the same files, and the same seed."""
    return (_what_decides(one.data), one.train.seed) == (_what_decides(other.data), other.train.seed)


def _what_decides(data: Data) -> Data:
    """`data` without the options that change no row, and with a chat template file replaced by its text."""
    usual, template = {name: getattr(Data(), name) for name in CHANGES_NO_ROW}, data.chat_template
    if template is not None and template not in TEMPLATES:
        with suppress(OSError, UnicodeDecodeError):  # an older run's file, which no longer exists
            template = Path(expand_home(template)).read_text(encoding="utf-8")
    datasets = tuple(replace(dataset, weight=None) for dataset in data.datasets)
    return replace(data, chat_template=template, datasets=datasets, **usual)


def seen_dataset(lineage: Iterable[LineageEntry], measured: Config) -> str | None:
    """The path of a data set that supplies dev rows of `measured` and that an adapter may have seen in training; None
    if there is none.  Files are compared by path, not by content."""
    data = measured.data
    if not data.has_dev_rows:
        return None
    datasets = data.val_datasets or data.datasets
    for entry in lineage:
        if entry.config is None:
            shared = [one for one in datasets if any(_may_mean(claim, one) for claim in entry.datasets)]
        elif data.val_datasets is None and has_same_split(entry.config, measured):
            shared = []
        else:
            shared = sharing_rows(datasets, entry.datasets)
        if shared:
            return shared[0].path
    return None


def sharing_rows(datasets: Sequence[Dataset], others: Sequence[Dataset]) -> list[Dataset]:
    """Those of `datasets` that share a file with one of the others, however each names it, or are the same split of
    the same data set on the hub."""
    origins = set().union(*map(_origins, others))
    return [dataset for dataset in datasets if _origins(dataset) & origins]


def _origins(dataset: Dataset) -> set[tuple[str, str]]:
    """The files, or the data set on the hub with its configuration, each with the split."""
    split = dataset.split or "train"
    if not is_local(dataset.path):
        return {(f"{dataset.path} {dataset.name or ''}".rstrip(), split)}
    try:
        return {(str(file.resolve()), split) for file in local_files(dataset.path, dataset.type)}
    except (UserError, OSError):  # an older run's, which no longer exists
        return {(dataset.path, split)}


def _may_mean(claim: Dataset, dataset: Dataset) -> bool:
    """Whether a certificate's claim names a file of a data set, the folder that it is in, or a pattern that it
    matches.  Claims are not trusted: they never cause a folder to be listed or a pattern to be expanded."""
    if (claim.split or "train") != (dataset.split or "train"):
        return False
    if None not in (claim.name, dataset.name) and claim.name != dataset.name:
        return False
    if claim.path == dataset.path or not is_local(dataset.path):
        return claim.path == dataset.path
    named = os.path.realpath(expand_home(claim.path))
    files = [file for file, _ in _origins(dataset)]
    return any(file == named or file.startswith(f"{named}/") or fnmatchcase(file, named) for file in files)
