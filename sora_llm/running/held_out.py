"""Whether the rows that something is measured on are others than an adapter was trained on."""

from __future__ import annotations

from dataclasses import replace

from sora_llm.config import Config, Data, Dataset
from sora_llm.files import user_path


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
    seen = {_identity(dataset) for dataset in trained.data.datasets}
    return next((one.path for one in data.val_datasets or data.datasets if _identity(one) in seen), None)


def _identity(dataset: Dataset) -> tuple[str, str | None]:
    path = user_path(dataset.path, "path")
    return str(path.resolve()) if path.exists() else dataset.path, dataset.split
