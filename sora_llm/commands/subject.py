"""What a command is asked about: a base as it was in training and an adapter on it, from whatever path names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from sora_llm import checkpoint
from sora_llm.backbone import BackboneSpec, dtype_name, load_backbone
from sora_llm.backbone import load_config as load_model_config
from sora_llm.commands.common import ALONE
from sora_llm.commands.sources import checkpoint_config, plain_factors, read_source, shapes_in
from sora_llm.config import Config, load_config
from sora_llm.distributed import make_accelerator
from sora_llm.errors import UserError
from sora_llm.export import load_adapter
from sora_llm.files import user_path
from sora_llm.inject import bare, put_on
from sora_llm.inputs import backbone_spec, quiet_libraries
from sora_llm.lora_files import CONFIG, saved_base, saved_revision


@dataclass(frozen=True)
class Subject:
    """`config` is the run's, None for an adapter that no run here made; `adapter` is the folder of a LoRA or of a
    checkpoint, None where there is none."""

    spec: BackboneSpec
    config: Config | None
    adapter: Path | None


def find_subject(place: str, overrides: Sequence[str] = ()) -> Subject:
    """What `place` names: a run directory, a config (of a run that may have an adapter by now), a checkpoint, or the
    folder of a LoRA; one that lies in a run directory is the run's.  `overrides` are of the config.

    Raises:
        UserError: nothing of that kind.
    """
    path = user_path(place, "the path")
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no {place}; name a run directory, a config, a checkpoint or a LoRA folder")
        return _of_run(path, overrides)
    if (path / "config.yaml").is_file():
        return _of_run(path / "config.yaml", overrides)
    if (path / checkpoint.STATE).is_file():
        if overrides:
            raise UserError(f"{place} is a checkpoint, whose config is its own; leave {overrides[0]} out")
        config = checkpoint_config(path)
        return Subject(backbone_spec(config, "none"), config, path)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{place} is no run directory (config.yaml), checkpoint ({checkpoint.STATE}) or LoRA folder ({CONFIG})"
        )
    run_config = next((c for c in (path.absolute().parent, path.absolute().parent.parent) if _is_run_of(c, path)), None)
    if run_config is not None:
        config = load_config(run_config / "config.yaml", overrides)
        return Subject(backbone_spec(config, "none"), config, path)
    if overrides:
        raise UserError(f"{place} is a LoRA folder without a config to override; leave {overrides[0]} out")
    return Subject(BackboneSpec(saved_base(path), revision=saved_revision(path)), None, path)


def _of_run(config_file: Path, overrides: Sequence[str]) -> Subject:
    """A run by its config: the one in whose directory the file lies, or that will go where it says."""
    config = load_config(config_file, overrides)
    run_dir = config_file.parent
    if not (run_dir / "status.json").is_file() and not (run_dir / "adapter" / CONFIG).is_file():
        run_dir = user_path(config.output.output_dir, "output.output_dir")
    adapter = run_dir / "adapter"
    return Subject(backbone_spec(config, "none"), config, adapter if (adapter / CONFIG).is_file() else None)


def _is_run_of(run_dir: Path, adapter: Path) -> bool:
    """Whether `adapter` is adapter/ or path/<λ>/ of a run directory."""
    inside = adapter.absolute().relative_to(run_dir).parts
    return (run_dir / "config.yaml").is_file() and (
        inside == ("adapter",) or (len(inside) == 2 and inside[0] == "path")
    )


def on_base(subject: Subject, base: str | None, load_in_4bit: bool, trust_remote_code: bool) -> Subject:
    """With another place for the base, and how to load it where no run says so; its config is read and checked.

    Raises:
        UserError: no base is named, or it cannot be used.
    """
    quiet_libraries()
    spec = subject.spec
    if base is not None:
        spec = replace(spec, name_or_path=base, revision=None)
    if not spec.name_or_path:
        raise UserError(f"{subject.adapter} does not say which base it is of; name it with --base MODEL")
    spec = replace(spec, trust_remote_code=trust_remote_code or spec.trust_remote_code)
    if load_in_4bit:
        spec = replace(spec, load_in_4bit=True, load_in_8bit=False)
    model_config = load_model_config(spec)
    if subject.config is None:
        spec = replace(spec, dtype=dtype_name(model_config))
    return replace(subject, spec=spec)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode; within `without_adapter()` it is the base."""

    model: nn.Module
    without_adapter: Callable[[], AbstractContextManager[object]] | None


def load(subject: Subject) -> Loaded:
    """The base with the adapter on it, on this machine's device.

    Raises:
        UserError: weights that cannot be loaded, or an adapter of another base.
    """
    model = load_backbone(subject.spec, make_accelerator("none", ALONE).device).eval()
    if subject.adapter is None:
        return Loaded(model, None)
    if (subject.adapter / CONFIG).is_file():
        adapted = load_adapter(model, subject.adapter)
        return Loaded(adapted, adapted.disable_adapter)
    source = read_source(subject.adapter).on(model)
    factors = plain_factors(source, shapes_in(subject.spec, model, [source]))
    return Loaded(put_on(model, factors).eval(), partial(bare, model))
