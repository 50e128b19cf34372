"""The plan of an evaluation: which model, which rows, and whether the adapter may have been trained on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_llm import backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.eval_data import eval_config, quantization_of, splitting_config
from sora_llm.commands.model_ref import (
    ModelRef,
    adapter_template,
    resolve_model,
    tokenizer_source,
    with_base_options,
)
from sora_llm.commands.path_arguments import trained_config
from sora_llm.commands.sources import base_name, is_one_base
from sora_llm.config import Config, Data, Dataset, Model
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.errors import UserError
from sora_llm.prompt_format import has_conversations, has_unread_line_break, template_is_named
from sora_llm.row_types import FIELDS
from sora_llm.running.data_lineage import LineageEntry, lineage_in, lineage_of, trained_separator
from sora_llm.running.held_out import has_same_split, seen_dataset
from sora_llm.running.inputs import Inputs
from sora_llm.terminal import warn

_OF_DATA = ("type", "column", "function", "separator", "split", "name")
"""Options that describe the data set of --data."""


@dataclass(frozen=True)
class EvalPlan:
    """A model and the rows to measure it on, which `config` names.  `trained` is the config that RUN was trained under,
    None if nothing was trained or none is recorded; `held_out_alike` says that the measured adapter is RUN's own, or
    was trained with the same rows held out.  Rows, template and the location of the `tokenizer` are those of RUN or
    ADAPTER, as in `generate`, even if another adapter is measured."""

    ref: ModelRef
    config: Config
    trained: Config | None
    tokenizer: BackboneSpec
    held_out_alike: bool


def plan_evaluation(arguments: argparse.Namespace) -> EvalPlan:
    """The evaluation that the command line describes.

    Raises:
        UserError: nothing of that kind, an adapter that is not one, or no data set.
    """
    named = ref = resolve_model(arguments.config, arguments.overrides)
    other: ModelRef | None = None
    if arguments.adapter is not None and arguments.no_adapter:
        raise UserError("--adapter and --no-adapter are mutually exclusive; give one of them")
    if arguments.adapter is not None:
        other = other_adapter(arguments, ref)
        ref = replace(ref, adapter=other.adapter)
    elif arguments.no_adapter:
        ref = replace(ref, adapter=None)
    elif ref.adapter is None and not ref.is_whole_model and Path(arguments.config).is_dir():
        raise UserError(
            f"{arguments.config} has no adapter yet: let the run finish, name one of its checkpoints, or evaluate the "
            "base alone with --no-adapter"
        )
    ref = with_base_options(ref, arguments.base, arguments.load_in_4bit, arguments.trust_remote_code)
    named = replace(named, spec=ref.spec)
    config = ref.config or config_for(named)
    if arguments.chat_template is not None:
        config = replace(config, data=replace(config.data, chat_template=arguments.chat_template))
    if arguments.data is not None:
        dataset = other_dataset(arguments, config.data.datasets, certified_separator(named))
        config = replace(config, data=replace(config.data, val_datasets=(dataset,), val_set_size=None))
    elif any(getattr(arguments, option) is not None for option in _OF_DATA):
        raise UserError(
            f"{', '.join(f'--{option}' for option in _OF_DATA)} describe the data set that --data names; name it"
        )
    elif not config.data.datasets:
        raise UserError(f"{arguments.config} is not from a run, so it names no data; give --data FILE --type TYPE")
    measured = config.data.val_datasets or config.data.datasets
    if arguments.chat_template is not None and not has_conversations(measured):
        raise UserError(
            f"--chat-template is for rows that are conversations; rows of type {measured[0].type} are measured without "
            "one; leave it out"
        )
    trained, held_out_alike = trained_as(named), ref.adapter is not None
    splitting = splitting_config(config, trained)
    if other is not None:
        other_trained = trained_as(other)
        warn_of_seen_rows(arguments.adapter, lineage_behind(other, other_trained), splitting)
        if named.is_whole_model:
            warn_of_seen_rows(arguments.config, lineage_behind(named, trained), splitting)
        warn_of_other_form(arguments.adapter, other, named)
        held_out_alike = other_trained is not None and has_same_split(other_trained, splitting)
    elif config.data.val_datasets is not None or trained is None or has_same_split(trained, splitting):
        warn_of_seen_rows(arguments.config, lineage_behind(ref, trained), splitting)
    # else `dev_rows` reports that its rows are not those that were held out
    return EvalPlan(
        ref,
        eval_config(config, ref.spec),
        None if trained is None else eval_config(trained, ref.spec),
        tokenizer_source(named),
        held_out_alike=held_out_alike,
    )


def trained_as(ref: ModelRef) -> Config | None:
    """The config that the adapter of `ref` was trained under; None if none is recorded, or, with a warning, if a run's
    own config cannot be read."""
    if ref.place is None:
        return None
    try:
        return trained_config(ref.place)
    except UserError as error:
        warn(f"{str(error).rstrip('.')} (so it is unknown which rows {ref.place.name} was trained on)")
        return None


def lineage_behind(ref: ModelRef, trained: Config | None) -> list[LineageEntry]:
    """The lineage of the measured adapter, or of the one merged into the model: under `trained`, if that is known."""
    folder = ref.certificate_folder
    if folder is None:
        return []
    return lineage_in(folder) if trained is None else lineage_of(trained, folder)


def warn_of_seen_rows(name: str, lineage: Sequence[LineageEntry], measured: Config) -> None:
    """Warn if `name` may have been trained on rows that the config `measured` names or holds out."""
    if (path := seen_dataset(lineage, measured)) is not None:
        warn(f"{name} was also trained on {path}, so it may have seen rows evaluated here")


def warn_of_other_form(name: str, other: ModelRef, named: ModelRef) -> None:
    """Warn if the adapter `name` was trained on a form of the base that differs from the one it is measured on."""
    if other.is_loading_known and other.spec.form != named.spec.form:
        warn(f"{name} was trained on the base as {other.spec.form}; it is evaluated on it as {named.spec.form}")


def other_adapter(arguments: argparse.Namespace, ref: ModelRef) -> ModelRef:
    """The adapter that --adapter names.

    Raises:
        UserError: nothing there, or an adapter for a base other than RUN's, unless --base says which one to load.
    """
    other = resolve_model(arguments.adapter)
    if other.adapter is None:
        raise UserError(f"--adapter {arguments.adapter} has no adapter yet; name one of its checkpoints")
    said, meant = other.spec, ref.spec
    if arguments.base is None and said.name_or_path and meant.name_or_path and not is_one_base(said, meant):
        raise UserError(
            f"--adapter {arguments.adapter} is for the base {base_name(said)}, {arguments.config} for "
            f"{base_name(meant)}; if these are copies of one model, say which to load with --base MODEL"
        )
    return other


def config_for(ref: ModelRef) -> Config:
    """The config for measuring an adapter from elsewhere: no data yet, rows up to 2048 tokens if the base allows."""
    spec = ref.spec
    positions = backbone.max_positions(backbone.load_model_config(spec))
    return Config(
        model=Model(dtype=spec.dtype),  # type: ignore[arg-type]  # one of the dtypes by its making
        quantization=quantization_of(spec),
        data=Data(
            chat_template=adapter_template(ref),
            sequence_len=min(2048, positions or 2048),
        ),
    )


def refuse_guessed_template(name: str, config: Config, inputs: Inputs) -> None:
    """UserError if rows need a chat template and an adapter that no run here made comes without one."""
    if has_conversations(config.data.val_datasets or ()) and not template_is_named(config, inputs.tokenizer):
        raise UserError(
            f"these rows need a chat template, and {name} comes without one, so its prompt format is unknown; name "
            f"one with --chat-template ({', '.join(TEMPLATES)} or a jinja file)"
        )


def certified_separator(ref: ModelRef) -> str | None:
    """The separator after the prompts of prompt_completion rows that an adapter from elsewhere, or one merged into a
    model, was trained on; None if none is recorded."""
    folder = ref.certificate_folder
    taught = None if folder is None else trained_separator(lineage_in(folder))
    return ref.certificate.separator if taught is None else taught


def other_dataset(arguments: argparse.Namespace, own: Sequence[Dataset], recorded: str | None) -> Dataset:
    """The data set that the command line describes; without --type it has the form of the run's first one.  Its default
    separator is the run's for that type, or the one that the adapter's certificate has `recorded`."""
    if arguments.type is None:
        if not own:
            raise UserError(f"--data {arguments.data}: say what its rows are with --type ({', '.join(FIELDS)})")
        described = replace(own[0], path=arguments.data, revision=None, weight=None, streaming=False)
    else:
        separators = (dataset.separator for dataset in own if dataset.type == arguments.type)
        beside = recorded or "" if arguments.type == "prompt_completion" else ""
        described = Dataset(path=arguments.data, type=arguments.type, separator=next(separators, beside))
    if arguments.separator is not None and described.type != "prompt_completion":
        raise UserError(f"--separator goes with --type prompt_completion only, not {described.type}; leave it out")
    if has_unread_line_break(arguments.separator or ""):
        warn(r"--separator holds a backslash and an n, not a line break; in bash write $'\n'")
    columns: dict[str, str] = {}
    for text in arguments.column or ():
        ours, equals, theirs = text.partition("=")
        if not equals or ours not in FIELDS[described.type]:
            known = ", ".join(FIELDS[described.type]) or "none"
            raise UserError(f"--column {text}: write OURS=THEIRS, ours being of type {described.type}: {known}")
        columns[ours] = theirs
    function = arguments.function or described.function
    if described.type == "custom" and function is None:
        raise UserError("--type custom needs --function module:function, which makes messages of a row")
    if described.type != "custom" and function is not None:
        raise UserError(f"--function goes with --type custom only, not {described.type}; leave it out")
    separator = described.separator if arguments.separator is None else arguments.separator
    columns = columns or described.columns
    return replace(
        described,
        columns=columns,
        function=function,
        separator=separator,
        split=arguments.split,
        name=arguments.name,
    )
