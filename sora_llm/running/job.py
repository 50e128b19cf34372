"""A run before its weights: checked, planned, its data in memory, its processes in one group, its directory held."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sora_llm import terminal
from sora_llm.artifacts.lora_files import is_same_base, saved_base
from sora_llm.budget import EVERY_MODULE
from sora_llm.config import Config, Data, differing_keys, to_dict
from sora_llm.data.order import Order
from sora_llm.distributed import group
from sora_llm.distributed.collectives import any_process, gather_objects, on_every, on_main
from sora_llm.distributed.replicas import Replicas
from sora_llm.errors import Preempted, RunFailed, UserError
from sora_llm.estimates.memory import MemoryEstimate
from sora_llm.files import user_path
from sora_llm.hub import LOGIN, has_token
from sora_llm.local_updates import round_bytes, transfer_seconds
from sora_llm.prompt_form import has_conversations
from sora_llm.running import run_state
from sora_llm.running.data_words import describe_data
from sora_llm.running.inputs import Inputs
from sora_llm.running.lifeline import Lifeline
from sora_llm.running.loop import StepBatches, step_batches
from sora_llm.running.plan import Plan, Stage, so_many_steps
from sora_llm.running.stop import StopRequest
from sora_llm.running.training_data import TrainingData
from sora_llm.running.unpack import adapter_dtype, estimate_memory
from sora_llm.targets import ALL_LINEAR, left_out, matches, stacked_weights
from sora_llm.topology import ZERO_STAGES, World, deepspeed_config, read_deepspeed_config


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked and in memory, but for the weights."""

    inputs: Inputs
    plan: Plan
    world: World
    accelerator: Any
    data: TrainingData
    order: Order
    fingerprint: Mapping[str, int | str]
    stop: StopRequest
    lifeline: Lifeline
    replicas: Replicas | None = None
    """Who takes local steps; None where all processes step together."""

    def heed_stop(self) -> None:
        """Raise Preempted on every process if one of them was asked to stop (collective)."""
        reason = self.stop.reason(look_for_file=self.world.is_main)
        if any_process(reason is not None, self.accelerator.device):
            process, asked_by = next((i, said) for i, said in enumerate(gather_objects(reason)) if said is not None)
            raise Preempted(asked_by if process == 0 else f"{asked_by} to process {process}")

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def step_size(self) -> str:
        """What a step takes, in words."""
        unit = "packed sequence" if self.config.data.sample_packing else "row"
        return f"{self.plan.rows_per_step} {unit}{'s' if self.plan.rows_per_step > 1 else ''}"

    @property
    def processes(self) -> str:
        """How many there are, in words."""
        return f"{self.world.num_processes} process{'es' if self.world.num_processes > 1 else ''}"

    def batches(self, step: int) -> StepBatches:
        """What optimizer step `step` trains on."""
        packed = self.config.data.sample_packing
        batch_size = self.config.train.per_device_train_batch_size
        together, rotation = None, 0
        if self.replicas is not None:
            together, rotation = self.replicas.own_members, step * self.replicas.stride
        return step_batches(
            self.order.step(step),
            self.world,
            batch_size,
            lambda rows: self.inputs.batch(rows, packed=packed),
            together,
            rotation,
        )

    @property
    def num_averaging(self) -> int:
        """How many processes average their gradients."""
        return self.world.num_processes if self.replicas is None else len(self.replicas.own_members)

    @property
    def memory(self) -> MemoryEstimate:
        """The estimate of a process's memory."""
        inputs, strategy = self.inputs, self.plan.strategy
        return estimate_memory(self.config, inputs.backbone, inputs.skeleton, strategy, self.world.num_processes)


def announce(job: Job) -> None:
    """Say what is about to run."""
    plan, world = job.plan, job.world
    memory = job.memory
    for line in describe_data(job.config, job.inputs, job.data, job.order):
        say(world, line)
    first = plan.stages[0]
    several = f"{len(plan.stages)} stages of " if plan.is_path else ""
    say(
        world,
        f"{plan.strategy} on {job.processes}; "
        f"{several}{so_many_steps(first.total_steps)} of {job.step_size}, {pruning(first)}; "
        f"{memory.trainable_parameters:,} trainable parameters beside {memory.frozen_parameters:,} frozen ones "
        f"({job.inputs.backbone.form}); gate_lr "
        + ", ".join(dict.fromkeys(f"{stage.gate_lr:.4g}" for stage in plan.stages)),
    )
    if job.replicas is not None:
        say(world, local_updates(job, job.replicas))
    if plan.config.model.adapter is not None:
        say(world, f"starting from the adapter {plan.config.model.adapter}")
    for budget in plan.budgets:
        of = "" if len(plan.budgets) == 1 else f" of {budget.name}"
        say(
            world,
            f"budget{of}: mean rank {budget.mean_rank(budget.params):.4g} of {budget.mean_rank(budget.full):.4g} "
            f"({budget.params:,} of {budget.full:,} parameters), {plan.config.sora.threshold}",
        )
    for line in warnings(plan, job.inputs.skeleton):
        say(world, f"warning: {line}")


