"""The data that an adapter, and any adapter it started from, was trained on, from run configs and certificates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_llm import run_files
from sora_llm.artifacts.certificate import Certificate
from sora_llm.config import Config, Dataset, load_config
from sora_llm.errors import UserError
from sora_llm.files import expand_home
from sora_llm.prompt_format import names_template_file
from sora_llm.running.run_folders import run_of_adapter, with_resolved_paths, with_saved_template


@dataclass(frozen=True)
class LineageEntry:
    """The data sets of one training: of a run whose `config` is known, or as claimed by a certificate, which anybody
    may have written."""

    datasets: Sequence[Dataset]
    config: Config | None = None


def lineage_of(
    config: Config, folder: Path | None = None, visited: frozenset[Path] = frozenset()
) -> list[LineageEntry]:
    """The lineage of an adapter that was trained under a config and is stored in `folder`, if given: its own entry,
    those of an adapter merged into its base and of the one it started from, if they still exist, and any further data
    sets that its own certificate claims."""
    found = [LineageEntry(config.data.datasets, config), lineage_of_base(config)]
    if config.model.adapter is not None:
        found += lineage_in(Path(expand_home(config.model.adapter)), visited)
    known = [dataset for entry in found if entry.config is not None for dataset in entry.datasets]
    claims = [] if folder is None else _claims(Certificate.read(folder))
    return [*found, LineageEntry([claim for claim in claims if not any(_is_same(claim, dataset) for dataset in known)])]


def lineage_of_base(config: Config) -> LineageEntry:
    """The data that an adapter merged into a run's base was trained on."""
    return LineageEntry(_claims(Certificate.read(Path(expand_home(config.model.name_or_path)))))


def lineage_in(folder: Path, visited: frozenset[Path] = frozenset()) -> list[LineageEntry]:
    """The lineage of a folder's content: a LoRA, or a model with one merged into it.  A retrained LoRA may start from
    one that once started from it, so `visited` folders yield nothing."""
    if folder in visited:
        return []
    config = _run_config(folder)
    if config is None:
        return [LineageEntry(_claims(Certificate.read(folder)))]
    return lineage_of(config, folder, visited | {folder})


def _run_config(folder: Path) -> Config | None:
    """The config of the run whose adapter is in a folder, with the chat template that the run saved; None if there is
    no such run, or its config was written by another version."""
    run_dir = run_of_adapter(folder)
    if run_dir is None:
        return None
    try:
        config = with_resolved_paths(load_config(run_dir / run_files.CONFIG), run_dir)
    except UserError:
        return None
    return with_saved_template(config, run_dir / run_files.CHAT_TEMPLATE) if names_template_file(config) else config


def _claims(certificate: Certificate) -> list[Dataset]:
    """The data sets that a certificate names."""
    return [
        Dataset(
            path=entry["path"],
            type=entry["type"],
            split=entry.get("split"),
            name=entry.get("name"),
            separator=entry.get("separator", ""),
        )
        for entry in certificate.data
    ]


def _is_same(claim: Dataset, own: Dataset) -> bool:
    """Whether a certificate refers to a data set of a run, whose path may since be relative to another folder."""
    rest, written = replace(own, path=claim.path), os.path.normpath(claim.path)
    return _entry(rest) == _entry(claim) and (own.path == claim.path or own.path.endswith(f"/{written}"))


def lineage_for_certificate(config: Config | None, older: Certificate | None = None) -> list[Mapping[str, str]]:
    """The training data that an adapter's certificate lists: that of an older one that it has, if it lists any, else
    the lineage of a run's config; paths as they were written."""
    if older is not None and (claims := _claims(older)):
        return deduplicated([_entry(claim) for claim in claims])
    lineage = lineage_of(config) if config is not None else []
    return deduplicated([_entry(dataset) for entry in lineage for dataset in entry.datasets])


def deduplicated(entries: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Each entry once, in the original order."""
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _entry(dataset: Dataset) -> dict[str, str]:
    more = {"split": dataset.split, "name": dataset.name, "separator": dataset.separator}
    return {"path": dataset.path, "type": dataset.type} | {key: value for key, value in more.items() if value}


def trained_separator(lineage: Iterable[LineageEntry]) -> str | None:
    """The separator after the prompts of all prompt_completion rows; None if there were none, or several."""
    datasets = [dataset for entry in lineage for dataset in entry.datasets]
    found = {dataset.separator for dataset in datasets if dataset.type == "prompt_completion"}
    return found.pop() if len(found) == 1 else None
