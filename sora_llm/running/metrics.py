"""Metrics of a run's steps: ranks, dev loss, alarms, the line in metrics.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sora_llm import pipeline
from sora_llm.data.dataset import TokenDataset
from sora_llm.distributed.collectives import gather_integers
from sora_llm.inject import adapters
from sora_llm.running.evaluation import evaluate
from sora_llm.running.job import Job
from sora_llm.running.optimizer_step import peak_memory_gib
from sora_llm.running.training import Best, Training
from sora_llm.schedule import DENSE, FINETUNE


def log_step(training: Training, seen: Mapping[str, Any]) -> None:
    """Log the line of the step just taken (collective); `seen` holds the fields that only the step itself knows."""
    job, tally, done, stage = training.job, training.tally, training.done, training.stage
    step_of_stage, phase = done - training.stage_start - 1, training.phase
    rates = stage.rates(step_of_stage)
    tally.pause_clock()
    ranks = current_ranks(training)
    evaluated = {"eval_loss": measure(training)} if evaluation_due(job, done) else {}
    fields: dict[str, Any] = {
        "epoch": job.order.epochs_of(done),
        **tally.flush(),
        "learning_rate": rates["learning_rate"],
        "gate_learning_rate": rates["gate_lr"] if phase != FINETUNE else None,
        **seen,
        "skipped_steps": skipped_steps(training),
        "loss_scale": training.engine.loss_scale.factor if training.engine.loss_scale.is_needed else None,
        "peak_memory_gib": peak_memory_gib(training.engine.device),
        **ranks.fields,
        **evaluated,
        **training.labels,
    }
    # Inside a round of local updates no gate can die, which is no reason for an alarm.
    is_between = training.rounds is not None and training.rounds.is_open
    progress = stage.phases.progress(step_of_stage) if stage.is_pruning(step_of_stage) and not is_between else None
    say_alarms(job, training.alarms.of_line({"step": done, "phase": phase, **fields}, progress))
    fields["alarms"] = training.alarms.take() or None
    training.directory.metrics(done, phase, fields)
    if phase != DENSE:
        training.directory.ranks(done, ranks.ranks, training.labels)
    counts = phase == FINETUNE or (job.plan.is_path and phase != DENSE)
    if evaluated and counts and training.early_stopping.update(evaluated["eval_loss"]):
        training.stage_is_done = True
        patience = job.config.evaluation.early_stopping_patience
        job.say(f"stopping after step {done}: {patience} evaluation(s) in a row brought no lower dev loss")


def say_alarms(job: Job, sentences: list[str]) -> None:
    """Print alarms as warnings."""
    for sentence in sentences:
        job.say(f"warning: {sentence}")


def is_due(interval: int | None, done: int) -> bool:
    """Whether something that happens every `interval` steps is due after `done` steps; None means never."""
    return interval is not None and done % interval == 0


def evaluation_due(job: Job, done: int) -> bool:
    """Whether the dev loss is measured after `done` steps."""
    return job.data.dev is not None and is_due(job.config.evaluation.eval_steps, done)


def skipped_steps(training: Training) -> int:
    """The steps skipped so far; with local updates the most that any replica skipped (collective)."""
    own = training.tally.skipped_steps
    if training.rounds is None:
        return own
    return max(found for (found,) in gather_integers([own], training.engine.device))


def dev_loss(job: Job, model: nn.Module) -> float:
    """The loss of `model` over all dev rows (collective)."""
    assert job.data.dev is not None
    return loss_over(job, model, job.data.dev)


def measure(training: Training) -> float:
    """The dev loss of the current adapter; inside a round of local updates, that of the replicas' slot-wise mean.  The
    adapter is kept if it is the best so far (collective)."""
    rounds, engine = training.rounds, training.engine
    with contextlib.nullcontext() if rounds is None else rounds.averaged(engine):
        loss = dev_loss(training.job, engine.model)
        if keeps_best(training) and training.early_stopping.is_better(loss):
            masters = engine.masters()
            training.best = Best(training.done, loss, masters if training.job.world.is_main else {})
    training.measured = training.done
    return loss


def keeps_best(training: Training) -> bool:
    """Whether the best adapter is kept: only once ranks are final, since removing ranks raises the dev loss."""
    return training.early_stopping.is_enabled and training.phase == FINETUNE


def final_masters(training: Training) -> Mapping[str, Tensor]:
    """The weights to export: those of the last step, or of the best evaluation if that is kept (collective)."""
    if keeps_best(training) and training.measured != training.done:
        measure(training)
    best = training.best
    if best is None:
        return training.engine.masters()
    if best.step != training.done:
        training.job.say(
            f"keeping the adapter of step {best.step}, which has the lowest dev loss of the finetune phase "
            f"({best.eval_loss:.4f})",
        )
    return best.masters


def loss_over(job: Job, model: nn.Module, rows: TokenDataset) -> float:
    """The loss of `model` over all `rows` (collective)."""
    return evaluate(
        model,
        rows,
        job.inputs.batch,
        batch_size=job.config.evaluation.per_device_eval_batch_size,
        world=job.world,
        device=job.accelerator.device,
        before_batch=job.raise_if_stop_requested,
    )


def current_ranks(training: Training) -> pipeline.RankReport:
    """Ranks by the current gates, or by those that the replicas last agreed on (collective)."""
    engine, rounds = training.engine, training.rounds
    return pipeline.rank_report(adapters(engine.module), engine.gates() if rounds is None else rounds.gates)
