"""The training loop: next rows, forward, backward, step, log; and the changes between phases and stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sora_llm import pipeline
from sora_llm.base_spec import DTYPES
from sora_llm.distributed.collectives import gather_integers, sum_over_processes
from sora_llm.distributed.engine import StepOutcome
from sora_llm.errors import Preempted, RunFailed
from sora_llm.optim import importance_by_module
from sora_llm.running.assembly import cut_adapter, renew_engine
from sora_llm.running.metrics import (
    current_ranks,
    evaluation_due,
    is_due,
    log_step,
    measure,
    say_alarms,
)
from sora_llm.running.optimizer_step import StepBatches, seed_step, train_step
from sora_llm.running.rounds import Gates
from sora_llm.running.snapshot import save_checkpoint
from sora_llm.running.training import Training, make_controller
from sora_llm.schedule import SPARSIFY
from sora_llm.sora import soft_threshold


def train_stage(training: Training) -> None:
    """Next rows, forward, backward, step, log; between the phases the adapters take another form (collective).

    Raises:
        RunFailed: processes disagree, too many non-finite steps in a row, nothing is left to train, or a dev loss that
            is not finite before the first step.
        Preempted: the run was asked to stop; a checkpoint of the last step is complete.
    """
    job, tally, stage = training.job, training.tally, training.stage
    config, world = job.config, job.world
    training.directory.status("running", phase=training.phase)
    if training.done == 0 and job.data.dev is not None:
        ranks = current_ranks(training).fields
        training.alarms.start_loss = loss = measure(training)
        if not math.isfinite(loss):
            raise RunFailed(
                f"the dev loss before training is {loss}: the weights of the base"
                f"{'' if config.model.adapter is None else ' or of model.adapter'} are damaged, or too large for "
                f"model.dtype {config.model.dtype}"
            )
        line = {"eval_loss": loss, **ranks, **training.labels}
        training.directory.metrics(0, training.phase, line)
    if training.unlogged is not None:
        log_step(training, training.unlogged)
        training.unlogged_round = close_round(training)
    while not training.stage_is_done:
        step, step_of_stage = training.done, training.done - training.stage_start
        change_form(training, step_of_stage)
        if training.engine.is_closed:  # consensus left nothing to train
            return
        tally.start_clock()
        engine = training.engine
        sparsity_fields = set_rates(training, step_of_stage)
        seed_step(config.train.seed, step, world.process_index)
        batches = job.batches(step)
        training.done = done = step + 1
        training.stage_is_done = step_of_stage + 1 == stage.total_steps
        # Checked before the step, after which ZeRO's all-gather overwrites a corrupt copy.
        due = training.stage_is_done or is_due(config.distributed.check_every, done)
        due |= step_of_stage + 1 in stage.form_changes or (
            training.early_stopping.is_enabled and evaluation_due(job, done)
        )
        if training.rounds is not None:
            training.rounds.part()
        loss_sum, outcome = train_step(
            engine, batches, job.num_averaging, before_step=engine.check_agreement if due else None
        )
        tally.add(loss_sum, outcome, batches)
        synced = close_round(training)
        refuse_more_skipping(training)
        is_logged = training.stage_is_done or is_due(config.output.logging_steps, done) or evaluation_due(job, done)
        if is_logged or synced:
            seen = {**sparsity_fields, **synced, "supervised_tokens": batches.supervised_tokens}
            seen["grad_norm"] = grad_norm(training, outcome, batches)
            try:
                log_step(training, seen)
            except Preempted:  # in the evaluation: the resumed run begins with this line
                save_checkpoint(training, unlogged=seen)
                raise
            training.unlogged_round = close_round(training)  # if patience has ended the stage
        saved = training.stage_is_done or is_due(config.output.save_steps, done)
        if saved:
            save_checkpoint(training)
        try:
            job.raise_if_stop_requested()
        except Preempted:
            if not saved:
                save_checkpoint(training)
            raise


def set_rates(training: Training, step: int) -> dict[str, Any]:
    """Give the optimizer the rates and λ of `step` of its stage; returns the line's fields about λ (collective)."""
    stage = training.stage
    engine, controller, rounds = training.engine, training.controller, training.rounds
    sparse_lambda: float | dict[str, float] = 0.0
    fields: dict[str, Any] = {"lambda": 0.0}
    rates = stage.rates(step)
    if stage.is_pruning(step):
        progress = stage.phases.progress(step)
        if rounds is None:
            sparse_lambda = controller.choose(engine.gates(), progress, engine.device, gate_lr=rates["gate_lr"])
        elif not controller.is_adaptive:  # an adaptive one chooses when the round ends
            first, end = stage.round_bounds(step, training.job.config.distributed.sync_every)
            if step == first:
                controller.choose(rounds.gates, stage.phases.progress(end - 1), engine.device, num_steps=end - first)
            sparse_lambda = controller.chosen
        fields = controller.fields if rounds is None or not controller.is_adaptive else {}
    engine.set_rates(**rates, sparse_lambda=sparse_lambda)
    return fields


