"""The model a command works on: a base loaded as in training, and an adapter on it, from any path."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from sora_llm import checkpoint, run_files
from sora_llm.artifacts.certificate import Certificate
from sora_llm.artifacts.lora_files import check_lora, saved_base, saved_revision
from sora_llm.backbone import load_backbone, load_model_config, quiet_libraries, spec_from_files
from sora_llm.base_files import has_tokenizer
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.path_arguments import ResolvedPath, resolve_path
from sora_llm.commands.sources import (
    beside_other_weights,
    plain_factors,
    read_source,
    recorded_digest,
    shapes_in,
    warn_of_other_weights,
)
from sora_llm.config import Config
from sora_llm.distributed.group import local_device
from sora_llm.errors import UserError
from sora_llm.factors import PlainFactors
from sora_llm.files import user_path
from sora_llm.inject import attach_factors, without_adapters
from sora_llm.peft_check import load_adapter
from sora_llm.running.unpack import backbone_spec


@dataclass(frozen=True)
class ModelRef:
    """A base and an adapter on it.  `config` is the run's, None for an adapter that no run here made; `adapter` is the
    folder of a LoRA or of a checkpoint, None if there is none.  `is_whole_model` says that the base itself was named: a
    model with an adapter merged into it, or without any."""

    spec: BackboneSpec
    config: Config | None
    adapter: Path | None
    is_whole_model: bool = False
    is_loading_known: bool = False
    """Whether `spec` records how the base was loaded: from a run's config, or from the certificate of an adapter."""
    place: ResolvedPath | None = None
    """Where it was found; None for a whole model."""

    @property
    def certificate_folder(self) -> Path | None:
        """The folder whose certificate describes it."""
        return self.spec.folder if self.is_whole_model else self.adapter

    @property
    def certificate(self) -> Certificate:
        """The certificate in that folder, empty if there is none; UserError if it is damaged."""
        folder = self.certificate_folder
        return Certificate() if folder is None else Certificate.read(folder)


def resolve_model(path: str, overrides: Sequence[str] = ()) -> ModelRef:
    """The model that `path` names, as in `resolve_path` or as a folder with a whole model; `overrides` are of the run's
    config.

    Raises:
        UserError: nothing of that kind.
    """
    if not overrides and _is_whole_model(folder := user_path(path, "the path")):
        return ModelRef(BackboneSpec(str(folder)), None, None, is_whole_model=True)
    place = resolve_path(path, overrides)
    if place.config is not None:
        spec = backbone_spec(place.config, "none")
        return ModelRef(spec, place.config, place.adapter, is_loading_known=True, place=place)
    folder = place.with_adapter()
    spec = BackboneSpec(saved_base(folder), revision=saved_revision(folder))
    as_certified = spec.loaded_as(Certificate.read(folder).base_loading)
    return ModelRef(as_certified or spec, None, folder, is_loading_known=as_certified is not None, place=place)


def _is_whole_model(folder: Path) -> bool:
    """Whether a folder holds a transformers model and nothing that `resolve_path` would look for."""
    ours = (run_files.ADAPTER_CONFIG, checkpoint.STATE, checkpoint.COMPLETE, run_files.CONFIG)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in ours)


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --base, --load-in-4bit and --trust-remote-code, as `with_base_options` takes them."""
    parser.add_argument("--base", metavar="MODEL", help="the base model, if it has moved")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the base (default: as it was trained)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def with_base_options(ref: ModelRef, base: str | None, load_in_4bit: bool, trust_remote_code: bool) -> ModelRef:
    """`ref` with another place for the base, and how to load it if no run says so; its config is read and checked.

    Raises:
        UserError: no base is named, or it cannot be used.
    """
    quiet_libraries()
    spec = ref.spec
    if base is not None and ref.is_whole_model:
        raise UserError(f"{spec.name_or_path} is a whole model without a separate base; leave out --base")
    if base is not None:
        spec = replace(spec, name_or_path=base, revision=None)
    if not spec.name_or_path:
        raise UserError(f"{ref.adapter} does not name its base; name it with --base MODEL")
    spec = replace(spec, trust_remote_code=trust_remote_code or spec.trust_remote_code)
    if not ref.is_loading_known:
        spec = spec_from_files(spec)
        if load_in_4bit and spec.load_in_8bit:
            raise UserError(f"--load-in-4bit: the files of {spec.name_or_path} are quantised in 8 bits; leave it out")
    if load_in_4bit:
        spec = replace(spec, load_in_4bit=True, load_in_8bit=False)
    if ref.is_loading_known:
        load_model_config(spec)
    return replace(ref, spec=spec)


def tokenizer_source(ref: ModelRef) -> BackboneSpec:
    """Where the tokenizer is: with the base, except for a LoRA from elsewhere that brings its own."""
    folder = ref.adapter
    if ref.config is None and folder is not None and has_tokenizer(folder):
        return replace(ref.spec, name_or_path=str(folder.absolute()), revision=None)
    return ref.spec


def adapter_template(ref: ModelRef) -> str | None:
    """The chat template file that a LoRA from elsewhere brings; None for a run's, whose config names the template."""
    if ref.config is not None or ref.adapter is None:
        return None
    file = ref.adapter / run_files.CHAT_TEMPLATE
    return str(file) if file.is_file() else None


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode; `without_adapter` makes a context in which it is the base, None if it has no adapter."""

    model: nn.Module
    without_adapter: Callable[[], AbstractContextManager[object]] | None

    def as_base(self) -> AbstractContextManager[object]:
        """A context in which the model is the base alone."""
        return contextlib.nullcontext() if self.without_adapter is None else self.without_adapter()


def load(ref: ModelRef) -> LoadedModel:
    """The base with the adapter on it, on this machine's device; warns if the base's weights are not those it was
    trained on.

    Raises:
        UserError: weights that cannot be loaded, or an adapter that is damaged or for another base.
    """
    is_lora = ref.adapter is not None and (ref.adapter / run_files.ADAPTER_CONFIG).is_file()
    if ref.adapter is not None and is_lora:
        check_lora(ref.adapter)
    model = load_base(ref)
    if ref.adapter is None:
        return LoadedModel(model, None)
    if is_lora:
        adapted = load_adapter(model, ref.adapter)
        return LoadedModel(adapted, adapted.disable_adapter)
    return LoadedModel(attach_factors(model, factors_on(model, ref)).eval(), partial(without_adapters, model))


def load_base(ref: ModelRef) -> nn.Module:
    """The base alone, in eval mode, on this machine's device; warns if its weights are not those that the adapter of
    `ref` was trained on.

    Raises:
        UserError: weights that cannot be loaded.
    """
    model = load_backbone(ref.spec, local_device()).eval()
    if ref.adapter is not None:
        for name in beside_other_weights({str(ref.adapter): recorded_digest(ref.adapter)}, ref.spec):
            warn_of_other_weights(name, ref.spec)
    return model


def factors_on(model: nn.Module, ref: ModelRef) -> PlainFactors:
    """The adapter as plain factors of scale 1 for every target that it has on the base `model`.

    Raises:
        UserError: an adapter for another base.
    """
    assert ref.adapter is not None
    source = read_source(ref.adapter).on(model)
    return plain_factors(source, shapes_in(ref.spec, model, [source]))
