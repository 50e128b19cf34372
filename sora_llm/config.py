"""The config of a run: what can be set, what it may be, and how a YAML file and overrides become a `Config`.

    config = load_config("configs/llama7b.yaml", ["train.max_steps=100", "train.num_train_epochs=null"])

The dataclasses below are the schema: their type hints drive the reading (`Annotated[int, ">= 1"]` is a range,
`Literal` a choice, `| None` says that null is a value of its own; elsewhere null unsets a key, so that its default
holds).  Nothing is corrected in silence: an unknown key, a wrong type or a combination that cannot work is a
`UserError` of a sentence or two that says what was given and where, what is allowed, and what to do.

This is the only file that reads YAML.  `train.py` and the commands unpack the `Config` into plain arguments.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sora_llm.errors import UserError
from sora_llm.row_types import FIELDS

# ------------------------------------------------------------------------------------------------- the schema

Dtype = Literal["bfloat16", "float16", "float32"]
Count = Annotated[int, ">= 1"]


@dataclass(frozen=True)
class Model:
    """The frozen backbone."""

    name_or_path: str = ""  # required: a hub id or a local folder
    revision: str | None = None  # branch, tag or commit on the hub; null: the default branch
    dtype: Dtype = "bfloat16"  # of the weights that are not quantised and the activations; float16: with a loss scale
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    # transformers' names
    trust_remote_code: bool = False  # run Python code that comes with the model: only for authors you trust
    adapter: str | None = None  # folder of a plain LoRA to start from, ours or PEFT's; null: fresh adapters


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes stores the backbone; with neither load_in_4bit nor load_in_8bit it stays in model.dtype."""

    load_in_4bit: bool = True  # QLoRA's form
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # the sixteen numbers that a 4-bit weight can be
    bnb_4bit_use_double_quant: bool = True  # quantise the quantisation constants too (0.4 bit per weight less)
    bnb_4bit_compute_dtype: Dtype = "bfloat16"  # what a 4-bit weight becomes for the matrix product
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    # auto: the compute dtype under zero3 (which shards it), else uint8
    load_in_8bit: bool = False  # LLM.int8 instead of 4 bits; not under zero3, and checkpointing saves less with it


@dataclass(frozen=True)
class Sora:
    """The adapters y = W x + s·B(g ⊙ (A x)), and how their ranks are found."""

    r: Count = 64  # rank of every adapter before pruning
    lora_alpha: Annotated[float, "> 0"] = 16.0  # s = lora_alpha / r
    lora_dropout: Annotated[float, ">= 0", "< 1"] = 0.0  # on the adapter's input
    target_modules: str | tuple[str, ...] = "all-linear"  # all-linear (never the output head), a suffix, or suffixes
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the adapter's parameters; auto: float32
    gate_lr: Literal["auto"] | Annotated[float, "> 0"] = "auto"  # auto: high enough for a gate to reach 0
    threshold: Literal["auto", "adaptive", "decoupled", "proxgen", "constant"] = "auto"
    # auto: adaptive with a budget, decoupled with sparse_lambda
    target_rank: Annotated[float, "> 0"] | None = None
    # budget as the mean kept rank, weighted by layers' sizes, at most r; one of this, target_params and sparse_lambda
    target_params: Count | None = None  # budget as the number of kept adapter parameters
    sparse_lambda: Annotated[float, ">= 0"] | None = None  # strength of the pruning; with decoupled in (0, 1)
    lambda_schedule: Literal["constant", "linear", "log_linear", "exp_linear"] = "constant"  # of a sparsity path
    max_lambda: Annotated[float, "> 0"] | None = None  # end of a sparsity path that starts at sparse_lambda
    lambda_num: Count = 1  # stages of a sparsity path
    retrain: bool = True  # train in every stage of a sparsity path
    dense_ratio: Annotated[float, ">= 0", "< 1"] = 0.1  # share of the steps before pruning begins
    consensus_at: Annotated[float, "> 0", "<= 1"] = 0.4  # share of the steps at which ranks are fixed; 1: at the end
    consensus: Literal["svd", "slots"] = "svd"  # what is kept: singular components of ΔW, or the slots themselves
    min_rank: Annotated[int, ">= 0"] = 0  # ranks that every module keeps; with a budget
    budgets: dict[str, Annotated[float, "> 0"]] = field(default_factory=dict)
    # regex on module names: their own mean rank, beside target_rank or inside target_params


@dataclass(frozen=True)
class Dataset:
    """One source of rows."""

    path: str = ""  # required: a jsonl, json, parquet, arrow, csv or txt file (or .gz), a folder, a glob, or a hub id
    type: Literal["alpaca", "messages", "sharegpt", "completion", "prompt_completion", "self_instruct", "custom"] = (
        "alpaca"  # what its rows are
    )
    function: str | None = None  # custom only: "module:function", a row → messages; it is imported and run
    separator: str = ""  # prompt_completion only: put between prompt and completion, which are tokenised as one text
    streaming: bool = False  # read while training instead of before it; for all data sets or none
    split: str | None = None  # null: train
    revision: str | None = None  # of a hub data set
    weight: Annotated[float, "> 0"] | None = None  # share of the rows in an epoch; null: every row once
    columns: dict[str, str] = field(default_factory=dict)  # our field: the file's column, where they differ


