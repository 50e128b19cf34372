"""Joining and leaving the process group: the accelerator and its guards."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from sora_llm.errors import RunFailed, UserError, first_line
from sora_llm.extensions import await_build
from sora_llm.terminal import say
from sora_llm.topology import ALONE, DDP_OPTIONS, ZERO_STAGES, World

_UNREACHABLE = re.compile(r"connect|closed by peer|timed out|timeout|rendezvous|Broken pipe|reset by", re.IGNORECASE)


def local_device() -> torch.device:
    """The device of a command, which runs as a single process."""
    return make_accelerator("none", ALONE).device


def uses_cuda() -> bool:
    """Whether processes run on GPUs, as far as this machine and the launcher say."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def make_accelerator(
    strategy: str,
    world: World,
    *,
    deepspeed_config: dict[str, Any] | None = None,
    timeout_minutes: float = 30,
    trackers: list[str] | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """The Accelerator of a strategy, on CPU (gloo) or CUDA (nccl), with assertions against its silent failures.

    The backend is named: otherwise accelerate under DeepSpeed on a CPU reports one process on every process.
    `mixed_precision` is always "no": the config sets dtypes, nothing runs under autocast.
    """
    cuda = uses_cuda()
    if cuda and world.local_process_index >= torch.cuda.device_count():
        raise UserError(
            f"process {world.local_process_index} of this machine has no GPU of its own (there are "
            f"{torch.cuda.device_count()}); launch that many processes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if world.num_processes == 1 and strategy != "none":
        _announce_single_process_world()
    handlers: list[Any] = []
    if strategy != "none":
        backend = "nccl" if cuda else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_minutes)))
        handlers.append(DistributedDataParallelKwargs(**DDP_OPTIONS))
    options: dict[str, Any] = {"mixed_precision": "no", "log_with": trackers or None, "kwargs_handlers": handlers}
    if project_dir is not None:
        options["project_config"] = ProjectConfiguration(project_dir=project_dir, logging_dir=project_dir)
    if strategy in ZERO_STAGES:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # The launcher's DeepSpeed settings: accelerate refuses them next to a config like ours, or cannot read them,
        # and `resolve_strategy` and `refuse_other_step` have already compared those that matter.
        for name in ("CONFIG_DS_FIELDS", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
            os.environ.pop(f"ACCELERATE_{name}", None)
        _quiet_deepspeed(cuda)
        if not cuda:  # there, it compiles an operator
            await_build(lambda text: say(text, sys.stderr) if world.is_main else None)
        # Not zero.Init: transformers skips it for quantised models, so every process loads the whole model anyway.
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config, zero3_init_flag=False)
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        options["cpu"] = not cuda  # without it, several CPU processes are never synchronised
    if strategy == "none":
        os.environ.pop("LOCAL_RANK", None)  # from torchrun with one process: accelerate would make a group of one
    quiet = contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet:  # DeepSpeed prints on every process what it compiled
            accelerator = Accelerator(**options)
    except RuntimeError as error:
        if (failure := lost_partner(world, error)) is None:
            raise
        raise failure from error
    _assert_world(accelerator, strategy, world)
    return accelerator


def lost_partner(world: World, error: RuntimeError) -> RunFailed | None:
    """What to raise for torch's error if it says that another process has left, or cannot be reached, while the group
    is formed; None if it says something else."""
    if not isinstance(error, dist.DistError) and not _UNREACHABLE.search(str(error)):  # gloo's are plain ones
        return None
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return RunFailed(
        f"process {world.process_index} on {socket.gethostname()} could not form a group of {world.num_processes} with "
        f"the others at {where} ({str(error).splitlines()[0]}); one of them has ended (see its output), or the "
        "machines cannot reach each other"
    )


def _quiet_deepspeed(cuda: bool) -> None:
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # it prints on import
        from deepspeed.utils import logger
    logger.setLevel("ERROR")


def _announce_single_process_world() -> None:
    """For DDP and ZeRO with one process and no launcher: set the environment that torch.distributed needs."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)


def _assert_world(accelerator: Accelerator, strategy: str, world: World) -> None:
    kinds = {
        "none": {DistributedType.NO},
        "ddp": {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.NO},
    }.get(strategy, {DistributedType.DEEPSPEED})
    group_size = dist.get_world_size() if dist.is_initialized() else 1
    assert accelerator.num_processes == group_size == world.num_processes, (
        f"accelerate sees {accelerator.num_processes} processes, torch {group_size}, the launcher {world.num_processes}"
    )
    assert accelerator.distributed_type in kinds, f"strategy {strategy} was prepared as {accelerator.distributed_type}"
    assert world.num_processes == 1 or accelerator.distributed_type != DistributedType.NO


def end(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """Close trackers and the process group, and forget both, so that this process can run again.

    `environ` is the content of os.environ before `make_accelerator`.
    """
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # from any library: a finished run stays finished
            say(f"warning: output.report_to: {tracker.name} could not be ended: {first_line(error)}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:  # its groups belong to the destroyed process group
        import deepspeed

        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)
