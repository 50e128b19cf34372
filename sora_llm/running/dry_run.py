"""The dry run: everything up to one step and one save, and an estimate of the real run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sora_llm.data.order import EpochOrder
from sora_llm.distributed.collectives import any_process, on_main
from sora_llm.errors import RunFailed
from sora_llm.estimates.memory import memory_table
from sora_llm.files import nearest_existing, user_path
from sora_llm.running.assembly import load_and_inject
from sora_llm.running.job import Job
from sora_llm.running.optimizer_step import peak_memory_gib, train_step
from sora_llm.running.rundir import RunDirectory
from sora_llm.running.snapshot import save_checkpoint
from sora_llm.running.start import RunResult, StartPoint
from sora_llm.running.training_loop import set_rates


@contextlib.contextmanager
def dry_run_folder(job: Job) -> Iterator[Path]:
    """A temporary folder that all processes see, as they will see the run directory (collective)."""
    run_dir = user_path(job.config.output.output_dir, "output.output_dir")
    above = nearest_existing(run_dir.parent)
    folder = on_main(lambda: tempfile.mkdtemp(prefix=".dry-run-", dir=above))
    try:
        yield Path(folder)
    finally:
        if job.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def perform_dry_run(job: Job) -> RunResult:
    """The dry run: one step and one save into a temporary folder, then an estimate of what a real run would take."""
    with dry_run_folder(job) as folder:
        directory = RunDirectory(folder, is_main=job.world.is_main)
        training = load_and_inject(job, directory, StartPoint())
        engine, tally = training.engine, training.tally
        job.raise_if_stop_requested()
        tally.start_clock()
        set_rates(training, 0)
        batches = job.batches(0)
        loss_sum, outcome = train_step(engine, batches, job.num_averaging)
        if any_process(outcome.skipped, engine.device):
            raise RunFailed("dry run: the first step has a non-finite loss or gradient; check model.dtype and the data")
        tally.add(loss_sum, outcome, batches)
        training.done = 1
        if training.rounds is not None:
            training.rounds.end(engine)
        save_checkpoint(training)
        line = {**tally.flush(), "grad_norm": outcome.grad_norm, "peak_memory_gib": peak_memory_gib(engine.device)}
    memory, steps = job.memory, job.plan.total_steps
    if isinstance(job.order, EpochOrder):
        epochs, first = job.order.epochs_of(steps), job.order.rows_of(0)
        tokens = f"{epochs * first.num_tokens:,.0f}, of which {epochs * first.num_supervised:,.0f} supervised "
        tokens += f"({epochs:.2f} epochs)"
    else:
        tokens = f"{steps * batches.tokens:,}, of which {steps * batches.supervised_tokens:,} supervised"
    job.say(
        "dry run: one step and one save worked, nothing was kept\n"
        f"  trainable parameters  {memory.trainable_parameters:,}, plus {memory.frozen_parameters:,} frozen\n"
        f"  steps                 {steps} of {job.rows_per_step_text}\n"
        f"  tokens                about {tokens}\n"
        f"{memory_table(memory)}\n"
        f"  peak memory           {line['peak_memory_gib']:.2f} GiB per process in this step\n"
        f"  first loss            {line['loss']:.4f}, gradient norm {line['grad_norm']:.4g}",
    )
    return RunResult(None, line, {"state": "dry run"})