@dataclass(frozen=True)
class Data:
    """What is learned from, and how rows become tokens."""

    datasets: tuple[Dataset, ...] = ()  # required: what is trained on, see below
    val_set_size: Annotated[int, ">= 1"] | Annotated[float, "> 0", "< 1"] | None = None
    # dev rows taken from datasets: below 1 a fraction, else a count (what is made of one row of a file stays together,
    # so that the last one may bring some more); at most one of this and val_datasets
    val_datasets: tuple[Dataset, ...] | None = None  # dev rows of their own
    chat_template: str | None = None  # null: the tokenizer's; or a built-in, or a jinja file
    train_on_inputs: bool = False  # true: the loss covers the prompt too
    train_on_last_turn_only: bool = False  # true: the loss covers the last answer of a conversation only
    drop_duplicates: bool = False  # true: a row that says what an earlier one said is left out
    sequence_len: Annotated[int, ">= 2"] = 2048  # longest row, in tokens
    sample_packing: bool = True  # several rows per sequence, which do not see each other
    excess_length: Literal["drop", "truncate", "split", "error"] = "drop"  # longer rows; split: rows of type completion
    # become several of at most that length, other rows are dropped
    max_bad_row_fraction: Annotated[float, ">= 0", "<= 1"] = 0.01  # share of unreadable rows that is skipped, not fatal
    num_proc: Count | None = None  # workers that tokenise; null: chosen by the number of cores
    cache_dir: str | None = None  # of the tokenised data; null: ~/.cache/sora_llm/data


@dataclass(frozen=True)
class Train:
    """Length, batch and optimizer.  Rows per step: batch size · processes · accumulation steps."""

    per_device_train_batch_size: Count = 1  # rows (packed: sequences) of a process in a forward pass
    gradient_accumulation_steps: Count = 1  # forward passes of a process in an optimizer step
    num_train_epochs: Annotated[float, "> 0"] | None = None  # exactly one of this and max_steps
    max_steps: Count | None = None  # optimizer steps
    learning_rate: Annotated[float, "> 0"] = 2e-4  # peak, of A and B
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    # transformers' formulas; one schedule for all phases, with a ramp after each change of the adapters
    warmup_ratio: Annotated[float, ">= 0", "<= 1"] = 0.03  # share of the steps
    weight_decay: Annotated[float, ">= 0"] = 0.0  # of A and B, never of the gates
    adam_beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # decay of AdamW's mean of gradients
    adam_beta2: Annotated[float, ">= 0", "< 1"] = 0.999  # decay of AdamW's mean of squared gradients
    adam_epsilon: Annotated[float, "> 0"] = 1e-8  # AdamW's ε, beside the root of the latter
    max_grad_norm: Annotated[float, ">= 0"] | None = 1.0  # null or 0: no clipping
    gradient_checkpointing: bool = False  # less memory, about a third more compute
    max_skipped_steps: Count = 10  # non-finite steps in a row that end the run
    seed: Annotated[int, ">= 0", "< 4294967296"] = 42  # of the order of rows, fresh adapters and dropout


