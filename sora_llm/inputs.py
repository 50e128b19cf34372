"""What a config points to, checked and unpacked before any weight is loaded: model folder, tokenizer, data, output."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from sora_llm import backbone
from sora_llm.activations import sizes_of
from sora_llm.backbone import BackboneSpec
from sora_llm.card import refuse_other_contents
from sora_llm.config import Config, Dataset
from sora_llm.data.batches import collate
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.dataset import TokenDataset, TokenRow
from sora_llm.data.order import EpochOrder, Order, split_validation
from sora_llm.data.prepare import DataReport, default_cache_dir, prepare
from sora_llm.data.show import decoded
from sora_llm.data.sources import BadRow, DatasetSpec, check_paths, read_rows
from sora_llm.data.stream import StreamOrder, WindowTokenizer
from sora_llm.data.templates import DEFAULT_TEMPLATE, resolve_template
from sora_llm.data.tokenize import answer_end, encode_prompt, ends_visibly, served_template
from sora_llm.errors import UserError
from sora_llm.files import nearest_existing, user_path
from sora_llm.generation import Stop
from sora_llm.inject import check_start, target_linears
from sora_llm.lora_files import LoraFiles, read_lora
from sora_llm.pipeline import BatchShape, MemoryEstimate, estimate
from sora_llm.step_time import Work
from sora_llm.topology import ZERO_STAGES, World

DATA_REPORT = "data_report.json"  # `data_report`, which preprocess may leave in the run directory before the run
_HEAD_START_SECONDS = 2.0  # of a machine's first process, so that the one that is seen prepares the data


@dataclass(frozen=True)
class Inputs:
    """What the config points to; `skeleton` is the model on the meta device, `chat_template` the one that is used."""

    backbone: BackboneSpec
    skeleton: nn.Module
    tokenizer: Any
    tokenizer_files: list[Path]
    chat_template: str
    datasets: list[DatasetSpec]
    val_datasets: list[DatasetSpec]

    @property
    def pad_token_id(self) -> int:
        return backbone.pad_token_id(self.tokenizer)

    def batch(self, sequences: Sequence[Sequence[TokenRow]], packed: bool = False) -> dict[str, Tensor]:
        """A batch as `collate` makes it; packed sequences lie as the model's attention needs it."""
        flat = packed and backbone.packs_flat(self.backbone.attn_implementation)
        return collate(sequences, self.pad_token_id, packed=packed, flat=flat)


def check_inputs(config: Config, strategy: str, tokenizer_source: BackboneSpec | None = None) -> Inputs:
    """Look at everything the config names, cheap things first; `tokenizer_source` is where the tokenizer lies, if it is
    not the base's.

    Raises:
        UserError: files, model folder, tokenizer, template, target modules or lengths that cannot work.
    """
    for tracker in config.output.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"output.report_to names {tracker}, which is not installed: pip install {tracker}")
    datasets = [dataset_spec(dataset) for dataset in config.data.datasets]
    val_datasets = [dataset_spec(dataset) for dataset in config.data.val_datasets or ()]
    check_paths([*datasets, *val_datasets])
    spec, skeleton = check_backbone(config, strategy)
    if config.model.adapter is not None:
        check_start(start_lora(config).factors, target_shapes(config, skeleton), config.sora.r)
    tokenizer = backbone.load_tokenizer(tokenizer_source or spec)
    template = resolve_template(tokenizer, config.data.chat_template)
    inputs = Inputs(spec, skeleton, tokenizer, backbone.tokenizer_files(spec), template, datasets, val_datasets)
    for prompt in config.evaluation.sample_prompts:
        try:
            prompt_ids(config, inputs, prompt)
        except BadRow as refused:
            raise UserError(f"evaluation.sample_prompts: {prompt!r} cannot be asked: {refused}") from None
    return inputs


def check_backbone(config: Config, strategy: str) -> tuple[BackboneSpec, nn.Module]:
    """The backbone's description and its skeleton (meta device).

    Raises:
        UserError: model folder, target modules or lengths that cannot work.
    """
    quiet_libraries()
    spec = backbone_spec(config, strategy)
    if spec.load_in_8bit and strategy == "zero3":
        raise UserError("load_in_8bit under zero3 is known to give wrong losses; use zero2, or load_in_4bit")
    if strategy in ZERO_STAGES and adapter_dtype(config) == "bfloat16" and spec.quant_storage in ("float16", "float32"):
        raise UserError(
            f"quantization.bnb_4bit_quant_storage {spec.quant_storage} with sora.dtype bfloat16 under {strategy} would "
            "be cast like a weight; leave it on auto"
        )
    model_config = backbone.load_config(spec)
    backbone.check_sequence_len(model_config, config.data.sequence_len, spec.name_or_path)
    skeleton = backbone.skeleton(model_config, spec)
    target_linears(skeleton, target_modules(config))
    return spec, skeleton


