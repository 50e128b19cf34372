"""The plan of a run: its config with every `auto` filled in, and the numbers that follow from it and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sora_llm import schedule
from sora_llm.budget import RankBudget, make_budgets
from sora_llm.config import Config, resume_conflicts, to_dict
from sora_llm.errors import UserError
from sora_llm.inputs import adapter_dtype, backbone_spec
from sora_llm.schedule import Phases
from sora_llm.topology import World

ADAPTIVE = "adaptive"
ADAPTIVE_GATE_LR = 1e-2
"""`gate_lr: auto` where a quantile cuts: gates only say who is next, they do not have to travel to 0."""


@dataclass(frozen=True)
class Plan:
    """The config with every `auto` filled in, and the numbers that follow from it and the data.

    `gate_travel` = gate_lr · Σ f_t over the sparsify window: below 1 no gate can get from 1 to 0.
    """

    config: Config
    strategy: str
    rows_per_step: int
    total_steps: int
    phases: Phases
    warmup_steps: int
    gate_lr: float
    gate_travel: float
    budgets: tuple[RankBudget, ...]

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of optimizer step `step` (from 0): the run's one schedule, ramped up again wherever the
        adapters were changed and the optimizer started afresh."""
        train = self.config.train
        factor = schedule.lr_factor(step, self.total_steps, self.warmup_steps, train.lr_scheduler_type)
        for change in self.changes:
            if step >= change:
                length = schedule.ramp_steps(self.total_steps - change, train.warmup_ratio)
                factor *= schedule.ramp(step - change, length)
        return {"learning_rate": factor * train.learning_rate, "gate_lr": factor * self.gate_lr}

    @property
    def is_adaptive(self) -> bool:
        return self.config.sora.threshold == ADAPTIVE

    @property
    def changes(self) -> tuple[int, ...]:
        """The steps before which the adapters take another form: balanced for `adaptive`, cut by consensus."""
        balanced = (self.phases.dense_end,) if self.is_adaptive else ()
        return (*balanced, self.phases.sparsify_end) if self.cuts_early else balanced

    @property
    def cuts_early(self) -> bool:
        """Whether there is a finetune phase."""
        return self.phases.sparsify_end < self.total_steps


def rows_in_step(config: Config, world: World) -> int:
    """G, the rows (packed: sequences) that an optimizer step takes over all processes."""
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

    `steps_in` gives the optimizer steps of so many epochs, `shapes` {target module: (I, O)}.

    Raises:
        UserError: a sparsify window without a step, budgets that cannot be.
    """
    sora, train = config.sora, config.train
    if train.max_steps is not None:
        total_steps = train.max_steps
    else:
        total_steps = steps_in(Fraction(str(train.num_train_epochs)))  # as written: 1.1 · 100 steps are 110
    phases = schedule.phases(total_steps, sora.dense_ratio, sora.consensus_at)
    if phases.dense_end == phases.sparsify_end:
        raise UserError(
            f"the sparsify phase has no step: {total_steps} steps, sora.dense_ratio {sora.dense_ratio}, "
            f"sora.consensus_at {sora.consensus_at}; train longer, or widen the window between the two"
        )
    budgets: list[RankBudget] = []
    if sora.sparse_lambda is None:
        budgets = make_budgets(shapes, sora.r, sora.target_rank, sora.target_params, sora.budgets, sora.min_rank)
    threshold = sora.threshold
    if threshold == "auto":
        threshold = "adaptive" if budgets else "decoupled"
    if threshold == ADAPTIVE and phases.dense_end == 0:
        raise UserError(
            f"the dense phase has no step: {total_steps} steps, sora.dense_ratio {sora.dense_ratio}; sora.threshold "
            "adaptive ranks what was learned in it, so raise sora.dense_ratio, train longer, or use decoupled"
        )
    warmup = schedule.warmup_steps(total_steps, train.warmup_ratio)
    travel = schedule.window_sum(phases, warmup, train.lr_scheduler_type)
    gate_lr = sora.gate_lr
    if gate_lr == "auto":
        adaptive = threshold == ADAPTIVE
        gate_lr = ADAPTIVE_GATE_LR if adaptive else schedule.auto_gate_lr(train.learning_rate, travel)
    storage = backbone_spec(config, strategy).quant_storage
    # The values are of the fields' own literal types; mypy cannot see that through plain strings.
    filled = replace(
        config,
        sora=replace(sora, gate_lr=gate_lr, dtype=adapter_dtype(config), threshold=threshold),  # type: ignore[arg-type]
        distributed=replace(config.distributed, strategy=strategy),  # type: ignore[arg-type]
        quantization=replace(config.quantization, bnb_4bit_quant_storage=storage),  # type: ignore[arg-type]
    )
    return Plan(
        filled,
        strategy,
        rows_in_step(config, world),
        total_steps,
        phases,
        warmup,
        gate_lr,
        gate_lr * travel,
        tuple(budgets),
    )


def refuse_other_config(plan: Plan, old: Mapping[str, Any], old_processes: int, world: World, where: str) -> None:
    """Raise UserError if `plan` may not go on with a run of the config `old` (both resolved), naming the keys."""
    conflicts = resume_conflicts(dict(old), to_dict(plan.config), old_processes, world.num_processes)
    if conflicts:
        raise UserError(
            f"{where} belongs to a run of another config, different in {', '.join(conflicts)}; undo that, or name a "
            "new output.output_dir"
        )
