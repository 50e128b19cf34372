"""The inputs that a config names, checked before any weight is loaded: model folder, tokenizer, data, output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sora_llm import backbone, base_files, checkpoint, run_files
from sora_llm.artifacts.card import refuse_other_contents
from sora_llm.artifacts.lora_files import LoraFiles, read_lora
from sora_llm.backbone import quiet_libraries
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import packs_flat
from sora_llm.config import Config
from sora_llm.data.batches import collate
from sora_llm.data.dataset import TokenRow
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, check_paths
from sora_llm.data.templates import resolve_template
from sora_llm.errors import UserError
from sora_llm.files import nearest_existing, user_path
from sora_llm.inject import check_init_factors
from sora_llm.prompt_format import prompt_ids
from sora_llm.running.run_folders import is_run, written_since
from sora_llm.running.unpack import adapter_dtype, backbone_spec, dataset_spec, target_modules, target_shapes
from sora_llm.targets import target_linears
from sora_llm.topology import ZERO_STAGES

FOR_LLAMA_CPP = "holds a llama.cpp adapter, which can be written but not read; name the LoRA it was made from"
MODEL_FILES = (base_files.SINGLE, base_files.INDEX, "config.json")


@dataclass(frozen=True)
class Inputs:
    """The inputs that the config names; `skeleton` is the model on the meta device, `chat_template` the one in use."""

    backbone: BackboneSpec
    skeleton: nn.Module
    tokenizer: Any
    tokenizer_files: list[Path]
    chat_template: str
    datasets: list[DatasetSpec]
    val_datasets: list[DatasetSpec]

    @property
    def pad_token_id(self) -> int:
        return backbone.pad_token_id(self.tokenizer, self.skeleton)

    def batch(self, sequences: Sequence[Sequence[TokenRow]], packed: bool = False) -> dict[str, Tensor]:
        """A batch as `collate` makes it; packed sequences are laid out as the model's attention needs them."""
        flat = packed and packs_flat(self.backbone.attn_implementation)
        return collate(sequences, self.pad_token_id, packed=packed, flat=flat)


def check_inputs(config: Config, strategy: str, tokenizer_source: BackboneSpec | None = None) -> Inputs:
    """Check everything the config names, cheap things first; `tokenizer_source` says where the tokenizer is, if it is
    not the base's.

    Raises:
        UserError: unusable files, model folder, tokenizer, template, target modules or lengths.
    """
    for tracker in config.output.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"output.report_to names {tracker}, which is not installed: pip install {tracker}")
    datasets = [dataset_spec(dataset) for dataset in config.data.datasets]
    val_datasets = [dataset_spec(dataset) for dataset in config.data.val_datasets or ()]
    check_paths([*datasets, *val_datasets])
    spec, skeleton = check_backbone(config, strategy)
    if config.model.adapter is not None:
        check_init_factors(start_lora(config).factors, target_shapes(config, skeleton), config.sora.r)
    tokenizer = backbone.load_tokenizer(tokenizer_source or spec)
    template = resolve_template(tokenizer, config.data.chat_template)
    inputs = Inputs(spec, skeleton, tokenizer, base_files.tokenizer_files(spec), template, datasets, val_datasets)
    for prompt in config.evaluation.sample_prompts:
        try:
            prompt_ids(config, tokenizer, template, prompt)
        except BadRow as refused:
            raise UserError(f"evaluation.sample_prompts: {prompt!r} cannot be asked: {refused}") from None
    return inputs


def check_backbone(config: Config, strategy: str, *, needs_files: bool = True) -> tuple[BackboneSpec, nn.Module]:
    """The backbone's description and its skeleton (meta device); unless it `needs_files`, by its config.json alone.

    Raises:
        UserError: unusable model folder, target modules or lengths.
    """
    quiet_libraries()
    spec = backbone_spec(config, strategy)
    if spec.load_in_8bit and strategy == "zero3":
        raise UserError("quantization.load_in_8bit under zero3 gives wrong losses; use zero2, or load_in_4bit")
    if strategy in ZERO_STAGES and adapter_dtype(config) == "bfloat16" and spec.quant_storage in ("float16", "float32"):
        raise UserError(
            f"quantization.bnb_4bit_quant_storage {spec.quant_storage} with sora.dtype bfloat16 under {strategy} would "
            "be cast like a weight; leave it on auto"
        )
    model_config = backbone.load_model_config(spec, needs_files=needs_files)
    backbone.check_sequence_len(model_config, config.data.sequence_len, spec.name_or_path)
    skeleton = backbone.skeleton(model_config, spec)
    if needs_files:
        backbone.check_weights(spec, model_config)
    target_linears(skeleton, target_modules(config))
    return spec, skeleton


