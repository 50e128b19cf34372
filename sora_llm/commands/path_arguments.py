"""Resolving a path given to a command: a run, a checkpoint or a LoRA; all commands use the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_llm import checkpoint, run_files
from sora_llm.config import Config, from_dict, load_config
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.prompt_format import names_template_file
from sora_llm.running.inputs import FOR_LLAMA_CPP
from sora_llm.running.run_folders import (
    absolute,
    is_run,
    run_of_adapter,
    with_resolved_paths,
    with_saved_template,
)


@dataclass(frozen=True)
class ResolvedPath:
    """A run, checkpoint or LoRA; `name` is the path as it was given.

    `adapter` is the folder of a LoRA or of a checkpoint, None if a run has none yet; `config` is the run's, None for an
    adapter that no run here made; `run_dir` is the directory of the run that exported the adapter, None also for a
    checkpoint.
    """

    name: str
    adapter: Path | None
    config: Config | None = None
    run_dir: Path | None = None

    @property
    def is_checkpoint(self) -> bool:
        return self.adapter is not None and not (self.adapter / run_files.ADAPTER_CONFIG).is_file()

    @property
    def stage(self) -> str | None:
        """The name of the stage of a sparsity path whose adapter this is; None for adapter/ and all others."""
        if self.adapter is None or self.run_dir is None or self.adapter.parent == self.run_dir:
            return None
        return self.adapter.name

    def with_adapter(self) -> Path:
        """The adapter's folder; UserError if there is none yet."""
        if self.adapter is None:
            raise UserError(
                f"{self.name} has no adapter yet; run its command again to finish it, or name one of its checkpoints"
            )
        return self.adapter


def resolve_path(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedPath:
    """The run, checkpoint or LoRA that `path` names.

    In this order: a file is the config of a run, which may already have an adapter; a folder with adapter_config.json
    is a LoRA, the run's if it is adapter/ or path/<λ>/ of a run directory; one with state.json is a checkpoint; one
    with config.yaml is a run directory.  `overrides` are of the run's config.

    A config that was found in a folder rather than named does not consent to running a base's own Python code: folders
    may come from elsewhere, and the command line has an option for it.

    Raises:
        UserError: nothing of that kind.
    """
    name, folder = str(path), user_path(str(path), "the path")
    if not folder.exists():
        raise UserError(f"{name} does not exist; name a run directory, a config, a checkpoint or a LoRA folder")
    if not folder.is_dir():
        place = _of_config(name, folder, load_config(folder, overrides))
        is_own_config = place.run_dir == folder.parent and folder.name == run_files.CONFIG
        return _as_trained(place, overrides) if is_own_config else place
    if (folder / run_files.ADAPTER_CONFIG).is_file():
        run_dir = run_of_adapter(folder)
        if run_dir is not None:
            config = _without_consent(load_config(run_dir / run_files.CONFIG, overrides), overrides)
            return _as_trained(ResolvedPath(name, absolute(folder), config, run_dir), overrides)
        if overrides:
            raise UserError(f"{name} is a LoRA folder without a config to override; leave {overrides[0]} out")
        return ResolvedPath(name, folder)
    if (folder / checkpoint.STATE).is_file() or (folder / checkpoint.COMPLETE).is_file():
        if overrides:
            raise UserError(f"{name} is a checkpoint, whose config is its own; leave {overrides[0]} out")
        config, run_dir = _without_consent(_checkpoint_config(folder)), absolute(folder).parent.parent
        if is_run(run_dir):
            config = with_resolved_paths(config, run_dir)
            if names_template_file(config):
                config = with_saved_template(config, run_dir / run_files.CHAT_TEMPLATE)
        return ResolvedPath(name, folder, config)
    if (folder / run_files.CONFIG).is_file():
        config_file = folder / run_files.CONFIG
        place = _of_config(name, config_file, _without_consent(load_config(config_file, overrides), overrides))
        return _as_trained(place, overrides)
    if any(folder.glob("*.gguf")):
        raise UserError(f"{name} {FOR_LLAMA_CPP}")
    raise UserError(
        f"{name} is not a run directory (config.yaml), checkpoint ({checkpoint.STATE}) or LoRA "
        f"({run_files.ADAPTER_CONFIG})"
    )


def _of_config(name: str, file: Path, config: Config) -> ResolvedPath:
    """The run of a config: the one that left the file in its directory, or else the one that writes where it says."""
    run_dir = file.parent
    if file.name != run_files.CONFIG or not is_run(run_dir):
        run_dir = user_path(config.output.output_dir, "output.output_dir")
    adapter = run_dir / run_files.ADAPTER
    return ResolvedPath(name, adapter if (adapter / run_files.ADAPTER_CONFIG).is_file() else None, config, run_dir)


def _as_trained(place: ResolvedPath, overrides: Sequence[str]) -> ResolvedPath:
    """`place` with the run's current directory as its output_dir, and with the chat template that was saved there or,
    by older runs, next to the adapter."""
    run_dir = place.run_dir
    if place.config is None or run_dir is None:
        return place
    config = with_resolved_paths(place.config, run_dir)
    config = replace(config, output=replace(config.output, output_dir=str(run_dir)))
    trained = load_config(run_dir / run_files.CONFIG) if overrides else place.config
    # The template next to the adapter of a run that rendered nothing, if any, is the base's.
    if names_template_file(trained) and not _overrides_key("data.chat_template", overrides):
        beside = [] if place.adapter is None else [place.adapter / run_files.CHAT_TEMPLATE]
        config = with_saved_template(config, run_dir / run_files.CHAT_TEMPLATE, *beside)
    return replace(place, config=config)


def trained_config(place: ResolvedPath) -> Config | None:
    """The config that an adapter of `place` was trained under: its run's own, without a command's overrides or later
    changes to a named file.  None if there is no adapter, or no run here made it.

    Raises:
        UserError: the run's config is from another version.
    """
    if place.run_dir is not None and is_run(place.run_dir):
        return resolve_path(place.run_dir).config
    return None if place.adapter is None else place.config


def _overrides_key(key: str, overrides: Sequence[str]) -> bool:
    return any(text.partition("=")[0] == key for text in overrides)


def _without_consent(config: Config, overrides: Sequence[str] = ()) -> Config:
    if _overrides_key("model.trust_remote_code", overrides):
        return config
    return replace(config, model=replace(config.model, trust_remote_code=False))


def _checkpoint_config(folder: Path) -> Config:
    """The config of the run that saved a checkpoint; UserError if it is incomplete, damaged or from another version."""
    state = checkpoint.read_state(folder)
    return from_dict(state["config"], str(folder / checkpoint.STATE))
