"""The config schema: its sections as frozen dataclasses, with a comment for every key.

The type hints drive parsing: `Annotated[int, ">= 1"]` is a range, `Literal` a choice, and `| None` makes null a value
in its own right; elsewhere null unsets a key, so its default applies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

Dtype = Literal["bfloat16", "float16", "float32"]
Count = Annotated[int, ">= 1"]


@dataclass(frozen=True)
class Model:
    """The frozen backbone."""

    name_or_path: str = ""  # required: a hub id or a local folder
    revision: str | None = None  # branch, tag or commit on the hub; null: the default branch
    dtype: Dtype = "bfloat16"  # of unquantised weights and activations; float16 uses a loss scale
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    # transformers' names
    trust_remote_code: bool = False  # run Python code that comes with the model: only for authors you trust
    adapter: str | None = None  # folder of a plain LoRA to start from, ours or PEFT's; null: fresh adapters


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes stores the backbone; with neither load_in_4bit nor load_in_8bit it stays in model.dtype."""

    load_in_4bit: bool = True  # as in QLoRA
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # the 4-bit data type
    bnb_4bit_use_double_quant: bool = True  # quantise the quantisation constants too (0.4 bit per weight less)
    bnb_4bit_compute_dtype: Dtype = "bfloat16"  # dtype of matrix products with 4-bit weights
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    # auto: the compute dtype under zero3 (which shards it), else uint8
    load_in_8bit: bool = False  # LLM.int8 instead of 4 bits; not under zero3, and checkpointing saves less with it


@dataclass(frozen=True)
class Sora:
    """The adapters y = W x + s·B(g ⊙ (A x)), and how their ranks are found."""

    r: Count = 64  # rank of every adapter before pruning
    lora_alpha: Annotated[float, "> 0"] = 16.0  # s = lora_alpha / r
    lora_dropout: Annotated[float, ">= 0", "< 1"] = 0.0  # on the adapter's input, one mask per shared input
    target_modules: str | tuple[str, ...] = "all-linear"  # all-linear (never the output head), a suffix, or suffixes
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the adapter's parameters; auto: float32
    gate_lr: Literal["auto"] | Annotated[float, "> 0"] = "auto"
    # auto: 0.01 under adaptive, else high enough for a gate to reach 0
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

    path: str = ""
    # required: a jsonl, json, csv or txt file (or .gz of one), parquet or arrow, a folder, a glob, or a hub id
    type: Literal["alpaca", "messages", "sharegpt", "completion", "prompt_completion", "self_instruct", "custom"] = (
        "alpaca"  # row format
    )
    function: str | None = None  # custom only: "module:function", a row → messages; it is imported and run
    separator: str = ""  # prompt_completion only: put between prompt and completion, which are tokenised as one text
    streaming: bool = False  # read while training instead of before it; for all data sets or none
    split: str | None = None  # null: train
    name: str | None = None  # which of its configurations, of a hub data set that has several
    revision: str | None = None  # of a hub data set
    weight: Annotated[float, "> 0"] | None = None  # share of the rows in an epoch; null: every row once
    columns: dict[str, str] = field(default_factory=dict)  # our field: the file's column, where they differ


@dataclass(frozen=True)
class Data:
    """The training data, and how rows become tokens."""

    datasets: tuple[Dataset, ...] = ()  # required: what is trained on, see below
    val_set_size: Annotated[int, ">= 1"] | Annotated[float, "> 0", "< 1"] | None = None
    # dev rows taken from datasets: below 1 a fraction, else a count (pieces of one file row stay together, so there may
    # be a few more); at most one of this and val_datasets
    val_datasets: tuple[Dataset, ...] | None = None  # separate dev data sets
    chat_template: str | None = None  # null: the tokenizer's; or a built-in, or a jinja file
    train_on_inputs: bool = False  # true: the loss covers the prompt too
    train_on_last_turn_only: bool = False  # true: the loss covers the last answer of a conversation only
    drop_duplicates: bool = False  # true: drop rows with the same content as an earlier one
    sequence_len: Annotated[int, ">= 2"] = 2048  # longest row, in tokens
    sample_packing: bool = True  # several rows per sequence, without attending to each other
    excess_length: Literal["drop", "truncate", "split", "error"] = "drop"  # longer rows; split: rows of type completion
    # become several of at most that length, other rows are dropped
    max_bad_row_fraction: Annotated[float, ">= 0", "<= 1"] = 0.01  # share of unusable rows skipped without failing
    num_proc: Count | None = None  # processes that tokenise; null: one per core, up to 8 (streaming: up to 2 for each
    # process that trains)
    cache_dir: str | None = None  # of the tokenised data; null: ~/.cache/sora_llm/data

    @property
    def has_dev_rows(self) -> bool:
        """Whether there are any, held out or of their own."""
        return self.val_datasets is not None or self.val_set_size is not None


