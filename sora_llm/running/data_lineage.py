"""What an adapter, and any it started from, was trained on: from run configs and certificates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_llm import run_files
from sora_llm.artifacts.lora_files import certificate_in
from sora_llm.config import Config, Dataset, load_config
from sora_llm.errors import UserError
from sora_llm.files import expand_home
from sora_llm.prompt_format import names_template_file
from sora_llm.row_types import FIELDS
from sora_llm.running.run_folders import run_of_adapter, with_resolved_paths, with_saved_template


@dataclass(frozen=True)
class LineageEntry:
    """What an adapter was trained on at one time: by a run of which the `config` is known, or by what a certificate
    claims, whoever wrote it."""

    datasets: Sequence[Dataset]
    config: Config | None = None


def lineage_of(
    config: Config, folder: Path | None = None, visited: frozenset[Path] = frozenset()
) -> list[LineageEntry]:
    """The lessons of an adapter that was trained under a config and, where a `folder` is given, lies there: its own,
    those of an adapter that was merged into its base and of the one that it started from, as far as they are still
    there, and what its own certificate claims beside what is known of them."""
    found = [LineageEntry(config.data.datasets, config), lineage_of_base(config)]
    if config.model.adapter is not None:
        found += lineage_in(Path(expand_home(config.model.adapter)), visited)
    known = [dataset for lesson in found if lesson.config is not None for dataset in lesson.datasets]
    claims = [] if folder is None else _claims(folder)
    return [*found, LineageEntry([claim for claim in claims if not any(_is_same(claim, dataset) for dataset in known)])]


def lineage_of_base(config: Config) -> LineageEntry:
    """What an adapter that was merged into a run's base was trained on."""
    return LineageEntry(_claims(Path(expand_home(config.model.name_or_path))))


def lineage_in(folder: Path, visited: frozenset[Path] = frozenset()) -> list[LineageEntry]:
    """The lessons of what lies in a folder, a LoRA or a model with one merged into it.  A LoRA that was trained anew
    may start from what had started from it: folders that are `visited` have none."""
    if folder in visited:
        return []
    config = _run_config(folder)
    return [LineageEntry(_claims(folder))] if config is None else lineage_of(config, folder, visited | {folder})


def _run_config(folder: Path) -> Config | None:
    """The config of the run whose adapter a folder is, with the chat template that the run kept; None where it is none,
    or was written by another version."""
    run_dir = run_of_adapter(folder)
    if run_dir is None:
        return None
    try:
        config = with_resolved_paths(load_config(run_dir / run_files.CONFIG), run_dir)
    except UserError:
        return None
    return with_saved_template(config, run_dir / run_files.CHAT_TEMPLATE) if names_template_file(config) else config


def _claims(folder: Path) -> list[Dataset]:
    """The data sets that the certificate in a folder names."""
    said = certificate_in(folder).get("data")
    entries = [entry for entry in said if isinstance(entry, dict)] if isinstance(said, list) else []
    return [
        Dataset(path=entry["path"], type=entry["type"], split=entry.get("split"), separator=entry.get("separator", ""))
        for entry in entries
        if isinstance(path := entry.get("path"), str)
        and path.isprintable()
        and isinstance(type_ := entry.get("type"), str)
        and type_ in FIELDS
        and isinstance(entry.get("split"), str | None)
        and isinstance(entry.get("separator", ""), str)
    ]


def _is_same(claim: Dataset, own: Dataset) -> bool:
    """Whether a certificate means a data set of a run, which may be seen from another folder by now."""
    rest, written = replace(own, path=claim.path), os.path.normpath(claim.path)
    return _entry(rest) == _entry(claim) and (own.path == claim.path or own.path.endswith(f"/{written}"))


def lineage_for_certificate(config: Config | None, folder: Path | None = None) -> list[Mapping[str, str]]:
    """What the certificate of an adapter says that it was trained on: what the one in its folder says, if that does,
    else the lessons of a run's config; paths as they were written."""
    if folder is not None and (claims := _claims(folder)):
        return deduplicated([_entry(claim) for claim in claims])
    lessons = lineage_of(config) if config is not None else []
    return deduplicated([_entry(dataset) for lesson in lessons for dataset in lesson.datasets])


def deduplicated(entries: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Each of them once, in their order."""
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _entry(dataset: Dataset) -> dict[str, str]:
    more = {"split": dataset.split, "separator": dataset.separator}
    return {"path": dataset.path, "type": dataset.type} | {name: value for name, value in more.items() if value}


def trained_separator(lessons: Iterable[LineageEntry]) -> str | None:
    """What stood behind the prompts of all prompt_completion rows; None where there were none, or several."""
    datasets = [dataset for lesson in lessons for dataset in lesson.datasets]
    found = {dataset.separator for dataset in datasets if dataset.type == "prompt_completion"}
    return found.pop() if len(found) == 1 else None
