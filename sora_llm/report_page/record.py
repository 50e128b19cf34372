"""The contents of a run directory as the page shows them, and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from sora_llm.report_page.grids import Grid, grids_of
from sora_llm.report_page.untrusted import as_int, as_mapping, as_number, certified_ranks, is_step, setting
from sora_llm.schedule import DENSE, FINETUNE, SPARSIFY, Phases, phases

TRAINING_PHASES = (DENSE, SPARSIFY, FINETUNE)


Point = tuple[float, float]


@dataclass(frozen=True)
class RankLine:
    """The ranks after `step`."""

    step: int
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class Span:
    """The steps (`first`, `last`], which belong to `phase` and, in a path, to `stage`."""

    phase: str
    stage: int | None
    first: int
    last: int


@dataclass(frozen=True)
class PhaseCost:
    """Time and memory of a phase; None for values that the lines do not record."""

    phase: str
    steps: int
    median_tokens_per_second: float | None
    last_tokens_per_second: float | None
    median_step_seconds: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class StageRecord:
    """One λ of a path, as its export line and its folder record it."""

    sparse_lambda: float
    stage: int | None = None
    kept_params: int | None = None
    mean_rank: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    folder: str | None = None
    passed: bool | None = None
    is_adapter: bool = False
    """Whether adapter/ is this stage's."""


@dataclass(frozen=True)
class Alarm:
    """A sentence, the steps of the first and last line that contain it, and the number of lines that do."""

    sentence: str
    first_step: int
    last_step: int
    count: int


