"""Whether the rows that something is measured on are others than an adapter was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sora_llm.config import Config, Data, Dataset
from sora_llm.data.local_files import is_local, local_files
from sora_llm.errors import UserError


def hold_out_alike(one: Config, other: Config) -> bool:
    """Whether two configs hold out the same dev rows: same rows kept of the same files, and one seed."""
    return (_what_decides(one.data), one.train.seed) == (_what_decides(other.data), other.train.seed)


def _what_decides(data: Data) -> Data:
    """Without the options that change no row."""
    usual = Data()
    return replace(
        data,
        sample_packing=usual.sample_packing,
        max_bad_row_fraction=usual.max_bad_row_fraction,
        num_proc=usual.num_proc,
        cache_dir=usual.cache_dir,
    )


def learned_from(trained: Config, measured: Config) -> str | None:
    """The path of a data set that dev rows of `measured` come from and that an adapter of the config `trained` may have
    seen some of; None where there is none.  Files are compared by their paths, not by what is in them."""
    data = measured.data
    if data.val_datasets is None and (data.val_set_size is None or hold_out_alike(trained, measured)):
        return None
    shared = sharing_rows(data.val_datasets or data.datasets, trained.data.datasets)
    return shared[0].path if shared else None


def sharing_rows(datasets: Sequence[Dataset], others: Sequence[Dataset]) -> list[Dataset]:
    """Those of `datasets` that have a file in common with one of the others, however each names it, or are the same
    split of the hub's."""
    origins = set().union(*map(_origins, others))
    return [dataset for dataset in datasets if _origins(dataset) & origins]


def _origins(dataset: Dataset) -> set[tuple[str, str]]:
    """The files, or the data set of the hub, and the split."""
    split = dataset.split or "train"
    if not is_local(dataset.path):
        return {(dataset.path, split)}
    try:
        return {(str(file.resolve()), split) for file in local_files(dataset.path, dataset.type)}
    except (UserError, OSError):  # an older run's, and not there any more
        return {(dataset.path, split)}
