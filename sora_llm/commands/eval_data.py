"""The dev rows and the config with which `evaluate` and `export` measure a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from sora_llm import run_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.config import Config, Quantization
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.report import DataReport
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.report_page.reading import read_json
from sora_llm.running.held_out import has_same_split
from sora_llm.running.inputs import Inputs, check_inputs
from sora_llm.running.training_data import is_of_other_rows, load_data, prepare_rows
from sora_llm.terminal import say, warn
from sora_llm.topology import ALONE


def eval_config(config: Config, spec: BackboneSpec) -> Config:
    """A run's config for measuring on the base that `spec` names, without what only training needs and may be gone:
    this includes the training files if dev rows have files of their own."""
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
    """The config section that loads a base as `spec` does."""
    return Quantization(
        load_in_4bit=spec.load_in_4bit,
        load_in_8bit=spec.load_in_8bit,
        bnb_4bit_quant_type=spec.quant_type,  # type: ignore[arg-type]  # valid by its making, as the others
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,  # type: ignore[arg-type]
        bnb_4bit_quant_storage=spec.quant_storage,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class DevRows:
    """Dev rows; `report` is on the files that they come from, None if rows were held out; `missing` counts rows that
    the run held out but the current options drop; `leak_reason` says why the run may have been trained on some of the
    rows, None if it was not."""

    rows: TokenDataset
    report: DataReport | None
    missing: int = 0
    leak_reason: str | None = None

    def warn_of_leak(self) -> None:
        """Warn of a leak; call it if the measured adapter is the run's own, or was trained as it was."""
        if self.leak_reason is not None:
            warn(f"{self.leak_reason}: the adapter may have been trained on rows evaluated here")


def splitting_config(config: Config, trained: Config | None) -> Config:
    """The config by which rows are held out, if any are.  For a run that was `trained` on the data sets that `config`
    names, the rows that it held out are measured, regardless of seed and share: it was trained on the others."""
    if config.data.val_datasets is not None or trained is None or has_same_split(trained, config):
        return config
    keeps_to_its_own = trained.data.datasets == config.data.datasets and trained.data.val_set_size is not None
    return trained if keeps_to_its_own else config


def dev_rows(
    config: Config, inputs: Inputs, trained: Config | None = None, tokenizer: BackboneSpec | None = None
) -> DevRows:
    """The dev rows; the training rows are read only if dev rows are held out from them.

    Args:
        trained: the config of the measured run; its rows are held out as `splitting_config` says.
        tokenizer: where it is stored, if not with the base.

    Raises:
        UserError: bad rows, or none at all.
    """
    run_dir = user_path(config.output.output_dir, "output.output_dir")
    told = read_json(run_dir / run_files.DATA_REPORT)
    if inputs.val_datasets:
        rows, report = prepare_rows(config, inputs, inputs.val_datasets, ALONE)
        is_own = trained is not None and has_same_split(trained, config)
        if is_own and is_of_other_rows(told, config, inputs, report, "dev"):
            warn(f"the rows of data.val_datasets are not those that {run_dir} was evaluated on in training")
        return DevRows(rows, report)
    if config.data.val_set_size is None:
        raise UserError("the config names no dev rows; set data.val_datasets or data.val_set_size, or give --data")
    splitting = splitting_config(config, trained)
    its_inputs = inputs if splitting is config else check_inputs(splitting, "none", tokenizer)
    data = load_data(splitting, its_inputs, ALONE)
    assert data.dev is not None and data.train_report is not None  # rows of a stream cannot be held out
    leak_reason = None
    if trained is not None and not has_same_split(trained, splitting):
        leak_reason = f"{run_dir} did not hold these rows out"
    elif is_of_other_rows(told, splitting, its_inputs, data.train_report):
        leak_reason = (
            f"the rows of data.datasets are not those that {run_dir} was trained on, so different rows are held out"
        )
    if splitting is config:
        return DevRows(data.dev, None, leak_reason=leak_reason)
    if (splitting.train.seed, splitting.data.val_set_size) != (config.train.seed, config.data.val_set_size):
        say(
            f"evaluating the rows that {run_dir} held out; data.val_set_size and train.seed do not change them",
            sys.stderr,
        )
    return replace(_made_anew(data.dev, config, inputs), leak_reason=leak_reason)


def _made_anew(held_out: TokenDataset, config: Config, inputs: Inputs) -> DevRows:
    """The rows that were `held_out` from the training files, prepared again under the options of `config`."""
    whole, _ = prepare_rows(config, inputs, inputs.datasets, ALONE)
    rows = whole.select(np.flatnonzero(np.isin(whole.origins, held_out.origins)))
    if not len(rows):
        raise UserError(f"none of the {len(held_out)} rows that were held out in training is kept under these options")
    return DevRows(rows, None, missing=len(np.setdiff1d(held_out.origins, whole.origins)))
