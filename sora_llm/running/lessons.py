"""What an adapter was trained on, and whatever it started from: by the configs of runs, and by certificates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.artifacts.lora_files import certificate_in
from sora_llm.config import Config, Dataset, load_config
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.prompt_form import names_template_file
from sora_llm.row_types import FIELDS
from sora_llm.running.inputs import run_of_adapter, seen_from_here


@dataclass(frozen=True)
class Lesson:
    """What an adapter was trained on at one time: by a run of which the `config` is known, or by what a certificate
    claims, whoever wrote it."""

    datasets: Sequence[Dataset]
    config: Config | None = None


def lessons_of(config: Config, folder: Path | None = None, visited: frozenset[Path] = frozenset()) -> Iterator[Lesson]:
    """The lessons of an adapter that was trained under a config and, where a `folder` is given, lies there: its own,
    those of an adapter that was merged into its base and of the one that it started from, as far as they are still
    there, and those that its own certificate claims beside."""
    yield Lesson(config.data.datasets, config)
    yield Lesson(_claims(user_path(config.model.name_or_path, "model.name_or_path")))
    if config.model.adapter is not None:
        yield from lessons_in(user_path(config.model.adapter, "model.adapter"), visited)
    if folder is not None:
        own = config.data.datasets
        others = [claim for claim in _claims(folder) if not any(_is_same(claim, dataset) for dataset in own)]
        yield Lesson(others)


def lessons_in(folder: Path, visited: frozenset[Path] = frozenset()) -> Iterator[Lesson]:
    """The lessons of what lies in a folder, a LoRA or a model with one merged into it.  A LoRA that was trained anew
    may start from what had started from it: folders that are `visited` have none."""
    if folder in visited:
        return
    config = _run_config(folder)
    if config is None:
        yield Lesson(_claims(folder))
    else:
        yield from lessons_of(config, folder, visited | {folder})


def _run_config(folder: Path) -> Config | None:
    """The config of the run whose adapter a folder is, with the chat template that the run kept; None where it is none,
    or was written by another version."""
    run_dir = run_of_adapter(folder)
    if run_dir is None:
        return None
    try:
        config = seen_from_here(load_config(run_dir / run_files.CONFIG), run_dir)
    except UserError:
        return None
    kept = run_dir / run_files.CHAT_TEMPLATE
    if names_template_file(config) and kept.is_file():
        return replace(config, data=replace(config.data, chat_template=str(kept)))
    return config


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
    """Whether a run's certificate means its own data set, which may be seen from another folder by now."""
    rest = replace(own, path=claim.path)
    return _entry(rest) == _entry(claim) and (own.path == claim.path or own.path.endswith(f"/{claim.path}"))


def for_certificate(lessons: Iterable[Lesson]) -> list[Mapping[str, Any]]:
    """Their data sets as a certificate names them, paths as they were written, each once."""
    entries = [_entry(dataset) for lesson in lessons for dataset in lesson.datasets]
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _entry(dataset: Dataset) -> dict[str, str]:
    more = {"split": dataset.split, "separator": dataset.separator}
    return {"path": dataset.path, "type": dataset.type} | {name: value for name, value in more.items() if value}


def taught_separator(lessons: Iterable[Lesson]) -> str | None:
    """What stood behind the prompts of all prompt_completion rows; None where there were none, or several."""
    datasets = [dataset for lesson in lessons for dataset in lesson.datasets]
    found = {dataset.separator for dataset in datasets if dataset.type == "prompt_completion"}
    return found.pop() if len(found) == 1 else None
