"""On which rows `evaluate` and `export` measure a run, and with which base."""

from __future__ import annotations

import sys
from dataclasses import replace

from sora_llm.backbone import BackboneSpec
from sora_llm.config import Config, Quantization
from sora_llm.data.dataset import TokenDataset
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.report_page.reading import read_json
from sora_llm.running.inputs import DATA_REPORT, Inputs
from sora_llm.running.training_data import is_of_other_rows, load_data, prepare_rows
from sora_llm.terminal import say
from sora_llm.topology import ALONE


def measuring(config: Config, spec: BackboneSpec) -> Config:
    """A run's config to measure it by, on the base that `spec` names: what only training needs may be gone, which are
    the training files too where dev rows have files of their own."""
    model = replace(
        config.model,
        name_or_path=spec.name_or_path,
        revision=spec.revision,
        dtype=spec.dtype,  # type: ignore[arg-type]  # one of the dtypes by its making
        trust_remote_code=spec.trust_remote_code,
        adapter=None,
    )
    return replace(
        config,
        model=model,
        quantization=quantization_of(spec),
        data=replace(config.data, datasets=config.data.val_datasets or config.data.datasets),
        output=replace(config.output, report_to=()),
        evaluation=replace(config.evaluation, sample_prompts=()),
    )


def quantization_of(spec: BackboneSpec) -> Quantization:
    """The section of a config that loads a base as `spec` does."""
    return Quantization(
        load_in_4bit=spec.load_in_4bit,
        load_in_8bit=spec.load_in_8bit,
        bnb_4bit_quant_type=spec.quant_type,  # type: ignore[arg-type]  # valid by its making, as the others
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,  # type: ignore[arg-type]
        bnb_4bit_quant_storage=spec.quant_storage,  # type: ignore[arg-type]
    )


def has_dev_rows(config: Config) -> bool:
    """Whether a run set rows aside."""
    return config.data.val_datasets is not None or config.data.val_set_size is not None


def dev_rows(config: Config, inputs: Inputs) -> TokenDataset:
    """The dev rows; the training rows are read only where dev rows are held out of them.

    Raises:
        UserError: bad rows, or none at all.
    """
    if inputs.val_datasets:
        return prepare_rows(config, inputs, inputs.val_datasets, ALONE)[0]
    data = load_data(config, inputs, ALONE)
    if data.dev is None or data.train_report is None:
        raise UserError("the config names no dev rows; set data.val_datasets or data.val_set_size, or give --data")
    report = user_path(config.output.output_dir, "output.output_dir") / DATA_REPORT
    if is_of_other_rows(read_json(report), config, inputs, data.train_report):
        say(
            f"warning: the rows of data.datasets are not those that {report.parent} was trained on, so that other ones "
            "are held out: it may have been trained on some that it is measured on here",
            sys.stderr,
        )
    return data.dev