def start_lora(config: Config) -> LoraFiles:
    """The saved adapter that the run starts from."""
    assert config.model.adapter is not None
    folder = user_path(config.model.adapter, "model.adapter")
    if not folder.is_dir():
        raise UserError(f"model.adapter: there is no folder {config.model.adapter}; name one that holds a LoRA")
    if not (folder / run_files.ADAPTER_CONFIG).is_file() and (other := _other_than_lora(folder)) is not None:
        raise UserError(f"model.adapter: {config.model.adapter} {other}")
    return read_lora(folder, blank_up_to=config.sora.r)


def _other_than_lora(folder: Path) -> str | None:
    """What a folder without a LoRA contains instead, and what to do; None if that is not known."""
    if (folder / run_files.ADAPTER / run_files.ADAPTER_CONFIG).is_file():
        return f"is a run directory; its LoRA is {folder / run_files.ADAPTER}: name that"
    if is_run(folder):
        return "is a run without an adapter yet; let it finish, or export one of its checkpoints"
    if (folder / checkpoint.STATE).is_file():
        return f"is a checkpoint; make a LoRA of it first: sora-llm export {folder} --out FOLDER"
    if any(folder.glob("*.gguf")):
        return FOR_LLAMA_CPP
    if (folder / "config.json").is_file():
        return "is a whole model; name it as model.name_or_path"
    return None


def check_output(run_dir: Path, resume: str, data_paths: Sequence[str] = ()) -> None:
    """UserError if the run directory cannot be created or written, belongs to something else (an adapter, a model, or
    one of the `data_paths`), or `resume` cannot be followed; leaves nothing behind."""
    try:
        if run_dir.is_symlink() and not run_dir.exists():
            raise UserError(
                f"output.output_dir {run_dir} is a link to {run_dir.readlink()}, which does not exist; create it"
            )
        existing = nearest_existing(run_dir)
        if not existing.is_dir():
            raise UserError(f"output.output_dir {run_dir}: {existing} is a file, not a folder; name another one")
        if existing == run_dir.absolute():
            if not os.access(run_dir, os.W_OK | os.X_OK):
                raise PermissionError(13, "permission denied")
        else:
            with tempfile.TemporaryDirectory(dir=existing):
                pass
    except OSError as error:
        raise UserError(f"output.output_dir {run_dir} cannot be written: {error.strerror}") from None
    if resume == "never" and run_dir.is_dir() and any(path.name != run_files.DATA_REPORT for path in run_dir.iterdir()):
        raise UserError(
            f"output.output_dir {run_dir} is not empty and output.resume is never; name a new folder, or resume: auto"
        )
    _refuse_strange_contents(run_dir, data_paths)
    try:
        refuse_other_contents(run_dir / run_files.ADAPTER, may_have_additions=True)  # at the end it would be too late
    except UserError as error:
        raise UserError(f"output.output_dir: {error}") from None
    if resume not in ("auto", "never") and written_since(run_dir, resume) is None:
        folder = user_path(resume, "output.resume")
        if not folder.is_dir():
            raise UserError(
                f"output.resume: there is no folder {resume} (from {Path.cwd()}); it is auto, never, or the folder of "
                "a checkpoint"
            )
        try:
            checkpoint.check_complete(folder)
        except UserError as error:
            raise UserError(f"output.resume: {error}") from None


def _refuse_strange_contents(run_dir: Path, data_paths: Sequence[str]) -> None:
    """UserError if a run would be mixed with, or could not be written next to, the existing content of `run_dir`."""
    for name in (run_files.ADAPTER_CONFIG, checkpoint.COMPLETE, *MODEL_FILES):
        if (run_dir / name).is_file():
            raise UserError(
                f"output.output_dir {run_dir} holds {name}, so it belongs to an adapter, a checkpoint or a model; give "
                "the run its own folder"
            )
    for path in data_paths:
        if (folder := Path(path).expanduser()).is_dir() and run_dir.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"output.output_dir {run_dir} is inside {path}, all of which is read as data; name a folder outside it"
            )
    for name in run_files.FILES:
        if (run_dir / name).is_dir():
            raise UserError(
                f"output.output_dir {run_dir}: {name} is a folder there, but a run writes a file of that name"
            )
    for name in run_files.FOLDERS:
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise UserError(
                f"output.output_dir {run_dir}: {name} is a file there, but a run writes a folder of that name"
            )
