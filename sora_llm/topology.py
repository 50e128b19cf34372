"""The launcher's environment and the strategy that follows from it; no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm.errors import UserError
from sora_llm.terminal import plural

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
OWN_KEYS = {
    "optimizer": "set train.learning_rate, train.weight_decay and sora.gate_lr",
    "scheduler": "set train.lr_scheduler_type and train.warmup_ratio (or warmup_steps)",
    "amp": "set model.dtype",
    "torch_autocast": "set model.dtype",
    "train_batch_size": "set train.per_device_train_batch_size and train.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "set train.per_device_train_batch_size",
    "gradient_accumulation_steps": "set train.gradient_accumulation_steps",
    "gradient_clipping": "set train.max_grad_norm",
}
"""Keys of a DeepSpeed config, and what to set instead."""
NEEDED = {
    "communication_data_type": (None, "fp32"),
    "compute_grad_norm": (True,),
    "data_types.grad_accum_dtype": (None,),  # the adapter's dtype
}
"""Keys of a DeepSpeed config that change gradients, and the values that do not; the first is the default."""
REDUCE_BUCKET_ELEMENTS = 2**24
"""Gradients that ZeRO reduces at a time, in a buffer that it allocates for that many.  DeepSpeed's own default is 5e8,
2 GB in float32, and adapters have far fewer."""
DDP_OPTIONS: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
"""Options of DistributedDataParallel: gradients lie in the buckets that are reduced, or each would exist twice."""
_PRECISION_OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


@dataclass(frozen=True)
class World:
    """The process group as announced by the launcher in the environment."""

    num_processes: int
    process_index: int
    local_process_index: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.process_index == 0


ALONE = World(num_processes=1, process_index=0, local_process_index=0)
"""For a command that is a single process, whatever the environment says."""


def is_main_process(environ: Mapping[str, str]) -> bool:
    """Whether this is process 0 according to the launcher, right or wrong."""
    return environ.get("RANK", "0") == "0"


def launched_world(environ: Mapping[str, str]) -> World:
    """Read WORLD_SIZE, RANK and LOCAL_RANK (torchrun, accelerate); one process if they are missing.

    SORA_EXPECTED_WORLD_SIZE, if set, must agree: otherwise a multi-node launch whose nodes did not find each other
    starts several complete small worlds.
    """
    try:
        world = World(
            num_processes=int(environ.get("WORLD_SIZE", 1)),
            process_index=int(environ.get("RANK", 0)),
            local_process_index=int(environ.get("LOCAL_RANK", environ.get("RANK", 0))),
        )
    except ValueError as error:
        raise UserError(f"WORLD_SIZE, RANK and LOCAL_RANK must be whole numbers ({error})") from None
    expected = environ.get("SORA_EXPECTED_WORLD_SIZE")
    if expected is not None and expected != str(world.num_processes):
        raise UserError(
            f"the launcher started {plural(world.num_processes, 'process')} but SORA_EXPECTED_WORLD_SIZE is "
            f"{expected}; check the number of machines and the rendezvous address"
        )
    return world


def refuse_lone_process(
    environ: Mapping[str, str], told: Mapping[str, str] | None = None, launcher: Mapping[str, str] | None = None
) -> None:
    """UserError in the only process that `accelerate launch --num_processes N` starts if it finds no devices for N: it
    then sets their rendezvous address, and nothing else.

    `told` is the environment this process was started with, `launcher` that of its launcher, both read from the system
    by default; an address that is the same in both, or a launcher that cannot be read, proves nothing.
    """
    told = _environment_of(os.getpid()) if told is None else told
    if "WORLD_SIZE" in environ or "ACCELERATE_MIXED_PRECISION" not in told or "MASTER_ADDR" not in told:
        return
    launcher = _environment_of(os.getppid()) if launcher is None else launcher
    if launcher and launcher.get("MASTER_ADDR") != told["MASTER_ADDR"]:
        raise UserError(
            "accelerate launch was asked for several processes but started only this one: without --multi_gpu (also "
            "right on CPUs) or --use_deepspeed it starts no group; add one of them, or --num_processes 1"
        )


def _environment_of(process: int) -> dict[str, str]:
    """The environment that a process of this machine was started with; {} if it cannot be read."""
    try:
        content = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)


def resolve_strategy(
    strategy: str, world: World, environ: Mapping[str, str], dtype: str, *, sync_every: int = 1
) -> str:
    """The strategy a run uses: none, ddp, zero1, zero2 or zero3.

    `auto` is none for one process and zero2 for several; under `accelerate launch --use_deepspeed` it is the stage
    that the launcher states, else zero2.  `dtype` is the config's model.dtype.  Local updates (`sync_every` above 1)
    run under ddp: ZeRO's processes hold shards of one optimizer and have to step together.

    Raises:
        UserError: the launcher contradicts the config (both are named).
    """
    under_deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    _refuse_other_precision(environ, dtype)
    if not under_deepspeed:
        if environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise UserError(
                "the launcher asks for FSDP, which is not supported; use distributed.strategy zero2 or zero3"
            )
        if strategy == "auto":
            several = "zero2" if sync_every == 1 else "ddp"
            return "none" if world.num_processes == 1 else several
        if strategy == "none" and world.num_processes > 1:
            raise UserError(
                f"distributed.strategy is none but the launcher started {world.num_processes} processes; "
                "use auto, ddp, zero1, zero2 or zero3, or launch one process"
            )
        return strategy
    if sync_every > 1:
        raise UserError(
            f"distributed.sync_every is {sync_every} but the launcher was given --use_deepspeed, whose processes step "
            "together; launch with --multi_gpu instead, or set sync_every to 1"
        )
    if strategy in ("none", "ddp"):
        raise UserError(
            f"distributed.strategy is {strategy} but the launcher was given --use_deepspeed; "
            "launch without that flag, or set the strategy to zero1, zero2 or zero3"
        )
    stated = _stated_stage(environ)
    if strategy == "auto":
        return f"zero{stated}" if stated else "zero2"
    if stated and stated != ZERO_STAGES[strategy]:
        raise UserError(
            f"distributed.strategy is {strategy} but the launcher sets ZeRO stage {stated}; make them agree, or "
            "set the stage in the config only"
        )
    return strategy


def refuse_other_step(
    environ: Mapping[str, str], gradient_accumulation_steps: int, max_grad_norm: float | None
) -> None:
    """UserError if the launcher, as accelerate does under --use_deepspeed, sets accumulation or clipping to a value
    that differs from the config; its default, 1 for either, does not count."""
    for flag, key, own in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", gradient_accumulation_steps),
        ("gradient_clipping", "max_grad_norm", max_grad_norm or 0),
    ):
        stated = environ.get(f"ACCELERATE_{flag.upper()}", "none").strip().lower()
        try:
            agrees = stated in ("none", "auto", "") or float(stated) in (1, own)
        except ValueError:
            agrees = False
        if not agrees:
            raise UserError(
                f"the launcher sets {flag} to {stated} but train.{key} is {own:g}; set it in the config only: launch "
                f"without --{flag}, and without that key in the launcher's own config file"
            )


def _refuse_other_precision(environ: Mapping[str, str], dtype: str) -> None:
    stated = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if stated not in ("no", "", _PRECISION_OF_DTYPE[dtype]):
        raise UserError(
            f"the launcher sets --mixed_precision {stated} but model.dtype is {dtype}; set precision in the config "
            "only: launch with --mixed_precision no"
        )


def _stated_stage(environ: Mapping[str, str]) -> int | None:
    """The ZeRO stage in ACCELERATE_DEEPSPEED_ZERO_STAGE or in the launcher's DeepSpeed config file."""
    device = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    if device not in ("none", ""):
        raise UserError(
            f"the launcher asks for optimizer offload to {device}, which would replace the proximal optimizer; "
            "launch without --offload_optimizer_device (adapter state is small)"
        )
    device = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if device not in ("none", ""):
        raise UserError(
            f"the launcher asks for parameter offload to {device}, which is only read from a DeepSpeed config; launch "
            "without --offload_param_device, and set it in the distributed.deepspeed_config file"
        )
    config_file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    stage: Any = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if config_file and config_file != "none":
        stated = read_deepspeed_config(config_file)
        _refuse_optimizer_offload(stated)
        stage = _section(stated, "zero_optimization").get("stage", stage)
    if stage is None or stage == "auto":
        return None
    if str(stage) not in ("1", "2", "3"):
        raise UserError(f"the launcher sets ZeRO stage {stage}; stages 1, 2 and 3 are supported")
    return int(stage)


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON config file as a dict; UserError if it is missing or is not a JSON object."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the DeepSpeed config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the DeepSpeed config {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"the DeepSpeed config {path} must hold a JSON object")
    return content