@dataclass(frozen=True)
class Record:
    """Everything the page shows.  `lines` are those of metrics.jsonl."""

    path: Path
    config: Mapping[str, Any]
    """The resolved config, {} if the caller has none."""
    status: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()
    rank_lines: Sequence[RankLine] = ()
    """For a long run, evenly spread ones, including the first and the last."""
    data: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    adapter_bytes: int | None = None
    stages: Sequence[StageRecord] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    torn: Sequence[str] = ()
    """Files whose end could not be read."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def state(self) -> str:
        """The state in status.json; "unknown" without one."""
        state = self.status.get("state")
        return state if isinstance(state, str) else "unknown"

    @property
    def phase(self) -> str | None:
        phase = self.status.get("phase")
        return phase if isinstance(phase, str) else None

    @property
    def error(self) -> str | None:
        error = self.status.get("error")
        return error if isinstance(error, str) else None

    @cached_property
    def step(self) -> int:
        """The last step that status or metrics record."""
        said = [self.status.get("step"), *(line["step"] for line in self.lines[-1:])]
        return max((int(step) for step in said if step is not None and is_step(step)), default=0)

    @cached_property
    def total_steps(self) -> int | None:
        """The steps of all stages, if none ends early; None for an older run counted in epochs, until it finishes."""
        planned = self._planned_steps
        return self.step if planned is None and self.state == "finished" else planned

    @property
    def _planned_steps(self) -> int | None:
        said = as_int(self.env.get("total_steps"))
        per_stage = as_int(setting(self.config, "train", "max_steps"))
        return per_stage * self._num_stages if said is None and per_stage is not None else said

    @property
    def _num_stages(self) -> int:
        return as_int(setting(self.config, "sora", "lambda_num")) or 1

    @cached_property
    def is_path(self) -> bool:
        """Whether the run trains a sparsity path."""
        return bool(self.stages) or self._num_stages > 1 or any("stage" in line for line in self.lines)

    def series(self, key: str) -> list[Point]:
        """(step, value) for the lines in which `key` has a number."""
        found = ((line["step"], as_number(line.get(key))) for line in self.lines)
        return [(step, value) for step, value in found if value is not None]

    def named_series(self, key: str) -> dict[str, list[Point]]:
        """{name: [(step, value)]} for the lines in which `key` has numbers by name, such as one per budget."""
        found: dict[str, list[Point]] = {}
        for line in self.lines:
            for name, value in as_mapping(line.get(key)).items():
                if (number := as_number(value)) is not None:
                    found.setdefault(name, []).append((line["step"], number))
        return found

    def first(self, key: str) -> float | None:
        """The first value of a field."""
        points = self.series(key)
        return points[0][1] if points else None

    def last(self, key: str) -> float | None:
        """The last value of a field."""
        points = self.series(key)
        return points[-1][1] if points else None

    @property
    def eval_step(self) -> float | None:
        """The step whose dev loss was measured last; 0 if it was measured only before training."""
        points = self.series("eval_loss")
        return points[-1][0] if points else None

    @property
    def all_params(self) -> float | None:
        """Parameters of the adapter before anything was pruned; for an older run, the most that a line records."""
        said = as_int(self.env.get("adapter_params"))
        return said or max((value for _, value in self.series("kept_params")), default=None)

    @property
    def full_mean_rank(self) -> float | None:
        """The mean rank before anything was pruned, scaled up from a line's mean rank by its share of parameters."""
        for line in self.lines:
            kept, rank = as_number(line.get("kept_params")), as_number(line.get("mean_rank"))
            if kept and rank and self.all_params:
                return rank * self.all_params / kept
        return self.first("mean_rank")

    @cached_property
    def spans(self) -> list[Span]:
        """The phases of the logged steps; a line covers the steps since the line before."""
        spans: list[Span] = []
        first_stage, later_stages = (self._planned_phases(is_first) for is_first in (True, False))
        before = begin = ended = 0
        for line in self.lines:
            step, own_phase, stage = line["step"], line.get("phase"), as_int(line.get("stage"))
            if own_phase == "export":
                ended = step
            if own_phase not in TRAINING_PHASES or step <= before:
                continue
            if ended > begin:  # a stage, whose last steps have no line if consensus left nothing to train
                begin = before = max(before, ended)
            planned = later_stages if begin else first_stage
            for phase, last in _phases_between(planned, begin, before, step, own_phase):
                if spans and (spans[-1].phase, spans[-1].stage) == (phase, stage):
                    spans[-1] = Span(phase, stage, spans[-1].first, last)
                else:
                    spans.append(Span(phase, stage, before, last))
                before = last
        return spans

    def _planned_phases(self, is_first_stage: bool) -> Phases | None:
        """The phases of a stage; None if its planned length is not recorded."""
        dense_ratio = as_number(setting(self.config, "sora", "dense_ratio")) if is_first_stage else 0.0
        consensus_at = as_number(setting(self.config, "sora", "consensus_at"))
        if dense_ratio is None or consensus_at is None:
            return None
        num_steps = None if self._planned_steps is None else self._planned_steps // self._num_stages
        if num_steps is None and not self.is_path and not self._may_have_ended_early(consensus_at):
            num_steps = self.total_steps
        return None if num_steps is None else phases(num_steps, dense_ratio, consensus_at)

    def _may_have_ended_early(self, consensus_at: float) -> bool:
        """Whether the run may have ended early, through patience or because consensus left nothing to train."""
        if setting(self.config, "evaluation", "early_stopping_patience") is not None:
            return True
        trained = [line["phase"] for line in self.lines if line.get("phase") in TRAINING_PHASES]
        return consensus_at < 1 and trained[-1:] != [FINETUNE]

    @cached_property
    def phase_costs(self) -> list[PhaseCost]:
        """A row per phase, in the order in which they occurred."""
        steps: dict[str, int] = {}
        for span in self.spans:
            steps[span.phase] = steps.get(span.phase, 0) + span.last - span.first
        return [self._phase_cost(phase, count) for phase, count in steps.items()]

    def _phase_cost(self, phase: str, steps: int) -> PhaseCost:
        def values(key: str) -> list[float]:
            found = (as_number(line.get(key)) for line in self.lines if line.get("phase") == phase)
            return [value for value in found if value is not None]

        speed, seconds, memory = values("tokens_per_second"), values("step_seconds"), values("peak_memory_gib")
        return PhaseCost(
            phase,
            steps,
            median(speed) if speed else None,
            speed[-1] if speed else None,
            median(seconds) if seconds else None,
            max(memory, default=None),
        )

    @cached_property
    def alarms(self) -> list[Alarm]:
        """Each sentence once, in the order of its first step."""
        found: dict[str, list[int]] = {}
        for line in self.lines:
            said = line.get("alarms")
            for sentence in said if isinstance(said, list) else [said]:
                if isinstance(sentence, str) and sentence:
                    found.setdefault(sentence, []).append(line["step"])
        return [Alarm(sentence, steps[0], steps[-1], len(steps)) for sentence, steps in found.items()]

    @cached_property
    def seconds_in_steps(self) -> float | None:
        """The time of the logged steps, without evaluations, checkpoints and changes of the adapters; None if no line
        records it."""
        # A run that began at a checkpoint from another directory has no line for the steps before.
        interval = as_int(setting(self.config, "output", "logging_steps"))
        first = self.lines[0]["step"] if self.lines else 0
        before, total = first if interval is None else max(0, first - interval), 0.0
        for line in self.lines:
            total += (as_number(line.get("step_seconds")) or 0.0) * max(0, line["step"] - before)
            before = max(before, line["step"])
        return total or None

    @property
    def seconds_left(self) -> float | None:
        """The time for the remaining steps at the speed of the last logged ones; None unless the run is running."""
        seconds = self.last("step_seconds")
        if self.state != "running" or self.total_steps is None or seconds is None:
            return None
        return max(0, self.total_steps - self.step) * seconds

    @property
    def ranks(self) -> Mapping[str, int]:
        """The newest ranks, from ranks.jsonl or else from the certificate."""
        return self.rank_lines[-1].ranks if self.rank_lines else certified_ranks(self.certificate)

    @property
    def grids(self) -> tuple[list[Grid], dict[str, int]]:
        """`grids_of` for the newest ranks."""
        return grids_of(self.ranks)

    @property
    def best_stage(self) -> StageRecord | None:
        """The stage of the path with the lowest dev loss."""
        measured = [stage for stage in self.stages if stage.eval_loss is not None]
        return min(measured, key=lambda stage: stage.eval_loss or 0.0, default=None)

    @property
    def delta_error(self) -> float | None:
        """The largest relative error of ΔW that the self-check found."""
        modules = self.certificate.get("modules")
        found = [as_number(setting(modules, name, "delta_error")) for name in as_mapping(modules)]
        return max((error for error in found if error is not None), default=None)


