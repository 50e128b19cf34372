"""A run before its weights are loaded: checked, planned, its data in memory, its directory locked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm import terminal
from sora_llm.config import Config
from sora_llm.data.order import Order
from sora_llm.distributed.collectives import any_process, gather_objects, on_main
from sora_llm.distributed.replicas import Replicas
from sora_llm.errors import Preempted
from sora_llm.estimates.memory import MemoryEstimate
from sora_llm.running import run_state
from sora_llm.running.inputs import Inputs
from sora_llm.running.liveness import LivenessMonitor
from sora_llm.running.optimizer_step import StepBatches, step_batches
from sora_llm.running.plan import Plan
from sora_llm.running.processes import require_shared
from sora_llm.running.run_state import RunLock
from sora_llm.running.stop import StopRequest
from sora_llm.running.training_data import TrainingData
from sora_llm.running.unpack import estimate_memory
from sora_llm.topology import World


@dataclass(frozen=True)
class Job:
    """Everything a run needs except the weights, checked and in memory."""

    inputs: Inputs
    plan: Plan
    world: World
    accelerator: Any
    data: TrainingData
    order: Order
    fingerprint: Mapping[str, int | str]
    stop: StopRequest
    liveness: LivenessMonitor
    replicas: Replicas | None = None
    """The replicas that take local steps; None if all processes step together."""

    def raise_if_stop_requested(self) -> None:
        """Raise Preempted on every process if one of them was asked to stop (collective)."""
        reason = self.stop.reason(look_for_file=self.world.is_main)
        if any_process(reason is not None, self.accelerator.device):
            process, asked_by = next((i, said) for i, said in enumerate(gather_objects(reason)) if said is not None)
            raise Preempted(asked_by if process == 0 else f"{asked_by} to process {process}")

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def rows_per_step_text(self) -> str:
        """The rows of a step, in words: "16 packed sequences"."""
        return terminal.plural(self.plan.rows_per_step, "packed sequence" if self.config.data.sample_packing else "row")

    def batches(self, step: int) -> StepBatches:
        """The batches that optimizer step `step` trains on."""
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

    def say(self, text: str) -> None:
        """Print a line once, regardless of the number of processes."""
        if self.world.is_main:
            terminal.say(text)


def hold_directory(job: Job, run_dir: Path, stack: contextlib.ExitStack) -> RunLock | None:
    """Let the main process hold the run directory until the end of `stack` (collective).

    Returns: its lock, None on the other processes.
    Raises:
        UserError: another run holds it too long, or it cannot be written.
        Preempted: this run was asked to stop while it waited.
    """
    deadline = time.monotonic() + run_state.LOCK_WAIT_SECONDS
    held: list[RunLock] = []

    def holder() -> str | None:
        """Who else holds it; None once this run does."""
        try:
            held.append(stack.enter_context(run_state.run_lock(run_dir, wait_seconds=1)))
        except run_state.DirectoryInUse as error:
            if time.monotonic() > deadline:
                raise
            return error.holder
        return None

    has_said = False
    while (other := on_main(holder)) is not None:
        if not has_said:
            job.say(f"waiting up to {run_state.LOCK_WAIT_SECONDS} s for {run_dir}, locked by {other}")
            has_said = True
        job.raise_if_stop_requested()
    if job.world.num_processes > 1:
        require_shared(run_dir)
    return held[0] if held else None
