"""The plan of a run: its config with every `auto` filled in, and the numbers that follow from it and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sora_llm import schedule
from sora_llm.budget import ADAPTIVE, RankBudget, make_budgets
from sora_llm.config import Config, Train, resume_conflicts, to_dict
from sora_llm.errors import UserError
from sora_llm.run_files import ADAPTER, PATH, stage_name
from sora_llm.running.unpack import adapter_dtype, backbone_spec
from sora_llm.schedule import SPARSIFY, Phases
from sora_llm.terminal import plural
from sora_llm.topology import World

ADAPTIVE_GATE_LR = 1e-2
"""`gate_lr: auto` if a quantile cuts: gates only decide which is cut next, they do not have to travel to 0."""
MOST_TRIED = 1000
"""How many numbers of steps are tried to find one that an error message can recommend."""


@dataclass(frozen=True)
class Stage:
    """One schedule of learning rates and phases: the whole run, or one λ of a sparsity path.

    Steps are counted from the stage's own first one.  `gate_travel` = gate_lr · Σ f_t over the sparsify window, about
    as far as Adam can move a gate in it.  `learns` is false in the stages of a path that only prune; `starts_blank`
    means that B is 0 when the stage begins.
    """

    sparse_lambda: float | None
    phases: Phases
    warmup_ratio: Fraction
    settings: Train
    gate_lr: float
    is_adaptive: bool
    learns: bool = True
    starts_blank: bool = False

    @property
    def total_steps(self) -> int:
        return self.phases.total_steps

    @property
    def warmup_steps(self) -> int:
        """Steps until the learning rate reaches its peak."""
        return schedule.warmup_steps(self.total_steps, self.warmup_ratio)

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of optimizer step `step`: the stage's one schedule, ramped up again after each change of the
        adapters' form, which restarts the optimizer."""
        if not self.learns:
            return {"learning_rate": 0.0, "gate_lr": 0.0}
        factor = self._lr_factor(step)
        for change in self.form_changes:
            if step >= change:
                length = schedule.ramp_steps(self.total_steps - change, self.warmup_ratio)
                factor *= schedule.ramp(step - change, length)
        return {"learning_rate": factor * self.settings.learning_rate, "gate_lr": factor * self.gate_lr}

    def _lr_factor(self, step: int) -> float:
        """Of the schedule, without ramps."""
        settings = self.settings
        return schedule.lr_factor(
            step, self.total_steps, self.warmup_steps, settings.lr_scheduler_type, settings.min_lr_ratio
        )

    @property
    def form_changes(self) -> tuple[int, ...]:
        """The steps before which the adapters take another form: balanced for `adaptive`, cut by consensus."""
        balanced = (self.first_pruning_step,) if self.is_adaptive and self.prunes_in_steps else ()
        return (*balanced, self.phases.sparsify_end) if self.cuts_early else balanced

    @property
    def first_pruning_step(self) -> int:
        """The first step that prunes, before which `adaptive` weighs the gates: the first one of the sparsify phase,
        but not before a step has learned anything.  With B = 0 every component is 0, no gate has a gradient, and a prox
        would shrink all of them blindly.  If it equals the phase's end, only the cut to a budget prunes."""
        if not (self.is_adaptive or self.starts_blank):
            return self.phases.dense_end
        return min(max(self.phases.dense_end, self.learned_at), self.phases.sparsify_end)

    @property
    def prunes_in_steps(self) -> bool:
        """Whether there is a step that cuts gates."""
        return self.first_pruning_step < self.phases.sparsify_end

    @property
    def learned_at(self) -> int:
        """The first step that comes after one with a learning rate above 0; the number of steps plus 1 if none has."""
        total = self.total_steps
        return 1 + next((step for step in range(total) if self._lr_factor(step) > 0), total)

    @property
    def can_prune(self) -> bool:
        """Whether B is no longer 0 when the adapters are cut."""
        return not self.starts_blank or self.learned_at <= self.phases.sparsify_end

    def is_pruning(self, step: int) -> bool:
        """Whether gates are cut in `step`."""
        return self.phases.at(step) == SPARSIFY and step >= self.first_pruning_step

    def round_bounds(self, step: int, sync_every: int) -> tuple[int, int]:
        """First step, and first step after, of the round of local updates that `step` belongs to."""
        own = self.phases
        bounds = sorted({0, own.dense_end, self.first_pruning_step, own.sparsify_end, own.total_steps})
        return schedule.round_bounds(step, sync_every, bounds)

    @property
    def cuts_early(self) -> bool:
        """Whether there is a finetune phase."""
        return self.phases.sparsify_end < self.total_steps

    @property
    def gate_travel(self) -> float:
        """How far a gate moves in the sparsify phase if every step moves it by its rate; it starts at 1."""
        return self.gate_lr * schedule.window_sum(self.phases, self._lr_factor)


