"""Whether the rows that something is measured on are others than an adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.artifacts.lora_files import certificate_in
from sora_llm.config import Config, Data, Dataset, load_config
from sora_llm.data.local_files import is_local, local_files
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.row_types import FIELDS
from sora_llm.running.inputs import run_of_adapter, seen_from_here


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


@dataclass(frozen=True)
class Lesson:
    """What an adapter was trained on at one time: by a run of which the `config` is known, or by its certificate."""

    datasets: Sequence[Dataset]
    config: Config | None = None


def lessons_of(config: Config) -> Iterator[Lesson]:
    """The lessons of an adapter that was trained under a config: its own, and those of the adapters that it started
    from."""
    yield Lesson(config.data.datasets, config)
    if config.model.adapter is not None:
        yield from lessons_in(user_path(config.model.adapter, "model.adapter"))


def lessons_in(folder: Path) -> Iterator[Lesson]:
    """The lessons of the LoRA in a folder, as far as the run that it lies in tells them, or else its certificate."""
    visited: set[Path] = set()  # a folder that was trained anew may start from what had started from it
    while folder not in visited:
        visited.add(folder)
        config = _run_config(folder)
        if config is None:
            yield Lesson(_certified(folder))
            return
        yield Lesson(config.data.datasets, config)
        if config.model.adapter is None:
            return
        folder = user_path(config.model.adapter, "model.adapter")


def _run_config(folder: Path) -> Config | None:
    """The config of the run whose adapter a folder is; None where it is none, or was written by another version."""
    run_dir = run_of_adapter(folder)
    try:
        return None if run_dir is None else seen_from_here(load_config(run_dir / run_files.CONFIG), run_dir)
    except UserError:
        return None


def _certified(folder: Path) -> list[Dataset]:
    """The data sets that a certificate names."""
    said = certificate_in(folder).get("data")
    entries = [entry for entry in said if isinstance(entry, dict)] if isinstance(said, list) else []
    return [
        Dataset(path=entry["path"], type=entry["type"], split=entry.get("split"), separator=entry.get("separator", ""))
        for entry in entries
        if isinstance(entry.get("path"), str)
        and entry.get("type") in FIELDS
        and isinstance(entry.get("split"), str | None)
        and isinstance(entry.get("separator", ""), str)
    ]


def for_certificate(lessons: Iterator[Lesson]) -> list[Mapping[str, Any]]:
    """Their data sets, as a certificate names them, each once."""
    entries = [_entry(dataset) for lesson in lessons for dataset in lesson.datasets]
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _entry(dataset: Dataset) -> dict[str, str]:
    more = {"split": dataset.split, "separator": dataset.separator}
    return {"path": dataset.path, "type": dataset.type} | {name: value for name, value in more.items() if value}


def taught_separator(lessons: Iterator[Lesson]) -> str | None:
    """What stood behind the prompts of all prompt_completion rows; None where there were none, or several."""
    datasets = [dataset for lesson in lessons for dataset in lesson.datasets]
    found = {dataset.separator for dataset in datasets if dataset.type == "prompt_completion"}
    return found.pop() if len(found) == 1 else None


def learned_from(lessons: Iterator[Lesson], measured: Config) -> str | None:
    """The path of a data set that dev rows of `measured` come from and that an adapter may have seen some of in its
    lessons; None where there is none.  Files are compared by their paths, not by what is in them."""
    data = measured.data
    if data.val_datasets is None and data.val_set_size is None:
        return None
    for lesson in lessons:
        if data.val_datasets is None and lesson.config is not None and hold_out_alike(lesson.config, measured):
            continue
        shared = sharing_rows(data.val_datasets or data.datasets, lesson.datasets)
        if shared:
            return shared[0].path
    return None


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