def pruning(stage: Stage) -> str:
    """When gates are pruned, in words."""
    first, end = stage.weighed_at, stage.phases.sparsify_end
    return f"pruning in steps {first + 1}–{end}" if first < end else f"pruned by the cut alone, at step {end}"


def local_updates(job: Job, replicas: Replicas) -> str:
    """A line about local updates: who takes local steps, and what a round costs."""
    settings = job.config.distributed
    num_bytes = round_bytes(job.memory.trainable_parameters, replicas.num)
    times = ", ".join(f"{transfer_seconds(num_bytes, link):.3g} s at {link}" for link in (1, 10, 100))
    outer = settings.outer_learning_rate, settings.outer_momentum
    how = "averaged" if outer == (1.0, 0.0) else f"merged by an outer step (lr {outer[0]:g}, momentum {outer[1]:g})"
    return (
        f"local updates: {replicas.num} replica{'s' if replicas.num > 1 else ''}, {how} every {settings.sync_every} "
        f"steps; a round moves {num_bytes / 2**20:.3g} MiB from and to each ({times} Gbit/s), ddp as much every step"
    )


def warnings(plan: Plan, skeleton: nn.Module) -> Iterator[str]:
    """Sentences about settings that are allowed and hardly meant."""
    sora, model = plan.config.sora, plan.config.model
    if model.adapter is not None:
        saved = saved_base(user_path(model.adapter, "model.adapter"))
        if saved and not is_same_base(saved, model.name_or_path):
            yield f"model.adapter is of the base {saved}, this run of {model.name_or_path}; are these one model?"
    if plan.config.output.push_to_hub and not has_token():
        yield f"output.push_to_hub needs a token of the hub by the end of the run, and there is none yet: {LOGIN}"
    if sora.target_modules == ALL_LINEAR and (stacked := stacked_weights(skeleton)):
        yield f"no adapter is put on {', '.join(stacked)}, which are in no linear layer"
    without: dict[str, dict[str, None]] = {}  # {reason: last names}
    for name, reason in left_out(skeleton).items():
        if sora.target_modules == ALL_LINEAR or matches(name, sora.target_modules):
            without.setdefault(reason, {})[name.rpartition(".")[2]] = None
    for reason, names in without.items():
        yield f"no adapter is put on {', '.join(names)}, {reason}"
    has_target = sora.target_rank is not None or sora.target_params is not None
    if sora.budgets and has_target and not any(budget.name == EVERY_MODULE for budget in plan.budgets):
        yield "sora.budgets matches every module; sora.target_rank or target_params decides nothing beside it"
    patience, interval = plan.config.evaluation.early_stopping_patience, plan.config.evaluation.eval_steps
    if patience is not None and interval is not None and (most := plan.most_evaluations(interval)) <= patience:
        yield (
            f"evaluation.early_stopping_patience {patience} can end nothing early: with eval_steps {interval} no more "
            f"than {most} evaluations count before the last step; lower one of them"
        )
    if plan.stages[0].learned_at > plan.stages[0].total_steps:
        yield (
            f"nothing is learned: the learning rate is 0 in all of {plan.stages[0].total_steps} steps (warm-up begins "
            "there); train longer, or set train.warmup_ratio 0"
        )
    elif any(stage.is_adaptive and stage.weighed_at == stage.phases.sparsify_end for stage in plan.stages):
        later = ", or raise sora.consensus_at" if sora.consensus_at < 1 else ""
        slots = " (of raw slots; sora.consensus svd keeps more)" if sora.consensus == "slots" else ""
        yield (
            "the sparsify phase has no step after the first one that learns something: gates are not pruned little by "
            f"little, and the cut alone brings the adapters to the budget{slots}; train longer{later}"
        )
    data = plan.config.data
    yield from _of_dev_rows(data)
    if not has_conversations((*data.datasets, *(data.val_datasets or ()))):
        for key, is_set in (
            ("chat_template", data.chat_template is not None),
            ("train_on_last_turn_only", data.train_on_last_turn_only),
        ):
            if is_set:
                yield f"data.{key} is for conversations, and no data set is made of them: it changes nothing here"
    travel = min(stage.gate_travel for stage in plan.stages)
    if travel < 1 and sora.threshold in ("decoupled", "proxgen"):
        yield (
            f"gates can travel {travel:.2f} in this run and none can get from 1 to 0; train longer, or raise "
            "sora.gate_lr"
        )
    highest = max(stage.sparse_lambda or 0.0 for stage in plan.stages)
    if sora.threshold == "decoupled" and highest >= 1:
        yield (f"λ is {highest:g}; from 1 on the decoupled threshold shrinks every gate whatever its gradient")