@dataclass(frozen=True)
class Distributed:
    """How processes share the work.  How many there are, and where, is the launcher's business."""

    strategy: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3"] = "auto"  # auto: none alone, else zero2
    sync_every: Count = 1  # above 1: local updates, so many optimizer steps between rounds; under ddp
    replica: Literal["process", "node"] = "process"  # what takes local steps; inside a node gradients are averaged
    outer_learning_rate: Annotated[float, "> 0"] = 1.0  # of the step from a round's start to the mean of A and B
    outer_momentum: Annotated[float, ">= 0", "< 1"] = 0.0  # Nesterov, over rounds
    check_every: Count = 100  # steps between proofs that the processes agree
    timeout_minutes: Annotated[float, "> 0"] = 30.0  # after which a process that waits for the others gives up
    deepspeed_config: str | None = None  # a DeepSpeed JSON file, merged under our keys


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the dev rows."""

    eval_steps: Count | None = None  # optimizer steps between evaluations; null: before and after training only
    per_device_eval_batch_size: Count = 8  # rows of a process in a forward pass without gradients
    sample_prompts: tuple[str, ...] = ()  # answered by base and adapter after the export
    early_stopping_patience: Count | None = None  # evaluations without a better one that end finetune, or a stage


@dataclass(frozen=True)
class Output:
    """What is written, and where."""

    output_dir: str = ""  # required: the run directory
    logging_steps: Count = 10  # optimizer steps between lines of the log and of metrics.jsonl
    save_steps: Count = 500  # optimizer steps between checkpoints
    save_total_limit: Count | None = 2  # checkpoints kept; null: all
    resume: str = "auto"  # auto: from the newest complete checkpoint; never; or the path of a checkpoint
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)  # []: no tracker
    export_layout: Literal["padded", "ragged", "gguf", "merged"] = "padded"
    # of adapter/: padded for engines that read PEFT folders, ragged for PEFT, transformers and vLLM; gguf and merged:
    # a folder of that name beside a padded one
    allow_empty_adapter: bool = False  # true: an adapter whose every rank was pruned is no error
    push_to_hub: bool = False  # upload adapter/ once the run is finished; a failed upload never fails the run
    hub_model_id: str | None = None  # user/name or name; null: the name of output_dir, in the user's namespace


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: Model = field(default_factory=Model)
    quantization: Quantization = field(default_factory=Quantization)
    sora: Sora = field(default_factory=Sora)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    distributed: Distributed = field(default_factory=Distributed)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)


# Names that people know from elsewhere: our key → the names accepted for it in its section.
OLD_NAMES: dict[str, tuple[str, ...]] = {
    "model.name_or_path": ("base_model", "model_name_or_path", "pretrained_model_name_or_path", "model_id"),
    "model.dtype": ("torch_dtype",),
    "model.attn_implementation": ("attention", "attn_impl", "_attn_implementation"),
    "sora.r": ("lora_r", "rank"),
    "sora.lora_alpha": ("alpha",),
    "sora.lora_dropout": ("dropout",),
    "sora.target_modules": ("lora_target_modules",),
    "sora.sparse_lambda": ("lambda", "lambda_"),
    "data.sequence_len": ("cutoff_len", "max_length", "max_seq_length", "max_seq_len"),
    "data.sample_packing": ("packing",),
    "train.per_device_train_batch_size": ("micro_batch_size",),
    "train.gradient_accumulation_steps": ("gradient_accumulation",),
    "train.num_train_epochs": ("num_epochs", "epochs"),
    "train.learning_rate": ("lr",),
    "train.lr_scheduler_type": ("lr_scheduler",),
    "train.max_grad_norm": ("gradient_clipping",),
    "distributed.deepspeed_config": ("deepspeed", "deepspeed_config_file"),
    "data.val_set_size": ("val_size",),
    "evaluation.per_device_eval_batch_size": ("eval_batch_size",),
    "output.resume": ("resume_from_checkpoint",),
}
ALIASES = {f"{key.partition('.')[0]}.{name}": key for key, names in OLD_NAMES.items() for name in names}

# Names from elsewhere that have no key here, wherever they are written: what to do instead.
NO_EQUIVALENT = {
    "evaluation_strategy": "set evaluation.eval_steps; dev loss is always measured before and after training",
    "eval_strategy": "set evaluation.eval_steps; dev loss is always measured before and after training",
    "save_strategy": "set output.save_steps",
    "logging_strategy": "set output.logging_steps",
    "group_by_length": "leave it out; without data.sample_packing rows of like length go together anyway",
    "warmup_steps": "set train.warmup_ratio, the share of the steps",
    "optim": "leave it out; the optimizer is always AdamW with the proximal step",
    "optimizer": "leave it out; the optimizer is always AdamW with the proximal step",
    "bf16": "set model.dtype: bfloat16",
    "fp16": "set model.dtype: float16",
    "batch_size": "set train.per_device_train_batch_size, the rows of one process and one forward pass",
    "train_batch_size": "set train.per_device_train_batch_size, the rows of one process and one forward pass",
    "bias": "leave it out; biases are never trained",
    "use_rslora": "leave it out; set sora.lora_alpha for another scale",
    "modules_to_save": "leave it out; only adapters are trained",
    "use_dora": "leave it out; adapters are plain LoRA",
    "init_lora_weights": "leave it out; B starts at 0",
    "rank_pattern": "leave it out; ranks are found, sora.budgets gives modules budgets of their own",
    "layers_to_transform": "leave it out; sora.target_modules takes ends of module names",
    "assistant_only_loss": "leave it out; only answers are trained on unless data.train_on_inputs is true",
    "completion_only_loss": "leave it out; only answers are trained on unless data.train_on_inputs is true",
    "load_best_model_at_end": "set evaluation.early_stopping_patience, under which the adapter is the best one's",
    "metric_for_best_model": "leave it out; it is the dev loss",
    "neftune_noise_alpha": "leave it out; no noise is added to embeddings",
    "use_liger_kernel": "leave it out; logits are computed for supervised tokens alone",
    "torch_compile": "leave it out; the adapter is one fused function",
    "fsdp": "set distributed.strategy: zero3",
    "fsdp_config": "set distributed.strategy: zero3",
    "device_map": "leave it out; every process has its own device, and distributed.strategy: zero3 shards the base",
    "dataloader_num_workers": "leave it out; rows are tokenised before training, in data.num_proc processes",
    "dataset_num_proc": "set data.num_proc",
    "bits": "set quantization.load_in_4bit or load_in_8bit",
    "wandb_project": "set output.report_to: [wandb] and the environment variable WANDB_PROJECT",
    "run_name": "leave it out; trackers take the name of output.output_dir",
    "dataset_text_field": "set columns: {text: …} of the data set",
    "field_messages": "set columns: {messages: …} of the data set",
    "field_instruction": "set columns: {instruction: …} of the data set",
    "special_tokens": "leave it out; tokenizers are taken as they are",
    "train_file": "set data.datasets",
    "validation_file": "set data.val_datasets",
    "ds_type": "leave it out; a file's name says its format",
}

SPELLINGS = {  # other spellings of a choice
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "torch.float32"), "float32"),
}

# ---------------------------------------------------------------------------------------- from a file to a Config

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file `path`, applies `section.key=value` overrides in order, and checks everything that can be
    checked without looking at any other file.  Raises `UserError` for the first thing that is wrong."""
    return _of_tree(_read_file(Path(path)), str(path), overrides)