def refuse_more_skipping(training: Training) -> None:
    """RunFailed after too many non-finite steps in a row; with local updates, checked at the end of a round for the
    replica that skipped the most (collective)."""
    tally, rounds = training.tally, training.rounds
    if rounds is not None and rounds.is_open:
        return
    in_a_row, tally.most_in_a_row = tally.most_in_a_row, tally.skipped_in_a_row
    if rounds is not None:
        in_a_row = max(found for (found,) in gather_integers([in_a_row], training.engine.device))
    if in_a_row >= training.job.config.train.max_skipped_steps:
        raise RunFailed(
            f"{in_a_row} steps in a row, up to step {training.done}, had a non-finite loss or gradient and were "
            "skipped; check the data, or lower train.learning_rate and use a new output.output_dir"
        )


def grad_norm(training: Training, outcome: StepOutcome, batches: StepBatches) -> float:
    """The gradient norm of the step; with local updates the mean over the processes that had rows (collective)."""
    if training.rounds is None:
        return outcome.grad_norm
    has_rows = float(batches.weight > 0)
    total, count = sum_over_processes(outcome.grad_norm * has_rows, has_rows, device=training.engine.device)
    return total / count


def close_round(training: Training) -> dict[str, Any]:
    """End the open round of local updates if the last step or the end of the stage is its end (collective).

    Returns: the fields about it in the step's line; {} if no round ended.
    """
    stage, engine, controller, rounds = training.stage, training.engine, training.controller, training.rounds
    settings, step = training.job.config, training.done - 1 - training.stage_start
    if rounds is None or not rounds.is_open:
        return {}
    if not training.stage_is_done and step + 1 < stage.round_bounds(step, settings.distributed.sync_every)[1]:
        return {}

    def choose(mean_gates: Gates) -> None:
        if controller.is_adaptive:
            controller.choose(mean_gates, stage.phases.progress(step), engine.device)

    def prox(gates: Gates, thresholds: Gates) -> Gates:
        if controller.is_adaptive:
            return controller.cut(gates)
        return {name: soft_threshold(gate, thresholds[name]) for name, gate in gates.items()}

    prunes = stage.is_pruning(step)
    # Before consensus by svd, which approximates the mean of products, each replica keeps its own factors.
    is_last = training.stage_is_done or step + 1 == stage.phases.sparsify_end
    is_cut_next = is_last and stage.phases.at(step) == SPARSIFY
    merges = is_cut_next and settings.sora.consensus == "svd"
    report = rounds.end(engine, prox if prunes else None, choose=choose, keep_factors=merges)
    return {**report.fields, **(controller.fields if prunes else {})}


def change_form(training: Training, step: int) -> None:
    """Before the first step of a phase that needs it, balance the adapters or cut them to what consensus keeps, and
    rebuild the optimizer and its engine around the remaining tensors (collective).

    Raises:
        RunFailed: processes disagree, or nothing is left to train.
    """
    job, engine, stage = training.job, training.engine, training.stage
    if step not in stage.form_changes:
        return
    training.tally.pause_clock()
    training.check_agreement()
    old = engine.masters()
    importance: dict[str, Tensor] = {}
    with engine.released(whole=False) as model:
        if step < stage.phases.sparsify_end:
            dtype, device = DTYPES[job.config.sora.dtype], job.accelerator.device
            masters, importance = pipeline.balance(model, old, budgets=job.plan.budgets, dtype=dtype, device=device)
        else:
            cut = cut_adapter(training, model, old)
            if cut.ranks.kept_params == 0:
                if not job.config.output.allow_empty_adapter:
                    remedy = "raise the budget" if job.plan.budgets else "lower sora.sparse_lambda"
                    raise RunFailed(
                        f"consensus after step {training.done} left no rank to train; {remedy}, or set "
                        "output.allow_empty_adapter"
                    )
                return
            masters = cut.masters
    del old
    renew_engine(training, model, masters, importance)
    training.controller.importance = by_module = importance_by_module(importance)
    if by_module:
        has_learned = {name: bool(values.any()) for name, values in by_module.items()}
        say_alarms(job, training.alarms.of_components(has_learned))


def next_stage(training: Training, masters: Mapping[str, Tensor]) -> None:
    """Start the next stage from the uncut `masters` with a fresh optimizer (collective)."""
    job = training.job
    with training.engine.released(whole=False) as model:
        pipeline.restore(model, masters, DTYPES[job.config.sora.dtype])
    renew_engine(training, model, masters, {})
    training.stage_number += 1
    training.stage_start, training.stage_is_done, training.unlogged = training.done, False, None
    training.controller = make_controller(job, training.stage_number)
    training.early_stopping.reset()