def _of_dev_rows(data: Data) -> Iterator[str]:
    """Sentences about dev rows that are trained on too, or written otherwise than the training rows."""
    for dev in data.val_datasets or ():
        same = [one for one in data.datasets if (one.path, one.split) == (dev.path, dev.split)]
        if same:
            yield f"the rows of data.val_datasets {dev.path} are trained on too; their loss says nothing of others"
        separators = {one.separator for one in data.datasets if one.type == dev.type == "prompt_completion"}
        if separators and dev.separator not in separators:
            yield (
                f"data.val_datasets {dev.path} has the separator {dev.separator!r} behind prompts, what is trained on "
                f"has {', '.join(map(repr, sorted(separators)))}"
            )


def say(world: World, text: str) -> None:
    """Print a line once, however many processes there are."""
    if world.is_main:
        terminal.say(text)


# ---------------------------------------------------------------------------------------------------- its processes


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
                f"the launcher brings a DeepSpeed config, {launcher_file}, and distributed.deepspeed_config names "
                "another; leave one of them out"
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
    lifeline: Lifeline,
) -> Iterator[Any]:
    """The accelerator of this run, ended with it; `lifeline` watches its processes meanwhile."""
    environ = dict(os.environ)
    accelerator = group.make_accelerator(
        strategy,
        world,
        deepspeed_config=zero_options,
        timeout_minutes=config.distributed.timeout_minutes,
        trackers=list(config.output.report_to),
        project_dir=str(run_dir / "trackers"),
    )
    lifeline.connect(world.process_index, world.num_processes, gather_objects)
    try:
        yield accelerator
    except Preempted:  # agreed by all
        lifeline.close()
        group.end(accelerator, environ)
        raise
    except BaseException as error:
        lifeline.close(failure=str(error) or type(error).__name__)
        # The others may be in a collective that this process will never join: leave the group to its end with us.
        if world.num_processes == 1:
            group.end(accelerator, environ)
        raise
    lifeline.close()
    group.end(accelerator, environ)


def waited_in_vain(process: int, minutes: float) -> RunFailed:
    """What a collective that other processes did not join comes to."""
    return RunFailed(
        f"process {process} waited {minutes:g} minutes (distributed.timeout_minutes) for the others, which did not "
        "come: one of them hangs, or is much slower"
    )


OWN_TO_A_MACHINE = r"data\.(val_)?datasets\.\d+\.path|data\.num_proc|data\.cache_dir|model\.name_or_path"
"""Keys whose values may differ between machines: places, of which the contents are compared."""


def refuse_differing_runs(config: Config, fingerprint: Mapping[str, int | str]) -> None:
    """UserError if processes have other configs or rows than the main one: each reads its own (collective).

    The config is the one that was given: what `auto` comes to may follow from the rows.
    """
    configs = gather_objects(to_dict(config))
    for process, other in enumerate(configs):
        if keys := [key for key in differing_keys(configs[0], other) if not re.fullmatch(OWN_TO_A_MACHINE, key)]:
            raise UserError(
                f"process {process} has another config than the main one, different in {', '.join(keys)}; start all "
                "with the same file and the same overrides"
            )
    for key, prefixed in (("data.datasets", False), ("data.val_datasets", True)):
        refuse_differing(key, {name: part for name, part in fingerprint.items() if name.startswith("dev_") == prefixed})


def refuse_differing(what: str, own: Any) -> None:
    """UserError if the value of a process is not the main one's (collective)."""
    for process, other in enumerate(found := gather_objects(own)):
        if other != found[0]:
            raise UserError(
                f"{what} is not the same everywhere: process {process} found something else than process 0; give every "
                "machine the same files"
            )


# ---------------------------------------------------------------------------------------------------- its directory


def hold_directory(job: Job, run_dir: Path, stack: contextlib.ExitStack) -> None:
    """Let the main process hold the run directory until the end of `stack` (collective).

    Raises:
        UserError: another run keeps it too long, or it cannot be written.
        Preempted: this run was asked to stop while it waited.
    """
    deadline = time.monotonic() + run_state.LOCK_WAIT_SECONDS

    def holder() -> str | None:
        """Who else holds it; None once this run does."""
        try:
            stack.enter_context(run_state.run_lock(run_dir, wait_seconds=1))
        except run_state.DirectoryInUse as error:
            if time.monotonic() > deadline:
                raise
            return error.holder
        return None

    has_said = False
    while (other := on_main(holder, job.world)) is not None:
        if not has_said:
            say(job.world, f"waiting up to {run_state.LOCK_WAIT_SECONDS} s for {run_dir}, which {other} holds")
            has_said = True
        job.heed_stop()
    if job.world.num_processes > 1:
        require_shared(run_dir, job.world)


def require_shared(run_dir: Path, world: World) -> None:
    """UserError unless all processes see one directory: checkpoints and exports are read back there (collective)."""

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

    mark = run_dir / on_main(leave_mark, world)
    try:
        on_every(lambda: see(mark))
    finally:
        if world.is_main:
            mark.unlink(missing_ok=True)


_VISIBLE_SECONDS = 90
"""Longer than NFS remembers by default what was there before (acdirmax, 60 s)."""