def from_dict(content: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The config that a file with this content gives, as `to_dict` made it or anybody; `origin` is where messages say
    that it is from.

    Raises:
        UserError: as `load_config`.
    """
    return _of_tree(_as_read(content), origin, overrides)


def _as_read(value: Any) -> Any:
    """What Python has other kinds of, as YAML has it: paths are text, tuples lists."""
    if isinstance(value, Mapping):
        return {name: _as_read(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_read(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _of_tree(content: dict[str, Any], file: str, overrides: Sequence[str]) -> Config:
    tree = _rename(content, file)
    overridden = []
    for text in overrides:
        key, value = _read_override(text)
        tree = _with_value(tree, key.split("."), value, text)
        overridden.append(key)
    origin = _Origin(file, tree, tuple(overridden))
    _refuse_unknown(tree, origin)
    config = _section(Config, tree, "", origin)
    _check_required(config, origin)
    _check_combinations(config, origin)
    return config


@dataclass(frozen=True)
class _Origin:
    """Where each key of a config was stated, for messages."""

    file: str
    tree: dict[str, Any]  # as read, overrides included
    overridden: tuple[str, ...]  # the keys that the command line set

    def of(self, key: str) -> str:
        for stated in self.overridden:
            if f"{key}.".startswith(f"{stated}.") or stated.startswith(f"{key}."):
                return "on the command line"
        section, *rest = key.split(".")
        body = self.tree.get(section)
        by_default = rest and isinstance(body, dict) and rest[0] not in map(str, body)
        return "by default" if by_default else f"in {self.file}"

    def state(self, config: Config, key: str) -> str:
        """E.g. "sora.r (64, in configs/llama7b.yaml)"."""
        return f"{key} ({_show(_plain(_value(config, key)))}, {self.of(key)})"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter: no tags (`!!python/object/apply:os.system`), no key stated twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            problem = f"the tag {tag} is refused because tags can run code; a config holds plain values only"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in (earlier.value for earlier in keys[:index]):
                problem = f"the key {key.value} is stated twice; keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader, or another YAML reader, would take for something else."""


# YAML 1.1 takes 1e-4 (no dot) for text; people mean the number.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), "-+0123456789")


def _read_yaml(text: str, where: str) -> Any:
    """The plain values in a YAML text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where} cannot be read as YAML{line}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}.") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The config file {path} does not exist; give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The config file {path} is not UTF-8 text ({error.reason}); give a YAML file.") from error
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read ({error.strerror}); give a YAML file.") from error
    tree = _read_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {_show(tree)}; a config is a mapping of the sections {_names(Config)}.")
    return tree


def _read_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        name = key.lstrip("-")
        known = _elsewhere(name)
        example = f"{known}={value or '…'}" if known else "train.max_steps=100"
        instead = NO_EQUIVALENT.get(name, f"write for example {example}")
        raise UserError(f"The override {text!r} is not of the form section.key=value; {instead}")
    section, name, *rest = key.split(".")
    renamed = ALIASES.get(f"{section}.{name}", f"{section}.{name}")
    return ".".join([renamed, *rest]), _read_yaml(value, f"The override {text!r}")


def _with_value(tree: Any, path: list[str], value: Any, override: str) -> Any:
    """A copy of `tree` with `value` at `path`; missing mappings and lists on the way are made."""
    if not path:
        return value
    head, *rest = path
    if tree is None:
        tree = [] if head.isdecimal() else {}
    if isinstance(tree, dict):
        return tree | {head: _with_value(tree.get(head), rest, value, override)}
    if not isinstance(tree, list):
        raise UserError(f"The override {override!r} looks for {head} inside {_show(tree)}; name a key that exists.")
    if not head.isdecimal() or int(head) > len(tree):
        raise UserError(f"The override {override!r} needs an index from 0 to {len(tree)} in place of {head}.")
    index = int(head)
    old = tree[index] if index < len(tree) else None
    return [*tree[:index], _with_value(old, rest, value, override), *tree[index + 1 :]]


def _rename(tree: dict[str, Any], file: str) -> dict[str, Any]:
    """The file's mapping with our keys in place of their aliases."""
    renamed = {}
    for section, body in tree.items():
        if not isinstance(body, dict):
            renamed[section] = body
            continue
        stated: dict[str, str] = {}  # our key → the name that the file used
        renamed[section] = {}
        for name, value in body.items():
            written = f"{section}.{name}"
            key = ALIASES.get(written, written)
            if key in stated:
                raise UserError(f"{stated[key]} and {written} mean the same in {file}; keep one of them.")
            stated[key] = written
            renamed[section][key.partition(".")[2] if written in ALIASES else name] = value
    return renamed


# ---------------------------------------------------------------------------------------------- types and ranges


class _MismatchError(Exception):
    """A value is not what the type hint allows."""


def _section(cls: type[T], tree: Any, key: str, origin: _Origin) -> T:
    """The dataclass `cls` from the mapping found at `key` ("" is the root)."""
    if not isinstance(tree, dict):
        raise UserError(f"{key} is {_show(tree)} {origin.of(key)}; it must be a mapping with the keys {_names(cls)}.")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in tree.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise UserError(_unknown(inner, str(name), cls, origin))
        if value is None and NoneType not in get_args(hints[name]):
            continue  # null unsets: the default holds
        try:
            values[name] = _convert(value, hints[name], inner, origin)
            if value == "" and NoneType in get_args(hints[name]):
                raise _MismatchError
        except _MismatchError:
            allowed = _describe(hints[name])
            if value == "":
                allowed = allowed.replace("text", "text with something in it")
                raise UserError(f"{inner} is an empty text {origin.of(inner)}; it must be {allowed}.") from None
            quotes = "" if isinstance(value, str | list | dict) or "text" not in allowed else " (put it in quotes)"
            raise UserError(f"{inner} is {_show(value)} {origin.of(inner)}; it must be {allowed}{quotes}.") from None
    return cls(**values)


def _refuse_unknown(tree: dict[str, Any], origin: _Origin) -> None:
    """UserError that names every key of the sections that is not ours: a config for another trainer has many."""
    sections = get_type_hints(Config)
    unknown = [(str(name), str(name), Config) for name in tree if name not in sections]
    for section, cls in sections.items():
        if isinstance(body := tree.get(section), dict):
            known = get_type_hints(cls)
            unknown += [(f"{section}.{name}", str(name), cls) for name in body if name not in known]
    if len(unknown) == 1:
        raise UserError(_unknown(*unknown[0], origin))
    if unknown:
        lines = (f"\n  {key} {origin.of(key)}: {_instead(key, name, cls)}" for key, name, cls in unknown)
        raise UserError(f"{len(unknown)} keys are not keys of the config:{''.join(lines)}")


def _convert(value: Any, hint: Any, key: str, origin: _Origin) -> Any:
    """`value` as the type hint says, or `_MismatchError`.  Integers pass for floats; true and false are not numbers."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        number = _convert(value, args[0], key, origin)
        if not all(_within(number, bound) for bound in args[1:]):
            raise _MismatchError
        return number
    if kind in (Union, UnionType):
        return _convert_to_first(value, args, key, origin)
    if kind is Literal:
        choice = SPELLINGS.get(value, value) if isinstance(value, str) else value
        if choice in args:
            return choice
    elif is_dataclass(kind):
        return _section(kind, value, key, origin)  # type: ignore[arg-type]
    elif kind is tuple and isinstance(value, list):
        return tuple(_convert(item, args[0], f"{key}.{index}", origin) for index, item in enumerate(value))
    elif kind is dict and isinstance(value, dict):
        return {_convert(name, str, key, origin): _convert(item, args[1], key, origin) for name, item in value.items()}
    elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif type(value) is kind and kind in (str, int, bool, NoneType):
        return value
    raise _MismatchError


def _convert_to_first(value: Any, hints: Sequence[Any], key: str, origin: _Origin) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint, key, origin)
        except _MismatchError:
            continue
    raise _MismatchError


def _within(number: float, bound: str) -> bool:
    """Whether `number` satisfies a bound like ">= 1"."""
    compare, limit = bound.split()
    return {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[compare](number, float(limit))


def _describe(hint: Any) -> str:
    """What a type hint allows, in words."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return f"{_describe(args[0])} {' and '.join(args[1:])}"
    if kind is Literal:
        return args[0] if len(args) == 1 else f"one of {', '.join(args)}"
    if kind in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if kind is tuple:
        return f"a list ([] for none), each entry {_describe(args[0])}"
    if kind is dict:
        return f"a mapping of names to {_describe(args[1])}"
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    return words.get(kind, "a mapping")


def _unknown(key: str, name: str, cls: type, origin: _Origin) -> str:
    """The message for a key that `cls` does not have."""
    return f"{key} {origin.of(key)} is not a key of the config; {_instead(key, name, cls)}"


def _instead(key: str, name: str, cls: type) -> str:
    """What to write in place of a key that `cls` does not have: the nearest valid one, or what to do without it."""
    if name in NO_EQUIVALENT:
        return f"{NO_EQUIVALENT[name]}."
    parent = key.rpartition(".")[0]
    own = {field_.name: f"{parent}.{field_.name}".lstrip(".") for field_ in fields(cls)}
    own |= {alias.partition(".")[2]: to for alias, to in ALIASES.items() if alias.partition(".")[0] == parent}
    nearest = difflib.get_close_matches(name, own, n=1)
    known = _elsewhere(name) or (own[nearest[0]] if nearest else None)
    return f"did you mean {known}?" if known else f"allowed there: {_names(cls)}."


def _elsewhere(name: str) -> str | None:
    """The dotted key that has exactly this last name or alias, in whatever section."""
    for section, cls in get_type_hints(Config).items():
        if name in get_type_hints(cls):
            return f"{section}.{name}"
    return next((key for alias, key in ALIASES.items() if alias.partition(".")[2] == name), None)


def _names(cls: type) -> str:
    return ", ".join(field_.name for field_ in fields(cls))


def _show(value: Any) -> str:
    """A value as a message shows it: as YAML would write it, and not longer than a line."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


# ------------------------------------------------------------------------------------------------ what goes together


def _check_required(config: Config, origin: _Origin) -> None:
    for key, example in (
        ("model.name_or_path", "a hub id or a local folder"),
        ("data.datasets", "a list of {path: …, type: …}"),
        ("output.output_dir", "the folder that the run writes"),
    ):
        if not _value(config, key):
            raise UserError(f"{key} is missing in {origin.file}; set it to {example}.")
    for key, dataset in _datasets(config.data):
        if not dataset.path:
            raise UserError(f"{key}.path is missing in {origin.file}; set it to a file, a folder or a hub id.")
    _check_one_of(config, origin, ("train.max_steps", "train.num_train_epochs"))
    strength = ("sora.target_rank", "sora.target_params", "sora.sparse_lambda")
    _check_one_of(config, origin, strength, none_is_fine=bool(config.sora.budgets))  # which may be for all modules
    _check_one_of(config, origin, ("data.val_set_size", "data.val_datasets"), none_is_fine=True)


def _check_one_of(config: Config, origin: _Origin, keys: tuple[str, ...], none_is_fine: bool = False) -> None:
    stated = [key for key in keys if _value(config, key) is not None]
    if not stated and not none_is_fine:
        raise UserError(f"None of {', '.join(keys)} is set in {origin.file}; set exactly one of them.")
    if len(stated) > 1:
        in_file = [key for key in stated if origin.of(key) != "on the command line"] or stated[1:]
        raise UserError(
            f"{' and '.join(origin.state(config, key) for key in stated)} are set, and only one of "
            f"{', '.join(keys)} may be; unset the other, for example with {in_file[0]}=null on the command line."
        )


def _datasets(data: Data) -> Iterator[tuple[str, Dataset]]:
    for name, datasets in (("datasets", data.datasets), ("val_datasets", data.val_datasets or ())):
        for index, dataset in enumerate(datasets):
            yield f"data.{name}.{index}", dataset


def _check_combinations(config: Config, origin: _Origin) -> None:
    problems = [
        *_sora_problems(config, origin),
        *_replica_problems(config, origin),
        *_backbone_problems(config, origin),
        *_evaluation_problems(config, origin),
        *_data_problems(config),
    ]
    if config.output.hub_model_id is not None and not config.output.push_to_hub:
        stated = origin.state(config, "output.hub_model_id")
        problems.append(f"{stated} names where to upload to, and nothing is uploaded; set output.push_to_hub to true.")
    if problems:
        raise UserError(problems[0])


def _sora_problems(config: Config, origin: _Origin) -> Iterator[str]:
    sora = config.sora

    def state(name: str) -> str:
        return origin.state(config, f"sora.{name}")

    budget = next((name for name in ("target_rank", "target_params") if getattr(sora, name) is not None), None)
    if budget is None and sora.budgets and sora.sparse_lambda is None:
        budget = "budgets"
    suffixes = (sora.target_modules,) if isinstance(sora.target_modules, str) else sora.target_modules
    if not suffixes or not all(suffixes):
        yield f"{state('target_modules')} names no module; use all-linear or suffixes like q_proj."
    if sora.target_rank is not None and sora.target_rank > sora.r:
        yield f"{state('target_rank')} is above {state('r')}; the mean kept rank can be at most r."
    if sora.dense_ratio >= sora.consensus_at:
        yield f"{state('dense_ratio')} must be below {state('consensus_at')}, or nothing could be pruned between them."
    for name in ("min_rank", "budgets"):
        if getattr(sora, name) and budget is None:
            yield f"{state(name)} goes with a budget; set sora.target_rank, not sora.sparse_lambda, or leave it out."
    for pattern, rank in sora.budgets.items():
        if rank > sora.r:
            yield f"sora.budgets {pattern!r} is {rank:g}, above {state('r')}; the mean kept rank can be at most r."
    if sora.threshold == "adaptive" and budget is None:
        yield f"{state('threshold')} needs a budget; set sora.target_rank, or use decoupled."
    if sora.threshold in ("proxgen", "constant") and budget is not None:
        yield f"{state('threshold')} does not go with {state(budget)}; use auto, adaptive or decoupled."
    yield from _path_problems(config, state)
    if sora.dtype == "bfloat16" and config.model.dtype != "bfloat16":
        yield f"{state('dtype')} needs model.dtype bfloat16, not {config.model.dtype}; change one of them."


def _path_problems(config: Config, state: Callable[[str], str]) -> Iterator[str]:
    """Of a sparsity path, which is a stage per λ, and of what only goes with one."""
    sora = config.sora
    patience = config.evaluation.early_stopping_patience
    if sora.lambda_num == 1:
        for name, default in (("lambda_schedule", "constant"), ("max_lambda", None), ("retrain", True)):
            if getattr(sora, name) != default:
                yield f"{state(name)} goes with a sparsity path; set sora.lambda_num above 1, or leave it out."
        if patience is not None and sora.consensus_at == 1.0:
            yield (
                "evaluation.early_stopping_patience ends the finetune phase, and with sora.consensus_at 1.0 there is "
                "none; lower sora.consensus_at, or leave the patience out."
            )
        return
    if sora.sparse_lambda is None:
        yield f"{state('lambda_num')} makes a sparsity path, whose stages have a λ each; set sora.sparse_lambda."
    elif sora.max_lambda is None or sora.max_lambda <= sora.sparse_lambda:
        yield f"{state('max_lambda')} must be above {state('sparse_lambda')}: the path rises from one to the other."
    if sora.lambda_schedule == "constant":
        yield f"{state('lambda_schedule')} is one λ; use linear, log_linear or exp_linear for {sora.lambda_num} stages."
    if sora.lambda_schedule == "exp_linear" and sora.sparse_lambda == 0:
        yield f"{state('sparse_lambda')} must be above 0 with lambda_schedule exp_linear, which multiplies it."
    if sora.consensus_at != 1.0:
        yield f"{state('consensus_at')} must be 1.0 in a sparsity path: each stage goes on from uncut weights."
    if not sora.retrain and sora.threshold != "constant":
        yield f"{state('retrain')} needs sora.threshold constant: the others' threshold is lr · λ, and lr would be 0."


def _replica_problems(config: Config, origin: _Origin) -> Iterator[str]:
    """What is wrong with the settings of local updates."""
    distributed = config.distributed

    def state(name: str) -> str:
        return origin.state(config, f"distributed.{name}")

    if distributed.sync_every > 1:
        if distributed.strategy.startswith("zero"):
            yield (
                f"{state('sync_every')} does not go with {state('strategy')}: ZeRO's processes hold shards of one "
                "optimizer and have to step together; use strategy ddp (or auto), or sync_every 1."
            )
        return
    for name, default in (("replica", "process"), ("outer_learning_rate", 1.0), ("outer_momentum", 0.0)):
        if getattr(distributed, name) != default:
            yield f"{state(name)} goes with local updates; set distributed.sync_every above 1, or leave it out."


def _backbone_problems(config: Config, origin: _Origin) -> Iterator[str]:
    four, eight = "quantization.load_in_4bit", "quantization.load_in_8bit"
    if config.quantization.load_in_4bit and config.quantization.load_in_8bit:
        yield f"{origin.state(config, four)} and {origin.state(config, eight)} exclude each other; set one to false."
    if config.quantization.load_in_8bit and config.distributed.strategy == "zero3":
        yield f"{eight} under distributed.strategy zero3 gives wrong losses; use zero2, or 4 bits."


def _evaluation_problems(config: Config, origin: _Origin) -> Iterator[str]:
    for name in ("eval_steps", "early_stopping_patience"):
        needs_dev_rows = getattr(config.evaluation, name) is not None
        if needs_dev_rows and config.data.val_set_size is None and not config.data.val_datasets:
            yield (
                f"{origin.state(config, f'evaluation.{name}')} needs dev rows; "
                f"set data.val_set_size or data.val_datasets, or evaluation.{name} to null."
            )
    if config.evaluation.early_stopping_patience is not None and config.evaluation.eval_steps is None:
        yield "evaluation.early_stopping_patience counts evaluations; set evaluation.eval_steps as well."


def _data_problems(config: Config) -> Iterator[str]:
    data = config.data
    if data.val_datasets == ():
        yield "data.val_datasets is empty; name a data set, or set it to null for no dev rows."
    if data.train_on_inputs and data.train_on_last_turn_only:
        yield "data.train_on_inputs and data.train_on_last_turn_only contradict each other; set one of them to false."
    for key, dataset in _datasets(data):
        allowed = FIELDS[dataset.type]
        for name in dataset.columns:
            if name not in allowed:
                yield (
                    f"{key}.columns maps {name!r}, which is no field of type {dataset.type}; "
                    f"its fields are {', '.join(allowed) or 'the function’s own'}, each mapped to a column of the file."
                )
        if dataset.separator and dataset.type != "prompt_completion":
            yield f"{key}.separator goes with type prompt_completion only, not {dataset.type}; leave it out."
        if dataset.type == "custom" and dataset.function is None:
            yield f"{key} is of type custom and has no function; set it to module:function, from a row to messages."
        if dataset.type != "custom" and dataset.function is not None:
            yield f"{key}.function goes with type custom and no other; its type is {dataset.type}."
    if data.excess_length == "split" and all(dataset.type != "completion" for _, dataset in _datasets(data)):
        yield "data.excess_length split is for plain text (type completion), and no data set is; use drop or truncate."
    yield from _mixture_problems(data.datasets)
    for index, dataset in enumerate(data.val_datasets or ()):
        for name in ("weight", "streaming"):
            if getattr(dataset, name):
                yield f"data.val_datasets.{index}.{name} does not go with dev rows, which are all read; leave it out."
    if data.datasets and all(dataset.streaming for dataset in data.datasets):
        yield from _streaming_problems(config)


def _mixture_problems(datasets: Sequence[Dataset]) -> Iterator[str]:
    for name, rule in (
        ("weight", "its share of an epoch's rows is relative to the others'; give every data set one, or none"),
        ("streaming", "data sets are all streamed or all read before training; set it for every one, or for none"),
    ):
        stated = [index for index, dataset in enumerate(datasets) if getattr(dataset, name)]
        if stated and len(stated) < len(datasets):
            without = next(index for index in range(len(datasets)) if index not in stated)
            yield f"data.datasets.{stated[0]} has {name} and data.datasets.{without} has not: {rule}."


def _streaming_problems(config: Config) -> Iterator[str]:
    if config.train.num_train_epochs is not None:
        yield (
            "data.datasets are streamed, so that nobody knows how long an epoch is; "
            "set train.max_steps, and train.num_train_epochs to null."
        )
    if config.data.val_set_size is not None:
        yield "data.val_set_size cannot hold out rows of streamed data sets; name dev rows in data.val_datasets."
    if config.data.num_proc is not None:
        yield "data.num_proc is for data that is prepared; streamed data is tokenised by a thread; set it to null."
    if config.data.drop_duplicates:
        yield "data.drop_duplicates would have to remember every row of a streamed data set; set it to false."


# -------------------------------------------------------------------------------------------- from a Config to text


def to_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain mappings, lists and scalars, in the order of the schema."""
    return _plain(config)


def to_yaml(config: Config) -> str:
    """The whole config as YAML; `load_config` reads it back as the same config."""
    return _yaml(to_dict(config))


def recipe(config: Config) -> str:
    """What of a config decides what is learned, but for the base and the data sets themselves, as YAML."""
    whole = to_dict(config)
    elsewhere = {
        "model": ("name_or_path", "revision", "trust_remote_code"),
        "data": ("datasets", "val_datasets", "cache_dir", "num_proc", "max_bad_row_fraction"),
        "distributed": ("check_every", "timeout_minutes"),
        "evaluation": ("per_device_eval_batch_size", "sample_prompts"),
    }
    sections = ("model", "quantization", "sora", "data", "train", "distributed", "evaluation")
    return _yaml(
        {
            section: {name: value for name, value in whole[section].items() if name not in elsewhere.get(section, ())}
            for section in sections
        }
    )


def _yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field_.name: _plain(getattr(value, field_.name)) for field_ in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The dotted keys whose values differ between two configs given as plain mappings, list entries by index."""
    flat_a, flat_b = flattened(a), flattened(b)
    missing = object()
    return [key for key in flat_a | flat_b if flat_a.get(key, missing) != flat_b.get(key, missing)]


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a config given as plain mappings, list entries by index."""
    return dict(_flatten(config))


def _flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every scalar and every empty list or mapping."""
    inner = dict(enumerate(tree)) if isinstance(tree, list) else tree
    if not isinstance(inner, dict) or not inner:
        yield key, tree
        return
    for name, value in inner.items():
        yield from _flatten(value, f"{key}.{name}" if key else str(name))


# What a resumed run may change: where and how it runs and is logged, never what it computes.
FREE_ON_RESUME = (
    "output.",
    "evaluation.",
    "distributed.",
    "data.num_proc",
    "data.cache_dir",
    "quantization.bnb_4bit_quant_storage",
)
FIXED_ON_RESUME = (
    "evaluation.early_stopping_patience",
    "distributed.sync_every",
    "distributed.replica",
    "distributed.outer_",
)
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def resume_conflicts(
    old: dict[str, Any], new: dict[str, Any], num_processes_old: int, num_processes_new: int
) -> list[str]:
    """Why a checkpoint made under the config `old` cannot be continued under `new`: the keys that differ and may not,
    and a sentence if the rows per optimizer step changed.  Empty: it can.  Both are plain mappings of `to_dict`, `old`
    that of an earlier version perhaps: what had no key then was as its default is."""
    defaults = to_dict(Config())
    old = {section: defaults.get(section, {}) | values for section, values in old.items()}
    conflicts = [
        key
        for key in differing_keys(old, new)
        if key not in BATCH_KEYS and (key.startswith(FIXED_ON_RESUME) or not key.startswith(FREE_ON_RESUME))
    ]
    rows_old, product_old = _rows_per_step(old, num_processes_old)
    rows_new, product_new = _rows_per_step(new, num_processes_new)
    if rows_old != rows_new:
        conflicts.append(
            f"one optimizer step took {product_old} = {rows_old} rows and would now take {product_new} = {rows_new}; "
            "keep batch size × accumulation steps × processes the same"
        )
    return conflicts


def _rows_per_step(config: dict[str, Any], num_processes: int) -> tuple[int, str]:
    factors = [config["train"][key.partition(".")[2]] for key in BATCH_KEYS] + [num_processes]
    return math.prod(factors), " × ".join(str(factor) for factor in factors)