def start_lora(config: Config) -> LoraFiles:
    """The saved adapter that the run starts from."""
    assert config.model.adapter is not None
    folder = user_path(config.model.adapter, "model.adapter")
    if not folder.is_dir():
        raise UserError(f"model.adapter: there is no folder {config.model.adapter}; name one that holds a LoRA")
    return read_lora(folder)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Announcements for the authors of the libraries that we call, not for who runs this one.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|deepspeed|accelerate|peft)\b")
    # DDP's reducer tells (O, 1) with strides (1, O) from the same with (1, 1): the same bytes in the same order.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------- unpacking


def dataset_spec(dataset: Dataset) -> DatasetSpec:
    """One entry of data.datasets as the loader's plain description."""
    return DatasetSpec(
        path=dataset.path,
        type=dataset.type,
        split=dataset.split,
        revision=dataset.revision,
        columns=dataset.columns,
        separator=dataset.separator,
        function=dataset.function,
        weight=dataset.weight,
        streaming=dataset.streaming,
    )


def backbone_spec(config: Config, strategy: str) -> BackboneSpec:
    """The sections model and quantization as the backbone's plain description."""
    model, quantization = config.model, config.quantization
    return BackboneSpec(
        name_or_path=model.name_or_path,
        revision=model.revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        load_in_4bit=quantization.load_in_4bit,
        load_in_8bit=quantization.load_in_8bit,
        quant_type=quantization.bnb_4bit_quant_type,
        double_quant=quantization.bnb_4bit_use_double_quant,
        compute_dtype=quantization.bnb_4bit_compute_dtype,
        quant_storage=backbone.resolve_quant_storage(
            quantization.bnb_4bit_quant_storage, quantization.bnb_4bit_compute_dtype, strategy
        ),
    )


def adapter_dtype(config: Config) -> str:
    """sora.dtype with `auto` resolved: float32 adapters, cast inside the forward."""
    return "float32" if config.sora.dtype == "auto" else config.sora.dtype


def target_modules(config: Config) -> str | list[str]:
    """sora.target_modules as inject_sora takes them."""
    targets = config.sora.target_modules
    return targets if isinstance(targets, str) else list(targets)