@dataclass(frozen=True)
class Train:
    """Length, batch and optimizer.  Rows per step: batch size · processes · accumulation steps."""

    per_device_train_batch_size: Count = 1  # rows (packed: sequences) of a process in a forward pass
    gradient_accumulation_steps: Count = 1  # forward passes of a process in an optimizer step
    num_train_epochs: Annotated[float, "> 0"] | None = None  # exactly one of this and max_steps
    max_steps: Count | None = None  # optimizer steps
    learning_rate: Annotated[float, "> 0"] = 2e-4  # peak, of A and B
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    # transformers' formulas, but constant warms up, too; one for all phases, with a ramp after a change of the adapters
    min_lr_ratio: Annotated[float, ">= 0", "< 1"] = 0.0  # share of the peak at which linear and cosine end
    warmup_ratio: Annotated[float, ">= 0", "<= 1"] = 0.03
    # share of the steps, and of the remaining steps after a change of the adapters
    warmup_steps: Annotated[int, ">= 0"] | None = None
    # instead of warmup_ratio: optimizer steps (of each stage); a change takes the same share of the remaining steps
    weight_decay: Annotated[float, ">= 0"] = 0.0  # of A and B, never of the gates
    adam_beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # decay of AdamW's mean of gradients
    adam_beta2: Annotated[float, ">= 0", "< 1"] = 0.999  # decay of AdamW's mean of squared gradients
    adam_epsilon: Annotated[float, "> 0"] = 1e-8  # AdamW's ε, added to the root of the latter
    max_grad_norm: Annotated[float, ">= 0"] | None = 1.0  # null or 0: no clipping
    gradient_checkpointing: bool = False  # less memory, about a third more compute
    torch_compile: bool = False
    # run the model's blocks compiled: faster steps after slow first ones, also after the cut; other dropout masks
    max_skipped_steps: Count = 10  # non-finite steps in a row that end the run
    seed: Annotated[int, ">= 0", "< 4294967296"] = 42  # of the order of rows, fresh adapters and dropout


@dataclass(frozen=True)
class Distributed:
    """How processes share the work.  Their number and placement are up to the launcher."""

    strategy: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3"] = "auto"  # auto: none alone, else zero2;
    # ddp with local updates; under --use_deepspeed the launcher's stage, else zero2
    sync_every: Count = 1  # above 1: local updates, that many optimizer steps between rounds; under ddp
    replica: Literal["process", "node"] = "process"  # unit that takes local steps; inside a node gradients are averaged
    outer_learning_rate: Annotated[float, "> 0"] = 1.0  # of the step from a round's start to the mean of A and B
    outer_momentum: Annotated[float, ">= 0", "< 1"] = 0.0  # Nesterov, over rounds
    check_every: Count = 100  # steps between checks that the processes agree
    timeout_minutes: Annotated[float, "> 0"] = 30.0  # how long a process waits for the others
    deepspeed_config: str | None = None  # a DeepSpeed JSON file, merged under our keys


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on the dev rows."""

    eval_steps: Count | None = None  # optimizer steps between evaluations; null: before and after training only
    per_device_eval_batch_size: Count = 8  # rows of a process in a forward pass without gradients
    sample_prompts: tuple[str, ...] = ()  # answered by base and adapter after the export
    early_stopping_patience: Count | None = None  # evaluations without improvement before finetune, or a stage,
    # ends; if set, finetune keeps the best adapter, even if the number is never reached (on a path the last)


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
    allow_empty_adapter: bool = False  # true: allow an adapter with every rank pruned
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
