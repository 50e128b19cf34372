"""Required keys, and combinations that are not allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sora_llm.config.origin import Origin, value_of
from sora_llm.config.schema import Config, Data, Dataset, Train
from sora_llm.errors import UserError
from sora_llm.row_types import FIELDS


def check_required(config: Config, origin: Origin) -> None:
    """UserError for a required key that is not set, or for more than one of several alternatives."""
    for key, example in (
        ("model.name_or_path", "a hub id or a local folder"),
        ("data.datasets", "a list of {path: …, type: …}"),
        ("output.output_dir", "the folder that the run writes"),
    ):
        if not value_of(config, key):
            raise UserError(f"{key} is missing in {origin.file}; set it to {example}.")
    for key, dataset in _datasets(config.data):
        if not dataset.path:
            raise UserError(f"{key}.path is missing in {origin.file}; set it to a file, a folder or a hub id.")
    _check_one_of(config, origin, ("train.max_steps", "train.num_train_epochs"))
    strength = ("sora.target_rank", "sora.target_params", "sora.sparse_lambda")
    _check_one_of(config, origin, strength, none_is_fine=bool(config.sora.budgets))  # they may cover all modules
    _check_one_of(config, origin, ("data.val_set_size", "data.val_datasets"), none_is_fine=True)


def _check_one_of(config: Config, origin: Origin, keys: tuple[str, ...], none_is_fine: bool = False) -> None:
    stated = [key for key in keys if value_of(config, key) is not None]
    if not stated and not none_is_fine:
        example = " (sora.target_rank: 8 keeps a mean rank of 8)" if "sora.target_rank" in keys else ""
        raise UserError(f"None of {', '.join(keys)} is set in {origin.file}; set exactly one of them{example}.")
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


def check_combinations(config: Config, origin: Origin) -> None:
    """UserError for the first invalid combination of settings."""
    problems = [
        *_sora_problems(config, origin),
        *_train_problems(config, origin),
        *_replica_problems(config, origin),
        *_backbone_problems(config, origin),
        *_evaluation_problems(config, origin),
        *_data_problems(config),
    ]
    if config.output.hub_model_id is not None and not config.output.push_to_hub:
        stated = origin.state(config, "output.hub_model_id")
        problems.append(f"{stated} is set, but nothing is uploaded; set output.push_to_hub to true.")
    if problems:
        raise UserError(problems[0])


def _sora_problems(config: Config, origin: Origin) -> Iterator[str]:
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
            yield f"{state(name)} needs a budget; set sora.target_rank, not sora.sparse_lambda, or leave it out."
    for pattern, rank in sora.budgets.items():
        if rank > sora.r:
            yield f"sora.budgets {pattern!r} is {rank:g}, above {state('r')}; the mean kept rank can be at most r."
    if sora.threshold == "adaptive" and budget is None:
        yield f"{state('threshold')} needs a budget; set sora.target_rank, or use decoupled."
    if sora.threshold in ("proxgen", "constant") and budget is not None:
        yield f"{state('threshold')} does not work with {state(budget)}; use auto, adaptive or decoupled."
    yield from _path_problems(config, state)
    if sora.dtype == "bfloat16" and config.model.dtype != "bfloat16":
        yield f"{state('dtype')} needs model.dtype bfloat16, not {config.model.dtype}; change one of them."


def _path_problems(config: Config, state: Callable[[str], str]) -> Iterator[str]:
    """Problems with a sparsity path, which is a stage per λ, or with settings that only apply to one."""
    sora = config.sora
    patience = config.evaluation.early_stopping_patience
    if sora.lambda_num == 1:
        for name, default in (("lambda_schedule", "constant"), ("max_lambda", None), ("retrain", True)):
            if getattr(sora, name) != default:
                yield f"{state(name)} needs a sparsity path; set sora.lambda_num above 1, or leave it out."
        if patience is not None and sora.consensus_at == 1.0:
            yield (
                "evaluation.early_stopping_patience ends the finetune phase, and with sora.consensus_at 1.0 there is "
                "none; lower sora.consensus_at, or leave the patience out."
            )
        return
    if sora.sparse_lambda is None:
        yield f"{state('lambda_num')} makes a sparsity path, whose stages have a λ each; set sora.sparse_lambda."
    elif sora.max_lambda is None or sora.max_lambda <= sora.sparse_lambda:
        yield f"{state('max_lambda')} must be above {state('sparse_lambda')}: λ rises from the latter to the former."
    if sora.lambda_schedule == "constant":
        yield f"{state('lambda_schedule')} is one λ; use linear, log_linear or exp_linear for {sora.lambda_num} stages."
    if sora.lambda_schedule == "exp_linear" and sora.sparse_lambda == 0:
        yield f"{state('sparse_lambda')} must be above 0 with lambda_schedule exp_linear, which multiplies it."
    if sora.consensus_at != 1.0:
        yield f"{state('consensus_at')} must be 1.0 in a sparsity path: each stage continues from uncut weights."
    if not sora.retrain and sora.threshold != "constant":
        yield f"{state('retrain')} needs sora.threshold constant: the others' threshold is lr · λ, and lr would be 0."


def _train_problems(config: Config, origin: Origin) -> Iterator[str]:
    train = config.train
    if train.warmup_steps is not None and train.warmup_ratio != Train().warmup_ratio:
        steps, ratio = (origin.state(config, f"train.{name}") for name in ("warmup_steps", "warmup_ratio"))
        yield f"{steps} and {ratio} both say how long the warm-up is; leave one out, or set train.warmup_steps to null."
    if train.min_lr_ratio > 0 and train.lr_scheduler_type not in ("linear", "cosine"):
        floor, kind = (origin.state(config, f"train.{name}") for name in ("min_lr_ratio", "lr_scheduler_type"))
        yield f"{floor} is where a falling learning rate ends, and {kind} does not fall; change one of them."


def _replica_problems(config: Config, origin: Origin) -> Iterator[str]:
    """Problems with the settings of local updates."""
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
            yield f"{state(name)} needs local updates; set distributed.sync_every above 1, or leave it out."


def _backbone_problems(config: Config, origin: Origin) -> Iterator[str]:
    four, eight = "quantization.load_in_4bit", "quantization.load_in_8bit"
    if config.quantization.load_in_4bit and config.quantization.load_in_8bit:
        both = f"{origin.state(config, four)} and {origin.state(config, eight)}"
        yield f"{both} are mutually exclusive; set one to false."


def _evaluation_problems(config: Config, origin: Origin) -> Iterator[str]:
    for name in ("eval_steps", "early_stopping_patience"):
        needs_dev_rows = getattr(config.evaluation, name) is not None
        if needs_dev_rows and not config.data.has_dev_rows:
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
                    f"{key}.columns maps {name!r}, which is not a field of type {dataset.type}; "
                    f"its fields are {', '.join(allowed) or 'the function’s own'}, each mapped to a column of the file."
                )
        if dataset.separator and dataset.type != "prompt_completion":
            yield f"{key}.separator is only for type prompt_completion, not {dataset.type}; leave it out."
        if dataset.type == "custom" and dataset.function is None:
            yield f"{key} is of type custom and has no function; set it to module:function, from a row to messages."
        if dataset.type != "custom" and dataset.function is not None:
            yield f"{key}.function is only for type custom; its type is {dataset.type}."
    if data.excess_length == "split" and all(dataset.type != "completion" for _, dataset in _datasets(data)):
        yield "data.excess_length split is for plain text (type completion), and no data set is; use drop or truncate."
    yield from _mixture_problems(data.datasets)
    for index, dataset in enumerate(data.val_datasets or ()):
        for name in ("weight", "streaming"):
            if getattr(dataset, name):
                yield f"data.val_datasets.{index}.{name} is not for dev rows, which are all read; leave it out."
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
            yield f"data.datasets.{stated[0]} has {name} and data.datasets.{without} does not: {rule}."


def _streaming_problems(config: Config) -> Iterator[str]:
    if config.train.num_train_epochs is not None:
        yield (
            "data.datasets are streamed, so the length of an epoch is unknown; "
            "set train.max_steps, and train.num_train_epochs to null."
        )
    if config.data.val_set_size is not None:
        yield "data.val_set_size cannot hold out rows of streamed data sets; name dev rows in data.val_datasets."
    if config.data.drop_duplicates:
        yield "data.drop_duplicates would have to remember every row of a streamed data set; set it to false."