def target_shapes(config: Config, skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """{target module: (I, O)}."""
    linears = target_linears(skeleton, target_modules(config))
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def estimate_memory(
    config: Config, spec: BackboneSpec, skeleton: nn.Module, strategy: str, num_processes: int
) -> MemoryEstimate:
    """Memory per process."""
    return estimate(
        skeleton,
        spec,
        r=config.sora.r,
        target_modules=target_modules(config),
        adapter_bytes_each=2 if adapter_dtype(config) == "bfloat16" else 4,
        strategy=strategy,
        num_processes=num_processes,
        batch=BatchShape(
            config.train.per_device_train_batch_size,
            config.data.sequence_len,
            config.data.sample_packing,
            config.train.gradient_checkpointing,
        ),
    )


def step_work(config: Config, spec: BackboneSpec, skeleton: nn.Module) -> Work | None:
    """A full step of one process before anything is cut, every sequence of `data.sequence_len` tokens.

    None for a model of which `activations.sizes_of` knows no sizes: with experts, a token does not pass every linear.
    """
    if sizes_of(skeleton.config.get_text_config()) is None:  # type: ignore[union-attr, operator]
        return None
    train, whole = config.train, estimate_memory(config, spec, skeleton, "none", 1)
    head = skeleton.get_output_embeddings()  # type: ignore[operator]
    per_micro_batch = train.per_device_train_batch_size * config.data.sequence_len
    return Work(
        tokens=per_micro_batch * train.gradient_accumulation_steps,
        linear_parameters=sum(layer.in_features * layer.out_features for layer in target_linears(skeleton).values()),
        head_parameters=0 if head is None else head.weight.numel(),
        adapter_parameters=whole.trainable_parameters,
        num_layers=skeleton.config.get_text_config().num_hidden_layers,  # type: ignore[union-attr, operator]
        frozen_bytes=whole.weight_bytes,
        adapter_itemsize=2 if adapter_dtype(config) == "bfloat16" else 4,
        checkpointing=train.gradient_checkpointing,
        micro_batches=train.gradient_accumulation_steps,
        sync_every=config.distributed.sync_every,
        is_machine_a_replica=config.distributed.replica == "node",
    )


# ---------------------------------------------------------------------------------------------------------- output


def check_output(run_dir: Path, resume: str) -> None:
    """UserError if the run directory cannot be made or written, or `resume` cannot be followed; leaves nothing."""
    try:
        if run_dir.is_symlink() and not run_dir.exists():
            raise UserError(
                f"output.output_dir {run_dir} is a link to {run_dir.readlink()}, which is not there; make it"
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
    if resume == "never" and run_dir.is_dir() and any(path.name != DATA_REPORT for path in run_dir.iterdir()):
        raise UserError(
            f"output.output_dir {run_dir} is not empty and output.resume is never; name a new folder, or resume: auto"
        )
    try:
        refuse_other_contents(run_dir / "adapter")  # at the end it would be too late
    except UserError as error:
        raise UserError(f"output.output_dir: {error}") from None
    if resume not in ("auto", "never") and not user_path(resume, "output.resume").is_dir():
        raise UserError(
            f"output.resume: there is no folder {resume} (from {Path.cwd()}); it is auto, never, or the folder of a "
            "checkpoint"
        )


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class TrainingData:
    """Train and dev rows as tokens, and what became of the rows of the files.

    `train` and its report are None where rows are streamed, `dev` where there are no dev rows, its report also where
    dev rows were held out.
    """

    train: TokenDataset | None
    dev: TokenDataset | None
    train_report: DataReport | None
    dev_report: DataReport | None

    def fingerprint(self, order: Order) -> dict[str, int | str]:
        """What a checkpoint remembers of the training rows: an order of other rows would be another run.  Of a stream
        it is the present window, the first one before a run has begun."""
        if self.train is None or self.train_report is None:
            assert isinstance(order, StreamOrder)
            return {"digest": order.digest}
        return {"rows": len(self.train), "tokens": self.train.num_tokens, "digest": self.train_report.digest}


def load_data(config: Config, inputs: Inputs, world: World) -> TrainingData:
    """Tokenise, or read the cache.  No collective: processes wait for the one that writes as long as it takes.

    Raises:
        UserError: bad rows, nothing to train on, fewer rows than processes.
    """
    train, report = None, None
    if not config.data.datasets[0].streaming:  # all are streamed or none is
        train, report = prepare_rows(config, inputs, inputs.datasets, world)
    dev, dev_report = None, None
    if inputs.val_datasets:
        dev, dev_report = prepare_rows(config, inputs, inputs.val_datasets, world)
    elif train is not None and config.data.val_set_size is not None:
        train, dev = split_validation(train, config.data.val_set_size, config.train.seed)
    if train is not None:
        _check_sources(config, train)
    if train is not None and len(train) < world.num_processes:
        raise UserError(
            f"data.datasets gives {len(train)} rows to train on, fewer than the {world.num_processes} processes; "
            "launch fewer processes, or add data"
        )
    return TrainingData(train, dev, report, dev_report)


def _check_sources(config: Config, train: TokenDataset) -> None:
    """UserError if a data set of a mixture has no row left once dev rows are held out."""
    for index, dataset in enumerate(config.data.datasets):
        if dataset.weight is not None and not (train.sources == index).any():
            raise UserError(
                f"data.datasets.{index} ({dataset.path}) has a weight but no row of it is left to train on; add rows, "
                "or make data.val_set_size smaller"
            )


def prepare_rows(
    config: Config, inputs: Inputs, specs: Sequence[DatasetSpec], world: World
) -> tuple[TokenDataset, DataReport]:
    """The rows of some data sets with the config's options; a machine's first process goes first."""
    return prepare(
        tokenizing(config, inputs, specs),
        max_bad_row_fraction=config.data.max_bad_row_fraction,
        num_proc=config.data.num_proc,
        cache_dir=config.data.cache_dir,
        wait_first=_HEAD_START_SECONDS if world.local_process_index else 0.0,
    )


def tokenizing(config: Config, inputs: Inputs, specs: Sequence[DatasetSpec]) -> Tokenizing:
    """How rows become tokens."""
    data = config.data
    return Tokenizing(
        tuple(specs),
        inputs.tokenizer,
        inputs.chat_template,
        train_on_inputs=data.train_on_inputs,
        train_on_last_turn_only=data.train_on_last_turn_only,
        sequence_len=data.sequence_len,
        excess_length=data.excess_length,
        drop_duplicates=data.drop_duplicates,
    )


def training_order(config: Config, inputs: Inputs, data: TrainingData, rows_per_step: int) -> Order:
    """Which rows each optimizer step takes.

    Raises:
        UserError: a stream that cannot be read, or whose first rows cannot be used.
    """
    weights = [dataset.weight for dataset in config.data.datasets if dataset.weight is not None]
    mixture = weights or None
    pack_to = config.data.sequence_len if config.data.sample_packing else None
    if data.train is not None:
        return EpochOrder(data.train, rows_per_step, config.train.seed, pack_to, mixture)
    order = StreamOrder(
        [functools.partial(read_rows, spec) for spec in inputs.datasets],
        WindowTokenizer(tokenizing(config, inputs, inputs.datasets), config.data.max_bad_row_fraction),
        rows_per_step,
        config.train.seed,
        pack_to,
        mixture,
    )
    order.sample()  # so that what is wrong with the first window is said now
    return order


def data_report(config: Config, inputs: Inputs, data: TrainingData) -> dict[str, Any]:
    """What the data is made of, for people, as JSON: rows, lengths, masks, losses, some rows decoded."""

    def section(rows: TokenDataset | None, report: DataReport | None) -> dict[str, Any] | None:
        if report is None:
            return None
        whole = TokenDataset.load(Path(report.cache_folder)) if report.cache_folder else rows
        assert whole is not None
        samples = [
            {
                "row": row,
                "tokens": int(whole.lengths[row]),
                "supervised_tokens": int(whole.supervised_lengths[row]),
                "segments": decoded(whole[row], inputs.tokenizer),
            }
            for row in report.samples
        ]
        return report.to_json() | {"samples": samples}

    return {
        "chat_template": _template_name(config, inputs),
        "sequence_len": config.data.sequence_len,
        "sample_packing": config.data.sample_packing,
        "cache": config.data.cache_dir or str(default_cache_dir()),
        "train": section(data.train, data.train_report),
        "dev": section(data.dev, data.dev_report),
        "held_out": None if data.dev is None or data.dev_report else len(data.dev),
    }


def _template_name(config: Config, inputs: Inputs) -> str | None:
    """None where no data set is made of conversations."""
    if all(spec.type in ("completion", "prompt_completion") for spec in (*inputs.datasets, *inputs.val_datasets)):
        return None
    own = "the tokenizer's" if inputs.chat_template == inputs.tokenizer.chat_template else DEFAULT_TEMPLATE
    return config.data.chat_template or own


def describe_data(config: Config, inputs: Inputs, data: TrainingData, order: Order) -> list[str]:
    """The data of a run, a line about each source."""
    if isinstance(order, StreamOrder):
        lines = describe_stream(config, order)
    else:
        assert data.train_report is not None
        packing = f"; packed sequences are {data.train_report.fill_rate:.1%} full" if config.data.sample_packing else ""
        lines = [f"data: {describe(data.train_report)}{packing}"]
        lines += loss_warning(data.train_report.too_long, data.train_report.rows_read, config.data.sequence_len)
        lines += special_warning(data.train_report.special_written, data.train_report.first_special_written)
    if data.dev_report is not None:
        lines.append(f"dev data: {describe(data.dev_report)}")
    elif data.dev is not None:
        lines.append(f"dev data: {len(data.dev)} of these rows are held out")
        lines += repetition_warning(data.train_report)
    if has_conversations(config.data.datasets) and not ends_visibly(inputs.tokenizer, inputs.chat_template):
        lines.append(
            "warning: answers end with text that is no token of this tokenizer's own, so that a client must look for "
            "it to stop; data.chat_template: alpaca, mistral, llama-2 or vicuna end answers with eos"
        )
    return lines


def has_conversations(datasets: Sequence[Dataset]) -> bool:
    """Whether rows of one of them are rendered with a chat template."""
    return any(dataset.type not in ("completion", "prompt_completion") for dataset in datasets)


def describe(report: DataReport) -> str:
    """A data report in one line."""
    parts = [f"{report.rows_kept:,} rows, {report.tokens:,} tokens ({report.supervised_tokens:,} supervised)"]
    left_out = (
        (report.num_bad_rows, "malformed"),
        (report.too_long, "too long"),
        (report.no_supervised, "without an answer"),
        (report.duplicates if report.drop_duplicates else 0, "repeated"),
    )
    parts += [f"left out {count:,} {why}" for count, why in left_out if count]
    if report.truncated:
        parts.append(f"truncated {report.truncated:,}")
    if report.num_bad_rows:
        parts.append(f"the first malformed one is {report.bad_rows[0][0]}: {report.bad_rows[0][1]}")
    return "; ".join(parts)


def describe_stream(config: Config, order: StreamOrder) -> list[str]:
    """What became of the streamed rows so far, a line about each data set."""
    lines = []
    for dataset, counts in zip(config.data.datasets, order.counts, strict=True):
        if not counts.get("rows_read"):
            continue
        names = (("num_bad_rows", "malformed"), ("too_long", "too long"), ("no_supervised", "without an answer"))
        left_out = [f"left out {counts[key]:,} {why}" for key, why in names if counts[key]]
        cut = [f"truncated {counts['truncated']:,}"] if counts["truncated"] else []
        read = f"data: {dataset.path}: {counts['rows_kept']:,} of the {counts['rows_read']:,} rows read so far"
        lines += ["; ".join([read, *left_out, *cut])]
        lines += loss_warning(counts["too_long"], counts["rows_read"], config.data.sequence_len)
        lines += special_warning(counts.get("special_written", 0))  # older checkpoints did not count them
    return lines


def loss_warning(num_too_long: int, num_read: int, sequence_len: int) -> list[str]:
    """A line if more than a twentieth of the rows was left out for its length."""
    if num_too_long <= 0.05 * num_read:
        return []
    return [
        f"warning: {num_too_long / num_read:.0%} of the rows are longer than data.sequence_len {sequence_len} and were "
        "left out; raise it, or set data.excess_length: truncate"
    ]


def repetition_warning(report: DataReport | None) -> list[str]:
    """A line if dev rows were drawn from rows of which some are the same."""
    if report is None or not report.duplicates or report.drop_duplicates:
        return []
    return [
        f"warning: {report.duplicates:,} of the rows are the same as earlier ones, and dev rows are drawn from all, so "
        "that some of them are trained on as well; set data.drop_duplicates: true"
    ]


def special_warning(num_written: int, first: tuple[str, str] | None = None) -> list[str]:
    """A line if special tokens stand in messages; `first`: (location, token)."""
    if not num_written:
        return []
    where = f" (the first is {first[0]} with {first[1]})" if first else ""
    return [
        f"warning: rows with a special token written out in a message: {num_written:,}{where}; the tokenizer takes "
        "it for the token itself, and an end of turn within an answer teaches to stop there: take them out"
    ]


def exported_template(config: Config, tokenizer: Any) -> str | None:
    """The chat template to put beside the adapter: the one that was used, completed with the BOS that training put
    before it, unless the tokenizer has it already."""
    if not has_conversations(config.data.datasets):
        return None
    template = served_template(tokenizer, resolve_template(tokenizer, config.data.chat_template))
    return None if template == tokenizer.chat_template else template


def prompt_ids(config: Config, inputs: Inputs, prompt: str) -> list[int]:
    """A sample prompt as tokens: through the chat template where the first data set is made of conversations."""
    form = prompt_form(config, inputs.tokenizer, inputs.chat_template)
    return encode_prompt(inputs.tokenizer, prompt + form.separator, form.template)


@dataclass(frozen=True)
class PromptForm:
    """How a prompt was written in training: through the chat template (None: as it is), or with a separator behind it;
    and what ends the answer."""

    template: str | None
    separator: str = ""
    stop: Stop = field(default_factory=Stop)


def prompt_form(config: Config, tokenizer: Any, chat_template: str) -> PromptForm:
    """That of the first data set."""
    first = config.data.datasets[0]
    if first.type in ("completion", "prompt_completion"):
        return PromptForm(None, first.separator)
    return templated(tokenizer, chat_template)


def templated(tokenizer: Any, chat_template: str) -> PromptForm:
    """Through a chat template."""
    token, text = answer_end(tokenizer, chat_template)
    return PromptForm(chat_template, stop=Stop(() if token is None else (token,), text))
