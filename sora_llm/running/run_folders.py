"""Recognises run directories, and resolves the local paths in their configs from the current folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sora_llm import checkpoint, run_files
from sora_llm.config import Config, Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.files import expand_home, user_path


def is_run(folder: Path) -> bool:
    """Whether this is a run directory, which takes more than a config.yaml."""
    marks = (run_files.STATUS, f"{run_files.ADAPTER}/{run_files.CERTIFICATE}")
    return (folder / run_files.CONFIG).is_file() and any((folder / mark).is_file() for mark in marks)


def run_of_adapter(folder: Path) -> Path | None:
    """The run directory whose adapter/ or path/<λ>/ a folder is; None if it is not a LoRA, or not a run's."""
    whole = absolute(folder)
    is_stage = whole.parent.name == run_files.PATH
    run_dir = whole.parent.parent if is_stage else whole.parent
    is_adapter = (is_stage or whole.name == run_files.ADAPTER) and (whole / run_files.ADAPTER_CONFIG).is_file()
    return run_dir if is_adapter and is_run(run_dir) else None


def absolute(folder: Path) -> Path:
    """An absolute path without following links: an adapter may be a link, and belongs to the run that contains it."""
    return Path(os.path.abspath(folder))  # noqa: PTH100


def with_resolved_paths(config: Config, run_dir: Path) -> Config:
    """A run's config in which local paths that do not exist from here, but do from where the run was started, lead
    there.  That place is known if output.output_dir was relative: it is the run directory's path without it, or, where
    a link leads to the run, its real path without it."""
    written = user_path(config.output.output_dir, "output.output_dir")
    wholes = (absolute(run_dir), run_dir.resolve())
    starts = [Path(*whole.parts[: -len(written.parts)]) for whole in wholes]
    starts = [start for start, whole in zip(starts, wholes, strict=True) if start / written == whole]
    if written.is_absolute() or Path.cwd() in starts:
        return config

    def found(path: str) -> str:
        here = expand_home(path)
        places = [] if _leads_somewhere(here) else [str(start / here) for start in starts]
        return next(filter(_leads_somewhere, places), path)

    def those(datasets: Sequence[Dataset]) -> tuple[Dataset, ...]:
        return tuple(replace(dataset, path=found(dataset.path)) for dataset in datasets)

    model, data = config.model, config.data
    adapter = None if model.adapter is None else found(model.adapter)
    template = data.chat_template if data.chat_template in (None, *TEMPLATES) else found(str(data.chat_template))
    dev = None if data.val_datasets is None else those(data.val_datasets)
    return replace(
        config,
        model=replace(model, name_or_path=found(model.name_or_path), adapter=adapter),
        data=replace(data, datasets=those(data.datasets), val_datasets=dev, chat_template=template),
    )


def with_saved_template(config: Config, *files: Path) -> Config:
    """The config with the first existing one of `files` as its chat template: the file that the config names may have
    changed since."""
    kept = next((file for file in files if file.is_file()), None)
    return config if kept is None else replace(config, data=replace(config.data, chat_template=str(kept)))


def _leads_somewhere(path: str) -> bool:
    """Whether a path exists, or matches something as a pattern."""
    return Path(path).exists() or next(glob.iglob(path, recursive=True), None) is not None  # noqa: PTH207 - any pattern


def written_since(run_dir: Path, resume: str) -> Path | None:
    """The newest checkpoint of a run that went back to the checkpoint `resume` and has continued from it, for a
    requeued job, which keeps its arguments.  None if there is none; `resume` may be gone by now."""
    folder, _ = checkpoint.newest(run_dir)
    if folder is None:
        return None
    said = checkpoint.read_state(folder).get("config", {}).get("output", {}).get("resume")
    return folder if said == resume else None
