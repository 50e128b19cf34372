"""The processes of a run: in one group, with the same config, rows and weights, in one directory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.config import Config, differing_keys, to_dict
from sora_llm.distributed import group
from sora_llm.distributed.collectives import gather_objects, is_main, on_every, on_main
from sora_llm.errors import Preempted, RunFailed, UserError
from sora_llm.running.liveness import LivenessMonitor, print_final_error
from sora_llm.running.unpack import adapter_dtype
from sora_llm.topology import ZERO_STAGES, World, deepspeed_config, read_deepspeed_config

_VISIBLE_SECONDS = 90
"""Longer than NFS caches the previous state of a folder by default (acdirmax, 60 s)."""


def deepspeed_options(config: Config, strategy: str) -> dict[str, Any] | None:
    """The DeepSpeed config of a ZeRO run, None for the other strategies."""
    user_file = config.distributed.deepspeed_config
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if strategy not in ZERO_STAGES:
        if user_file is not None and config.distributed.sync_every > 1:
            raise UserError("distributed.deepspeed_config is for ZeRO, and local updates run under ddp; leave it out")
        if user_file is not None:
            raise UserError(
                f"distributed.deepspeed_config is set but the strategy is {strategy}; use zero1, zero2 or zero3"
            )
        return None
    if launcher_file not in ("", "none"):
        if user_file is not None:
            raise UserError(
                f"the launcher passes a DeepSpeed config, {launcher_file}, and distributed.deepspeed_config names "
                "another; remove one of them"
            )
        user_file = launcher_file
    return deepspeed_config(
        strategy,
        max_grad_norm=config.train.max_grad_norm,
        adapter_dtype=adapter_dtype(config),
        user_config=None if user_file is None else read_deepspeed_config(user_file),
    )


@contextlib.contextmanager
def process_group(
    config: Config,
    strategy: str,
    world: World,
    run_dir: Path,
    zero_options: dict[str, Any] | None,
    liveness: LivenessMonitor,
) -> Iterator[Any]:
    """The accelerator of this run, shut down at its end; `liveness` watches its processes meanwhile."""
    environ = dict(os.environ)
    accelerator = group.make_accelerator(
        strategy,
        world,
        deepspeed_config=zero_options,
        timeout_minutes=config.distributed.timeout_minutes,
        trackers=list(config.output.report_to),
        project_dir=str(run_dir / run_files.TRACKERS),
    )
    try:
        liveness.connect(world.process_index, world.num_processes, gather_objects)
    except RuntimeError as error:
        failure = None if isinstance(error, RunFailed) else group.lost_partner(world, error)
        if failure is None:
            raise
        if world.process_index == 1:  # the main process prints for all, but it may be the one that is gone
            print_final_error(str(failure))
        raise failure from error
    try:
        yield accelerator
    except Preempted:  # agreed by all
        liveness.close()
        group.end(accelerator, environ)
        raise
    except BaseException as error:
        lost = None if isinstance(error, UserError | RunFailed) else liveness.wait_for_lost_process()
        liveness.close(failure=str(error) or type(error).__name__)
        if lost is not None:  # before the run had begun, or it would have been reported there
            if world.process_index == 1 and lost.startswith("process 0 "):  # which prints for all
                print_final_error(lost)
            raise RunFailed(f"{lost}; run the same command again") from error
        # The others may be in a collective that this process will never join: let the group end with this process.
        if world.num_processes == 1:
            group.end(accelerator, environ)
        raise
    liveness.close()
    group.end(accelerator, environ)


def timeout_failure(process: int, minutes: float) -> RunFailed:
    """The error for a collective that other processes did not join in time."""
    return RunFailed(
        f"process {process} waited {minutes:g} minutes (distributed.timeout_minutes) for the others: one of "
        "them hangs, or is much slower"
    )


MACHINE_LOCAL_KEYS = r"data\.(val_)?datasets\.\d+\.path|data\.num_proc|data\.cache_dir|model\.name_or_path"
"""Keys whose values may differ between machines: mostly paths, whose contents are compared instead."""


def refuse_differing_runs(config: Config, fingerprint: Mapping[str, int | str]) -> None:
    """UserError if processes have different configs or rows from the main one: each reads its own (collective).

    The config is compared as given, since the value of an `auto` may depend on the rows.
    """
    configs = gather_objects(to_dict(config))
    for process, other in enumerate(configs):
        if keys := [key for key in differing_keys(configs[0], other) if not re.fullmatch(MACHINE_LOCAL_KEYS, key)]:
            raise UserError(
                f"the config of process {process} differs from the main process's in {', '.join(keys)}; start all "
                "with the same file and the same overrides"
            )
    for key, prefixed in (("data.datasets", False), ("data.val_datasets", True)):
        refuse_differing(key, {name: part for name, part in fingerprint.items() if name.startswith("dev_") == prefixed})


def refuse_differing(what: str, own: Any) -> None:
    """UserError if a process's value differs from the main one's (collective)."""
    for process, other in enumerate(found := gather_objects(own)):
        if other != found[0]:
            raise UserError(
                f"{what} is not the same everywhere: process {process} differs from process 0; give every machine the "
                "same files"
            )


def require_shared(run_dir: Path) -> None:
    """UserError unless all processes see one directory: checkpoints and exports are read back from it (collective)."""

    def leave_mark() -> str:
        mark = run_dir / f".{secrets.token_hex(8)}.tmp"
        mark.touch()
        return mark.name

    def see(mark: Path) -> None:
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not mark.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"output.output_dir {run_dir} on {socket.gethostname()} is not the folder that the main process "
                    "writes: name one on a file system that all machines share"
                )
            time.sleep(0.2)

    mark = run_dir / on_main(leave_mark)
    try:
        on_every(lambda: see(mark))
    finally:
        if is_main():
            mark.unlink(missing_ok=True)
