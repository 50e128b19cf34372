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
from sora_llm.artifacts.card import TEMPLATE
from sora_llm.artifacts.lora_files import CONFIG, saved_base, saved_revision
from sora_llm.backbone import as_its_files, load_backbone, load_model_config, quiet_libraries
from sora_llm.base_files import has_tokenizer
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.places import Place, find_place
from sora_llm.commands.sources import (
    beside_other_weights,
    certified_spec,
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
from sora_llm.inject import bare, put_on
from sora_llm.peft_check import load_adapter
from sora_llm.running.unpack import backbone_spec


@dataclass(frozen=True)
class Subject:
    """`config` is the run's, None for an adapter that no run here made; `adapter` is the folder of a LoRA or of a
    checkpoint, None where there is none.  `is_whole` says that the base is what was asked about: a model with its
    adapter merged into it, or without any."""

    spec: BackboneSpec
    config: Config | None
    adapter: Path | None
    is_whole: bool = False
    is_loading_known: bool = False
    """Whether `spec` says how the base was loaded: by a run's config, or by the certificate beside an adapter."""
    place: Place | None = None
    """Where it was found; None of a whole model."""

    @property
    def certified(self) -> Path | None:
        """The folder whose certificate tells of it."""
        return self.spec.folder if self.is_whole else self.adapter


def find_subject(path: str, overrides: Sequence[str] = ()) -> Subject:
    """What `path` names, as `find_place`, or a folder with a whole model; `overrides` are of the run's config.

    Raises:
        UserError: nothing of that kind.
    """
    if not overrides and _is_whole_model(folder := user_path(path, "the path")):
        return Subject(BackboneSpec(str(folder)), None, None, is_whole=True)
    place = find_place(path, overrides)
    if place.config is not None:
        spec = backbone_spec(place.config, "none")
        return Subject(spec, place.config, place.adapter, is_loading_known=True, place=place)
    folder = place.with_adapter()
    spec = BackboneSpec(saved_base(folder), revision=saved_revision(folder))
    as_certified = certified_spec(folder, spec)
    return Subject(as_certified or spec, None, folder, is_loading_known=as_certified is not None, place=place)


def _is_whole_model(folder: Path) -> bool:
    """Whether it holds a model of transformers and nothing that `find_place` would look for."""
    ours = (CONFIG, checkpoint.STATE, checkpoint.COMPLETE, run_files.CONFIG)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in ours)


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """--base, --load-in-4bit and --trust-remote-code, as `on_base` takes them."""
    parser.add_argument("--base", metavar="MODEL", help="the base model, if it has moved")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the base (default: as it was trained)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def on_base(subject: Subject, base: str | None, load_in_4bit: bool, trust_remote_code: bool) -> Subject:
    """With another place for the base, and how to load it where no run says so; its config is read and checked.

    Raises:
        UserError: no base is named, or it cannot be used.
    """
    quiet_libraries()
    spec = subject.spec
    if base is not None and subject.is_whole:
        raise UserError(f"{spec.name_or_path} is a whole model without a separate base; leave out --base")
    if base is not None:
        spec = replace(spec, name_or_path=base, revision=None)
    if not spec.name_or_path:
        raise UserError(f"{subject.adapter} does not name its base; name it with --base MODEL")
    spec = replace(spec, trust_remote_code=trust_remote_code or spec.trust_remote_code)
    if not subject.is_loading_known:
        spec = as_its_files(spec)
        if load_in_4bit and spec.load_in_8bit:
            raise UserError(f"--load-in-4bit: the files of {spec.name_or_path} are quantised in 8 bits; leave it out")
    if load_in_4bit:
        spec = replace(spec, load_in_4bit=True, load_in_8bit=False)
    if subject.is_loading_known:
        load_model_config(spec)
    return replace(subject, spec=spec)


def tokenizer_source(subject: Subject) -> BackboneSpec:
    """Where the tokenizer is: the base, but for a LoRA from elsewhere that brings one of its own."""
    folder = subject.adapter
    if subject.config is None and folder is not None and has_tokenizer(folder):
        return replace(subject.spec, name_or_path=str(folder.absolute()), revision=None)
    return subject.spec


def template_beside(subject: Subject) -> str | None:
    """The chat template file that a LoRA from elsewhere brings; None for a run's, whose config says what was used."""
    if subject.config is not None or subject.adapter is None:
        return None
    file = subject.adapter / TEMPLATE
    return str(file) if file.is_file() else None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode; `without_adapter` makes the context in which it is the base, None where it is that."""

    model: nn.Module
    without_adapter: Callable[[], AbstractContextManager[object]] | None

    def as_base(self) -> AbstractContextManager[object]:
        """The context in which the model is the base alone."""
        return contextlib.nullcontext() if self.without_adapter is None else self.without_adapter()


def load(subject: Subject) -> Loaded:
    """The base with the adapter on it, on this machine's device; warns if the base's weights are not those it was
    trained on.

    Raises:
        UserError: weights that cannot be loaded, or an adapter of another base.
    """
    return put_adapter(load_base(subject), subject)


def load_base(subject: Subject) -> nn.Module:
    """The base alone, in eval mode, on this machine's device; UserError for weights that cannot be loaded."""
    return load_backbone(subject.spec, local_device()).eval()


def put_adapter(model: nn.Module, subject: Subject) -> Loaded:
    """The adapter, if there is one, on the base `model`, in place; warns if it was trained on other base weights.

    Raises:
        UserError: an adapter of another base.
    """
    if subject.adapter is None:
        return Loaded(model, None)
    for name in beside_other_weights({str(subject.adapter): recorded_digest(subject.adapter)}, subject.spec):
        warn_of_other_weights(name, subject.spec)
    if (subject.adapter / CONFIG).is_file():
        adapted = load_adapter(model, subject.adapter)
        return Loaded(adapted, adapted.disable_adapter)
    return Loaded(put_on(model, factors_on(model, subject)).eval(), partial(bare, model))


def factors_on(model: nn.Module, subject: Subject) -> PlainFactors:
    """The adapter as plain factors of scale 1 of every target that it has on the base `model`.

    Raises:
        UserError: an adapter of another base.
    """
    assert subject.adapter is not None
    source = read_source(subject.adapter).on(model)
    return plain_factors(source, shapes_in(subject.spec, model, [source]))
