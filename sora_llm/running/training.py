"""The state of a run during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sora_llm.distributed.engine import Engine
from sora_llm.running.alarms import Alarms
from sora_llm.running.early_stopping import EarlyStopping
from sora_llm.running.job import Job
from sora_llm.running.optimizer_step import Tally
from sora_llm.running.plan import Stage
from sora_llm.running.rounds import Rounds
from sora_llm.running.rundir import RunDirectory
from sora_llm.sparsity_controller import SparsityController


@dataclass(frozen=True)
class Best:
    """The adapter with the lowest dev loss in the finetune phase; `masters` is {} except on the main process."""

    step: int
    eval_loss: float
    masters: Mapping[str, Tensor]


@dataclass
class Training:
    """A run in the middle of its loop.  `done` counts the optimizer steps taken, `stage_start` those before the current
    stage."""

    job: Job
    directory: RunDirectory
    engine: Engine
    tally: Tally
    controller: SparsityController
    alarms: Alarms
    early_stopping: EarlyStopping
    rounds: Rounds | None = None
    """Rounds of local updates; None if all processes step together."""
    stage_number: int = 0
    stage_start: int = 0
    done: int = 0
    stage_is_done: bool = False
    """Whether the last step of the stage was taken; patience may have chosen which one that is."""
    unlogged_round: Mapping[str, Any] = field(default_factory=dict)
    """Fields still to be logged for a round that ended after the last step's line."""
    best: Best | None = None
    """Set if patience counts evaluations of the finetune phase."""
    measured: int | None = None
    """The step whose dev loss was last measured by this process."""
    full_params: int = 0
    """Number of adapter parameters before anything is cut."""
    base_digest: str | None = None
    """Of the base's weights; None if they are not safetensors."""
    unlogged: Mapping[str, Any] | None = None
    """Fields that the line of step `done` needs, if the run was interrupted before it could be written."""

    @property
    def stage(self) -> Stage:
        return self.job.plan.stages[self.stage_number]

    @property
    def phase(self) -> str:
        """The phase of the last step taken."""
        return self.stage.phases.at(max(0, self.done - self.stage_start - 1))

    @property
    def agrees(self) -> bool:
        """Whether all processes hold the same adapter: always, except inside a round of local updates."""
        return self.rounds is None or self.rounds.in_agreement

    def check_agreement(self) -> None:
        """Compare the values that the processes should share, between steps (collective).

        Raises:
            RunFailed: they differ.
        """
        if self.rounds is None:
            self.engine.check_agreement()
        else:
            self.rounds.prove(self.engine)

    @property
    def labels(self) -> dict[str, Any]:
        """The fields that every line of metrics and ranks has in a path run; {} in others."""
        if not self.job.plan.is_path:
            return {}
        return {"stage": self.stage_number, "sparse_lambda": self.stage.sparse_lambda}


def make_controller(job: Job, stage_number: int) -> SparsityController:
    """A fresh controller for a stage."""
    sparse_lambda = job.plan.stages[stage_number].sparse_lambda
    return SparsityController(str(job.config.sora.threshold), job.plan.budgets, sparse_lambda)
