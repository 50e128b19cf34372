"""The plan of a run: its config with every `auto` filled in, and the numbers that follow from it and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sora_llm import schedule
from sora_llm.config import Config, resume_conflicts, to_dict
from sora_llm.errors import UserError
from sora_llm.inputs import adapter_dtype, backbone_spec
from sora_llm.schedule import Phases
from sora_llm.topology import World


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

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates and λ of optimizer step `step` (from 0), as Engine.set_rates takes them."""
        sora, train = self.config.sora, self.config.train
        assert sora.sparse_lambda is not None
        factor = schedule.lr_factor(step, self.total_steps, self.warmup_steps, train.lr_scheduler_type)
        return {
            "learning_rate": factor * train.learning_rate,
            "gate_lr": factor * self.gate_lr,
            "sparse_lambda": schedule.lambda_at(step, self.phases, sora.sparse_lambda),
        }


def rows_in_step(config: Config, world: World) -> int:
    """G, the rows (packed: sequences) that an optimizer step takes over all processes."""
    train = config.train
    return train.per_device_train_batch_size * world.num_processes * train.gradient_accumulation_steps


def make_plan(config: Config, strategy: str, world: World, steps_in: Callable[[Fraction], int]) -> Plan:
    """Steps, phases and rates of the run; `steps_in` gives the optimizer steps of so many epochs.

    Raises:
        UserError: a sparsify window without a step.
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
    warmup = schedule.warmup_steps(total_steps, train.warmup_ratio)
    travel = schedule.window_sum(phases, warmup, train.lr_scheduler_type)
    gate_lr = schedule.auto_gate_lr(train.learning_rate, travel) if sora.gate_lr == "auto" else sora.gate_lr
    threshold = "decoupled" if sora.threshold == "auto" else sora.threshold
    storage = backbone_spec(config, strategy).quant_storage
    # The values are of the fields' own literal types; mypy cannot see that through plain strings.
    filled = replace(
        config,
        sora=replace(sora, gate_lr=gate_lr, dtype=adapter_dtype(config), threshold=threshold),  # type: ignore[arg-type]
        distributed=replace(config.distributed, strategy=strategy),  # type: ignore[arg-type]
        quantization=replace(config.quantization, bnb_4bit_quant_storage=storage),  # type: ignore[arg-type]
    )
    return Plan(filled, strategy, rows_in_step(config, world), total_steps, phases, warmup, gate_lr, gate_lr * travel)


def refuse_other_config(plan: Plan, old: Mapping[str, Any], old_processes: int, world: World, where: str) -> None:
    """Raise UserError if `plan` may not go on with a run of the config `old` (both resolved), naming the keys."""
    conflicts = resume_conflicts(dict(old), to_dict(plan.config), old_processes, world.num_processes)
    if conflicts:
        raise UserError(
            f"{where} belongs to a run of another config, different in {', '.join(conflicts)}; undo that, or name a "
            "new output.output_dir"
        )
