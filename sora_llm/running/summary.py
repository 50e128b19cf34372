"""The summary that is logged before a run begins."""

from __future__ import annotations

from sora_llm.distributed.replicas import Replicas
from sora_llm.local_updates import round_bytes, transfer_seconds
from sora_llm.running.config_warnings import config_warnings
from sora_llm.running.data_summary import describe_data
from sora_llm.running.job import Job
from sora_llm.running.plan import Stage
from sora_llm.terminal import plural


def print_summary(job: Job) -> None:
    """Print what is about to run."""
    plan, memory = job.plan, job.memory
    for line in describe_data(job.config, job.inputs, job.data, job.order):
        job.say(line)
    first = plan.stages[0]
    pruning = pruning_in_words(first, " of the first" if plan.is_path else "")
    several = f"{len(plan.stages)} stages of " if plan.is_path else ""
    job.say(
        f"{plan.strategy} on {plural(job.world.num_processes, 'process')}; "
        f"{several}{plural(first.total_steps, 'step')} of {job.rows_per_step_text}, {pruning}; "
        f"{memory.trainable_parameters:,} trainable parameters, {memory.frozen_parameters:,} frozen "
        f"({job.inputs.backbone.form}); gate_lr "
        + ", ".join(dict.fromkeys(f"{stage.gate_lr:.4g}" for stage in plan.stages)),
    )
    if job.replicas is not None:
        job.say(local_updates_in_words(job, job.replicas))
    if plan.config.model.adapter is not None:
        job.say(f"starting from the adapter {plan.config.model.adapter}")
    for budget in plan.budgets:
        of = "" if len(plan.budgets) == 1 else f" of {budget.name}"
        job.say(
            f"budget{of}: mean rank {budget.mean_rank(budget.params):.4g} of {budget.mean_rank(budget.full):.4g} "
            f"({budget.params:,} of {budget.full:,} parameters), {plan.config.sora.threshold}",
        )
    if plan.config.train.torch_compile:
        job.say(
            "compiling in the first steps, and again after the adapters have changed their form or were cut: these "
            "take seconds to minutes longer, which their tokens/s include"
        )
    for line in config_warnings(plan, job.inputs.skeleton):
        job.say(f"warning: {line}")


def pruning_in_words(stage: Stage, of_first: str = "") -> str:
    """When gates are pruned, in words; `of_first` says of which stage, where others prune."""
    end = stage.phases.sparsify_end
    if stage.sparse_lambda == 0:
        return f"pruning in no step{of_first} (λ is 0)"
    if stage.prunes_in_steps:
        return f"pruning in steps {stage.first_pruning_step + 1}–{end}"
    return f"pruned by the cut alone, at step {end}" if stage.sparse_lambda is None else "pruning in no step"


def local_updates_in_words(job: Job, replicas: Replicas) -> str:
    """A line about local updates: how many replicas there are, and what a round costs."""
    settings = job.config.distributed
    num_bytes = round_bytes(job.memory.trainable_parameters, replicas.num)
    times = ", ".join(f"{transfer_seconds(num_bytes, link):.3g} s at {link}" for link in (1, 10, 100))
    outer = settings.outer_learning_rate, settings.outer_momentum
    how = "averaged" if outer == (1.0, 0.0) else f"merged by an outer step (lr {outer[0]:g}, momentum {outer[1]:g})"
    return (
        f"local updates: {plural(replicas.num, 'replica')}, {how} every {settings.sync_every} "
        f"steps; a round moves {num_bytes / 2**20:.3g} MiB from and to each ({times} Gbit/s), ddp as much every step"
    )