def deepspeed_config(
    strategy: str, *, max_grad_norm: float | None, adapter_dtype: str, user_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed config of a run: the user's, merged under ours.

    Gradient accumulation is 1 here: the loop sets the boundary itself, so the last, smaller step of an epoch can have
    fewer micro-batches.  bf16 is enabled only for bf16 adapters; float32 adapters train as they are on a backbone of
    any dtype.

    Raises:
        UserError: a user's key that contradicts ours, or optimizer offload.
    """
    is_bf16 = adapter_dtype == "bfloat16"
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only for accounting: the loader cuts the batches
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": {
            "stage": ZERO_STAGES[strategy],
            "reduce_bucket_size": reduce_bucket_elements(user_config),
        },
        # check_grad_overflow: with it, all processes agree on a non-finite gradient and skip the step
        "bf16": {"enabled": True, "check_grad_overflow": True} if is_bf16 else {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }
    quiet = {"steps_per_print": 10**9}
    if user_config is None:
        return quiet | ours
    _refuse_optimizer_offload(user_config)
    for key, own in OWN_KEYS.items():
        if user_config.get(key, "auto") not in ("auto", ours.get(key, "auto")):
            value = user_config[key]
            to = "" if isinstance(value, Mapping) else f" to {value!r}"
            raise UserError(
                f"the DeepSpeed config sets {key}{to}, which belongs to this run's YAML; remove it there, and {own}"
            )
    for key, needed in NEEDED.items():
        section, _, name = key.rpartition(".")
        value = (_section(user_config, section) if section else user_config).get(name, needed[0])
        if value not in needed:
            raise UserError(
                f"the DeepSpeed config sets {key} to {value!r}, which would change gradients compared to the other "
                "strategies; remove that key"
            )
    return quiet | _merged_under(user_config, ours, "")


def reduce_bucket_elements(user_config: Mapping[str, Any] | None) -> int:
    """How many gradients ZeRO reduces at a time, by the user's DeepSpeed config or ours."""
    said = _section(user_config or {}, "zero_optimization").get("reduce_bucket_size", "auto")
    return int(said) if isinstance(said, int | float) else REDUCE_BUCKET_ELEMENTS


def _refuse_optimizer_offload(config: Mapping[str, Any]) -> None:
    zero = _section(config, "zero_optimization")
    if _section(zero, "offload_optimizer").get("device", "none") != "none" or zero.get("cpu_offload"):  # its old name
        raise UserError(
            "the DeepSpeed config offloads the optimizer, which would replace the proximal optimizer; remove "
            "zero_optimization.offload_optimizer, or cpu_offload as it was called (adapter state is small)"
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"the DeepSpeed config sets {name} to {section!r}; it must be a JSON object")
    return section


def _merged_under(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(theirs)
    for key, value in ours.items():
        given = theirs.get(key, "auto")
        if isinstance(value, dict) and isinstance(given, Mapping):
            merged[key] = _merged_under(given, value, f"{prefix}{key}.")
        elif given in ("auto", value):
            merged[key] = value
        else:
            raise UserError(
                f"the DeepSpeed config sets {prefix}{key} to {given!r} but this run needs {value!r}; remove that key"
            )
    return merged