@dataclass(frozen=True)
class Plan:
    """The config with every `auto` filled in, and the numbers that follow from it and the data."""

    config: Config
    strategy: str
    rows_per_step: int
    stages: tuple[Stage, ...]
    budgets: tuple[RankBudget, ...]

    @property
    def total_steps(self) -> int:
        """The steps of all stages, if none of them ends early."""
        return sum(stage.total_steps for stage in self.stages)

    @property
    def is_path(self) -> bool:
        """Whether the run trains a sparsity path, stages of rising λ."""
        return len(self.stages) > 1

    def folder_of(self, stage: Stage) -> str:
        """Where the adapter of a stage is exported, in the run directory."""
        return f"{PATH}/{stage_name(stage.sparse_lambda or 0.0)}" if self.is_path else ADAPTER

    def most_evaluations(self, eval_steps: int) -> int:
        """The most evaluations that patience counts in any one stage, without the one at the stage's last step."""
        counts, first = [], 0
        for stage in self.stages:
            begin = stage.phases.dense_end if self.is_path else stage.phases.sparsify_end
            last = first + stage.total_steps
            counts.append((last - 1) // eval_steps - (first + begin) // eval_steps)
            first = last
        return max(counts)


def rows_in_step(config: Config, world: World) -> int:
    """G, the rows (packed: sequences) that an optimizer step takes across all processes."""
    train = config.train
    return train.per_device_train_batch_size * world.num_processes * train.gradient_accumulation_steps


def make_plan(
    config: Config,
    strategy: str,
    world: World,
    steps_in: Callable[[Fraction], int],
    shapes: Mapping[str, tuple[int, int]],
) -> Plan:
    """Steps, phases, rates and budgets of the run.

    `steps_in` returns the optimizer steps in a given number of epochs; `shapes` is {target module: (I, O)}.

    Raises:
        UserError: a phase that needs a step has none, or invalid budgets.
    """
    sora, train = config.sora, config.train
    if train.max_steps is not None:
        total_steps = train.max_steps
    else:
        total_steps = steps_in(Fraction(str(train.num_train_epochs)))  # as written: 1.1 · 100 steps are 110
    budgets: list[RankBudget] = []
    if sora.sparse_lambda is None:
        budgets = make_budgets(
            shapes,
            sora.r,
            sora.target_rank,
            sora.target_params,
            sora.budgets,
            sora.min_rank,
            may_be_empty=config.output.allow_empty_adapter,
        )
    threshold = sora.threshold
    if threshold == "auto":
        threshold = "adaptive" if budgets else "decoupled"
    stages = _stages(config, total_steps, threshold == ADAPTIVE)
    storage = backbone_spec(config, strategy).quant_storage
    # The values have the fields' literal types; mypy cannot see that through plain strings.
    gate_lrs = {stage.gate_lr for stage in stages}
    gate_lr = gate_lrs.pop() if len(gate_lrs) == 1 else sora.gate_lr  # "auto" if the stages differ
    filled = replace(
        config,
        sora=replace(sora, gate_lr=gate_lr, dtype=adapter_dtype(config), threshold=threshold),  # type: ignore[arg-type]
        distributed=replace(config.distributed, strategy=strategy),  # type: ignore[arg-type]
        quantization=replace(config.quantization, bnb_4bit_quant_storage=storage),  # type: ignore[arg-type]
    )
    return Plan(filled, strategy, rows_in_step(config, world), stages, tuple(budgets))


def _stages(config: Config, steps: int, is_adaptive: bool) -> tuple[Stage, ...]:
    """A stage per λ, each of `steps` steps; only the first one begins with a dense phase."""
    sora, train = config.sora, config.train
    if train.warmup_steps is not None and train.warmup_steps > steps:
        of = "a stage" if sora.lambda_num > 1 else "training"
        raise UserError(f"train.warmup_steps {train.warmup_steps} exceeds the {plural(steps, 'step')} of {of}")
    warmup = _warmup_ratio(train, steps)
    lambdas: list[float | None] = [sora.sparse_lambda]
    if sora.lambda_num > 1:
        assert sora.sparse_lambda is not None and sora.max_lambda is not None
        found = schedule.path_lambdas(sora.lambda_schedule, sora.sparse_lambda, sora.max_lambda, sora.lambda_num)
        lambdas = list(found)
        if len({stage_name(value) for value in found}) < len(found):
            raise UserError(
                f"sora.lambda_num {sora.lambda_num}: the stages' λ between {sora.sparse_lambda:g} and "
                f"{sora.max_lambda:g} are too close together to have separate folders; use fewer stages"
            )
    stages = []
    for number, sparse_lambda in enumerate(lambdas):
        phases = schedule.phases(steps, 0.0 if number else sora.dense_ratio, sora.consensus_at)
        if phases.dense_end == phases.sparsify_end:
            raise UserError(
                f"the sparsify phase has no step: {plural(steps, 'step')}, sora.dense_ratio {sora.dense_ratio}, "
                f"sora.consensus_at {sora.consensus_at}; {_longer(config, steps, is_adaptive)}, or widen the window "
                "between the two"
            )
        learns = sora.retrain or number == 0
        starts_blank = number == 0 and config.model.adapter is None
        stage = Stage(sparse_lambda, phases, warmup, train, 1.0, is_adaptive, learns, starts_blank)
        gate_lr = sora.gate_lr
        if gate_lr == "auto":
            travel = stage.gate_travel  # at a gate_lr of 1
            gate_lr = ADAPTIVE_GATE_LR if is_adaptive else schedule.auto_gate_lr(train.learning_rate, travel)
        stage = replace(stage, gate_lr=gate_lr)
        if not stage.can_prune:
            raise UserError(
                f"nothing is learned before the cut: {plural(steps, 'step')}, cut at "
                f"{phases.sparsify_end} (sora.consensus_at {sora.consensus_at}), and the learning rate is 0 in the "
                f"first; {_longer(config, steps, is_adaptive)}"
            )
        stages.append(stage)
    return tuple(stages)


def _warmup_ratio(train: Train, steps: int) -> Fraction:
    """The share of `steps` in which the learning rate rises, as it was written (0.29 is 29/100)."""
    if train.warmup_steps is not None:
        return Fraction(train.warmup_steps, steps)
    return Fraction(str(train.warmup_ratio))


def _longer(config: Config, too_few: int, is_adaptive: bool) -> str:
    """What to do if `too_few` steps leave nothing to sparsify: the next number of steps that, with this config's
    ratios, prunes in steps and has learned something before the cut."""
    sora, train = config.sora, config.train
    starts_blank = config.model.adapter is None
    for steps in range(too_few + 1, too_few + MOST_TRIED):
        phases = schedule.phases(steps, sora.dense_ratio, sora.consensus_at)
        stage = Stage(None, phases, _warmup_ratio(train, steps), train, 1.0, is_adaptive, starts_blank=starts_blank)
        if stage.prunes_in_steps and stage.can_prune:
            return f"train for {steps} steps"
    return "train longer"


def refuse_other_config(plan: Plan, old: Mapping[str, Any], old_processes: int, world: World, where: str) -> None:
    """Raise UserError, naming the keys, if `plan` may not resume a run of the config `old` (both resolved)."""
    conflicts = resume_conflicts(dict(old), to_dict(plan.config), old_processes, world.num_processes)
    if conflicts:
        raise UserError(
            f"{where} belongs to a run with another config: {', '.join(conflicts)}; revert that, or use a new "
            "output.output_dir (model.adapter starts a run from another run's adapter)"
        )