def _phases_between(planned: Phases | None, begin: int, before: int, step: int, phase: str) -> list[tuple[str, int]]:
    """(phase, its last step) for the steps from `before` to `step`, whose line records `phase`, in a stage that began
    after `begin`: by the planned boundaries if they agree with the line, else all in the phase that it records."""
    if planned is None or planned.at(step - begin - 1) != phase:
        return [(phase, step)]
    bounds = [begin + bound for bound in (planned.dense_end, planned.sparsify_end)]
    lasts = [bound for bound in bounds if before < bound < step]
    return [(planned.at(last - begin - 1), last) for last in (*lasts, step)]


# ----- summary --------------------------------------------------------------------------------------------------------


def summary(record: Record) -> dict[str, Any]:
    """The summary that `sora-llm inspect --json` prints."""
    best = record.best_stage
    return {
        "run": str(record.path),
        "state": record.state,
        "phase": record.phase,
        "step": record.step,
        "total_steps": record.total_steps,
        "error": record.error,
        "alarms": [vars(alarm) for alarm in record.alarms],
        "loss": record.last("loss"),
        "eval_loss_before": record.first("eval_loss"),
        "eval_loss": record.last("eval_loss"),
        "eval_step": record.eval_step,
        "eval_loss_exported": record.last("eval_loss_exported"),
        "mean_rank_before": record.full_mean_rank,
        "mean_rank": record.last("mean_rank"),
        "kept_params": record.last("kept_params"),
        "all_params": record.all_params,
        "skipped_steps": as_int(record.last("skipped_steps")) or 0,
        "seconds_in_steps": record.seconds_in_steps,
        "seconds_left": record.seconds_left,
        "ranks": dict(record.ranks),
        "phases": [vars(cost) for cost in record.phase_costs],
        "path": [vars(stage) for stage in record.stages],
        "best_lambda": None if best is None else best.sparse_lambda,
        "checkpoint": record.status.get("checkpoint"),
        "adapter": record.status.get("adapter"),
        "best_step": as_int(record.last("best_step")),
        "adapter_bytes": record.adapter_bytes,
        "stored_params": as_int(record.certificate.get("stored_params")),
        "self_check": None
        if not record.certificate
        else {
            "passed": record.certificate.get("passed") is True,
            "delta_error": record.delta_error,
            "logits_error": as_number(record.certificate.get("logits_error")),
            "layout": record.certificate.get("layout"),
            "sha256": record.certificate.get("sha256"),
        },
        "torn": list(record.torn),
    }
