"""The story of a run: one YAML in, a pruned and verified LoRA out.

    accelerate launch -m sora_llm.train configs/llama7b.yaml [section.key=value ...]

check the input → prepare the data → load and inject → train (dense, sparsify) → agree and cut → export.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from sora_llm import checkpoint, distributed, hub, pipeline, terminal
from sora_llm.backbone import DTYPES, check_attention
from sora_llm.config import Config, load_config, to_dict, to_yaml
from sora_llm.distributed import Replicas, StepOutcome, on_every, on_main
from sora_llm.ending import cut_and_export, finish
from sora_llm.errors import Preempted, RunFailed, UserError, first_line
from sora_llm.files import nearest_existing, reaching_for_paths, user_path
from sora_llm.inputs import (
    check_inputs,
    check_output,
    data_report,
    load_data,
    target_shapes,
    training_order,
)
from sora_llm.job import (
    Job,
    announce,
    deepspeed_options,
    hold_directory,
    process_group,
    refuse_other_data,
    say,
)
from sora_llm.layouts import check_layout
from sora_llm.lifeline import Lifeline
from sora_llm.lifeline import say as say_last
from sora_llm.loop import StepBatches, peak_memory_gib, seed_step, train_step
from sora_llm.plan import Stage, make_plan, rows_in_step
from sora_llm.report import read_json_lines
from sora_llm.rounds import Gates
from sora_llm.rundir import RunDirectory, environment
from sora_llm.schedule import SPARSIFY
from sora_llm.sora import soft_threshold
from sora_llm.start import RunResult, StartPoint, finished_before, note_preempted, resume_point
from sora_llm.stop import StopRequest, ignore_signals
from sora_llm.topology import ZERO_STAGES, launched_world, refuse_other_step, resolve_strategy
from sora_llm.training import (
    IMPORTANCE_SUFFIX,
    Training,
    current_ranks,
    cut_adapter,
    evaluation_due,
    is_due,
    load_and_inject,
    log_step,
    make_steering,
    measure,
    renew_engine,
    save_checkpoint,
)

EXIT_FINISHED, EXIT_INTERRUPTED = 0, 130


class Parser(argparse.ArgumentParser):
    """One whose complaints are bad input like any other, said once however many processes there are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows what there is")


def main(argv: Sequence[str] | None = None, prog: str = "python -m sora_llm.train") -> int:
    """The command.  Returns the exit code: 0 finished, 1 failed, 2 bad input (one sentence, once), 75 preempted."""
    parser = Parser(
        prog=prog, description="Train SoRA adapters, cut them to the ranks they found, export a verified plain LoRA."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values read as YAML; null unsets")
    parser.add_argument("--print-config", action="store_true", help="print the whole config as it was read, and stop")
    parser.add_argument("--dry-run", action="store_true", help="everything up to one step and one save, and a report")
    is_main = os.environ.get("RANK", "0") == "0"
    terminal.take_any_text()
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}; overrides have no dashes: train.max_steps=5")
        if arguments.print_config:
            config = load_config(arguments.config, arguments.overrides)
            if is_main:
                print(to_yaml(config), end="")
        else:
            result = run(arguments.config, *arguments.overrides, dry_run=arguments.dry_run)
            if result.status["state"] == "preempted":
                ignore_signals()
                return Preempted.exit_code
    except (UserError, RunFailed) as error:
        if not is_main and not distributed.in_process_group():  # in it, errors are agreed and the main process's too
            let_main_speak()
        if is_main or not distributed.in_process_group():
            terminal.say(f"sora_llm: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main:
            terminal.say("sora_llm: interrupted", sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FINISHED


def let_main_speak() -> None:
    """Wait: an error that the main process has too ends all of them meanwhile, through the launcher, which on a busy
    machine notices after seconds.  The first process of a machine waits less, and so speaks for the others there."""
    time.sleep(5.0 if os.environ.get("LOCAL_RANK", "0") == "0" else 15.0)


def run(config_path: str | Path, *overrides: str, dry_run: bool = False) -> RunResult:
    """Run a config to its end, in this process or as one of the processes that a launcher started.

    In the main thread TERM, USR1 and INT, anywhere a file STOP in the run directory, make it stop with a checkpoint and
    the status "preempted".

    Raises:
        UserError: bad input; nothing was written, but where streamed rows turned out to be bad later on.
        RunFailed: a run that could not go on; status.json says so too.
    """
    config = load_config(config_path, overrides)
    run_dir = user_path(config.output.output_dir, "output.output_dir")
    stop = StopRequest(
        run_dir,
        is_main=os.environ.get("RANK", "0") == "0",
        others_wait=distributed.in_process_group,
        look_for_file=not dry_run,
        leave=lambda request: leave_preempted(run_dir, stop, request, dry_run),
    )
    with stop, contextlib.closing(Lifeline(stop.is_asked)) as lifeline:
        try:
            stop.start()
            result = run_config(config, run_dir, stop, lifeline, dry_run)
        except Preempted as request:
            return leave_preempted(run_dir, stop, request, dry_run)
        if config.output.push_to_hub:
            push_to_hub(result, hub.repository(config.output.hub_model_id, run_dir), stop)
        return result


def push_to_hub(result: RunResult, repo_id: str, stop: StopRequest) -> None:
    """Upload the adapter of a finished run, now that its processes do not wait for each other any more."""
    if result.status["state"] == "finished" and result.adapter is not None and launched_world(os.environ).is_main:
        terminal.say(f"uploading {result.adapter} to the hub as {repo_id}")
        terminal.say(hub.push(result.adapter, repo_id, stop.is_asked))


def run_config(config: Config, run_dir: Path, stop: StopRequest, lifeline: Lifeline, dry_run: bool) -> RunResult:
    """Check, prepare and run."""
    world = launched_world(os.environ)
    settings = config.distributed
    strategy = resolve_strategy(
        settings.strategy, world, os.environ, config.model.dtype, sync_every=settings.sync_every
    )
    refuse_other_step(os.environ, config.train.gradient_accumulation_steps, config.train.max_grad_norm)
    with reaching_for_paths():
        zero_options = deepspeed_options(config, strategy)
        if config.output.push_to_hub:
            hub.check_target(config.output.hub_model_id, run_dir)
        inputs = check_inputs(config, strategy)
        check_attention(inputs.backbone)
        check_output(run_dir, config.output.resume)
        shapes = target_shapes(config, inputs.skeleton)
        check_layout(config.output.export_layout, inputs, shapes, run_dir)

        data = load_data(config, inputs, world)  # before the process group, whose timeout it may outlast
        order = training_order(config, inputs, data, rows_in_step(config, world))
        plan = make_plan(config, strategy, world, order.steps_in, shapes)

    with contextlib.ExitStack() as stack:
        group = process_group(config, strategy, world, run_dir, zero_options, lifeline)
        accelerator = stack.enter_context(group)
        stop.at_once = False
        fingerprint = data.fingerprint(order)
        refuse_other_data(fingerprint, data)
        if not dry_run and (finished := on_main(lambda: finished_before(plan, run_dir, world), world)):
            return finished
        replicas = None
        if settings.sync_every > 1:
            replicas = Replicas.make(settings.replica, world, accelerator.device, settings.timeout_minutes)
        job = Job(inputs, plan, world, accelerator, data, order, fingerprint, stop, lifeline, replicas)
        announce(job)
        if dry_run:
            return rehearse(job)
        hold_directory(job, run_dir, stack)
        if finished := on_main(lambda: finished_before(plan, run_dir, world), world):  # while this one waited
            return finished
        return run_in(job, run_dir)


# -------------------------------------------------------------------------------------------------------- the run


def run_in(job: Job, run_dir: Path) -> RunResult:
    """Train, cut and export into `run_dir`, which the main process holds.

    An exception leaves the status "failed", a request to stop a checkpoint and the status "preempted".
    """
    job.heed_stop()
    start = resume_point(job, run_dir)
    directory = RunDirectory(run_dir, is_main=job.world.is_main, tracker=job.accelerator.log)
    directory.start_at(start.step, start.folder)
    job.lifeline.on_loss = lambda loss: tell_loss(directory, loss)
    try:
        training = begin(job, directory, start)
        while True:
            train_stage(training)
            result = cut_and_export(training)
            if training.stage is job.plan.stages[-1]:
                return finish(training, result)
            next_stage(training, result.masters)
    except Preempted as request:
        request.status = on_main(directory.preempted, job.world)
        directory.report(to_dict(job.config))
        raise
    except BaseException as error:
        loss = None if isinstance(error, UserError | RunFailed) else job.lifeline.wait_for_loss()
        if loss is not None:
            if job.world.is_main:  # which says what it raises
                directory.record_loss(loss)
            else:
                tell_loss(directory, loss)
            raise RunFailed(f"{loss}; start the same command again to go on from the newest checkpoint") from error
        if directory.is_begun or not isinstance(error, UserError):
            with contextlib.suppress(RunFailed):  # a full disk is said by the error itself
                directory.status("failed", error=str(error) or type(error).__name__)
            directory.report(to_dict(job.config))
        raise


def tell_loss(directory: RunDirectory, loss: str) -> None:
    """Let one of the processes that are left say who was lost, in the status and on the terminal."""
    if directory.record_loss(loss):
        say_last(loss)


def begin(job: Job, directory: RunDirectory, start: StartPoint) -> Training:
    """Load the model, then write the first files (collective).

    Before anything is written: a stream without its place, or a model that cannot be loaded, is bad input.
    """
    zero_stage = ZERO_STAGES.get(job.plan.strategy)
    env = environment(num_processes=job.world.num_processes, strategy=job.plan.strategy, zero_stage=zero_stage)
    if start.state is not None:
        position = start.state["order"]
        on_every(lambda: job.order.seek(position))
    training = load_and_inject(job, directory, start)
    assert training.engine.zero_stage == zero_stage
    job.heed_stop()
    on_main(
        lambda: directory.begin(
            config_yaml=to_yaml(replace(job.config, output=replace(job.config.output, resume="auto"))),
            env=env,
            data_report=None if job.data.train is None else data_report(job.config, job.inputs, job.data),
            total_steps=job.plan.total_steps,
            first_step=start.step,
            resumed_from=start.folder,
            is_logged=start.state is None or start.state["unlogged"] is None,
        ),
        job.world,
    )
    on_main(lambda: checkpoint.set_aside(directory.path, start.step), job.world)
    on_main(lambda: start_trackers(job, directory.path), job.world)
    return training


def start_trackers(job: Job, run_dir: Path) -> None:
    """Those of output.report_to; on the main process, the only one that logs.

    Raises:
        RunFailed: one of them cannot be started, for example without a login.
    """
    own_options = {"wandb": {"dir": str(run_dir), "name": run_dir.name}}
    try:
        job.accelerator.init_trackers("sora_llm", config=hyperparameters(job.config), init_kwargs=own_options)
    except Exception as error:  # of whatever library it is
        names = ", ".join(job.config.output.report_to)
        raise RunFailed(
            f"output.report_to {names} could not be started: {first_line(error)}; mend that, or set output.report_to=[]"
        ) from error


def leave_preempted(run_dir: Path, stop: StopRequest, request: Preempted, dry_run: bool) -> RunResult:
    """What is left to do after a request to stop, once its checkpoint is complete: say so, remove the STOP file.

    A run that was stopped before it began has nothing to save: its status names the newest checkpoint, if any.
    """
    status = request.status
    is_main = launched_world(os.environ).is_main
    if status is None:
        status = {"state": "preempted", "checkpoint": None}
        if is_main and not dry_run:
            # Another run may be in there, or the disk be full.
            with contextlib.suppress(UserError, OSError), checkpoint.run_lock(run_dir, 0):
                status = note_preempted(run_dir)
    if is_main:
        if not dry_run:
            stop.remove_file()
        saved = status["checkpoint"]
        where = f"{run_dir / saved} is complete; start the same command again to go on" if saved else "nothing to save"
        terminal.say(f"stopped by {request}: {where}")
    lines = read_json_lines(run_dir / "metrics.jsonl")
    return RunResult(None, lines[-1] if lines else {}, status)


# -------------------------------------------------------------------------------------------------------- the loop


def train_stage(training: Training) -> None:
    """Next rows, forward, backward, step, log; between the phases the adapters take another form (collective).

    Raises:
        RunFailed: processes disagree, too many non-finite steps in a row, or nothing is left to train.
        Preempted: the run was asked to stop; a checkpoint of the last step is complete.
    """
    job, tally, stage = training.job, training.tally, training.stage
    config, world = job.config, job.world
    if training.done == 0 and job.data.dev is not None:
        ranks = current_ranks(training).fields
        line = {"eval_loss": measure(training), **ranks, **training.labels}
        training.directory.metrics(0, training.phase, line)
    if training.unlogged is not None:
        log_step(training, training.unlogged)
        training.late_round = close_round(training)
    while not training.has_ended:
        step, step_of_stage = training.done, training.done - training.first
        change_form(training, step_of_stage)
        if training.engine.is_spent:  # consensus left nothing to train
            return
        tally.start_clock()
        engine = training.engine
        steered = set_rates(training, step_of_stage)
        seed_step(config.train.seed, step, world.process_index)
        batches = job.batches(step)
        training.done = done = step + 1
        training.has_ended = step_of_stage + 1 == stage.total_steps
        # Before the step: the gather after it would heal a flipped copy.
        due = training.has_ended or is_due(config.distributed.check_every, done)
        due |= step_of_stage + 1 in stage.changes or (training.patience.counts and evaluation_due(job, done))
        if training.rounds is not None:
            training.rounds.part()
        loss_sum, outcome = train_step(
            engine, batches, job.num_averaging, before_step=engine.prove_agreement if due else None
        )
        tally.add(loss_sum, outcome, batches)
        synced = close_round(training)
        refuse_more_skipping(training)
        is_logged = training.has_ended or is_due(config.output.logging_steps, done) or evaluation_due(job, done)
        if is_logged or synced:
            seen = {**steered, **synced, "supervised_tokens": batches.supervised_tokens}
            seen["grad_norm"] = grad_norm(training, outcome, batches)
            try:
                log_step(training, seen)
            except Preempted:  # in the evaluation: the resumed run begins with this line
                save_checkpoint(training, unlogged=seen)
                raise
            training.late_round = close_round(training)  # where patience has ended the stage
        saved = training.has_ended or is_due(config.output.save_steps, done)
        if saved:
            save_checkpoint(training)
        try:
            job.heed_stop()
        except Preempted:
            if not saved:
                save_checkpoint(training)
            raise


def set_rates(training: Training, step: int) -> dict[str, Any]:
    """Give the optimizer the rates and λ of `step` of its stage; returns what its line says of λ (collective)."""
    stage = training.stage
    engine, steering, rounds = training.engine, training.steering, training.rounds
    sparse_lambda: float | dict[str, float] = 0.0
    steered: dict[str, Any] = {"lambda": 0.0}
    if is_pruning(stage, step):
        place, rates = stage.phases.place(step), stage.rates(step)
        if rounds is None:
            sparse_lambda = steering.choose(engine.gates(), place, engine.device, gate_lr=rates["gate_lr"])
        elif not steering.is_adaptive:  # that chooses when the round ends
            first, end = stage.round_bounds(step, training.job.config.distributed.sync_every)
            if step == first:
                steering.choose(rounds.gates, stage.phases.place(end - 1), engine.device, num_steps=end - first)
            sparse_lambda = steering.chosen
        steered = steering.fields if rounds is None or not steering.is_adaptive else {}
    engine.set_rates(**stage.rates(step), sparse_lambda=sparse_lambda)
    return steered


def is_pruning(stage: Stage, step: int) -> bool:
    """Whether gates are cut in `step` of the stage."""
    return stage.phases.at(step) == SPARSIFY and step >= stage.weighed_at


def refuse_more_skipping(training: Training) -> None:
    """RunFailed after too many non-finite steps in a row; with local updates when a round has ended, by the replica
    that skipped most (collective)."""
    tally, rounds = training.tally, training.rounds
    if rounds is not None and rounds.is_open:
        return
    in_a_row, tally.most_in_a_row = tally.most_in_a_row, tally.skipped_in_a_row
    if rounds is not None:
        in_a_row = max(found for (found,) in distributed.gather_integers([in_a_row], training.engine.device))
    if in_a_row >= training.job.config.train.max_skipped_steps:
        raise RunFailed(
            f"{in_a_row} steps in a row, up to step {training.done}, had a non-finite loss or gradient and were "
            "skipped; look at the data, or lower train.learning_rate and name a new output.output_dir"
        )


def grad_norm(training: Training, outcome: StepOutcome, batches: StepBatches) -> float:
    """Of the step; with local updates the mean over the processes that had rows (collective)."""
    if training.rounds is None:
        return outcome.grad_norm
    has_rows = float(batches.weight > 0)
    total, count = distributed.sum_over_processes(outcome.grad_norm * has_rows, has_rows, device=training.engine.device)
    return total / count


def close_round(training: Training) -> dict[str, Any]:
    """End the round of local updates that is open, if the last step or the end of the stage is its end (collective).

    Returns: what the line of the step says of it; {} where nothing ended.
    """
    stage, engine, steering, rounds = training.stage, training.engine, training.steering, training.rounds
    settings, step = training.job.config, training.done - 1 - training.first
    if rounds is None or not rounds.is_open:
        return {}
    if not training.has_ended and step + 1 < stage.round_bounds(step, settings.distributed.sync_every)[1]:
        return {}

    def choose(mean_gates: Gates) -> None:
        if steering.is_adaptive:
            steering.choose(mean_gates, stage.phases.place(step), engine.device)

    def prox(gates: Gates, thresholds: Gates) -> Gates:
        if steering.is_adaptive:
            return steering.cut(gates)
        return {name: soft_threshold(gate, thresholds[name]) for name, gate in gates.items()}

    prunes = is_pruning(stage, step)
    # Before consensus by svd, which takes the best of the mean of products, factors stay apart.
    is_cut_next = stage.phases.at(step) == SPARSIFY and (training.has_ended or step + 1 == stage.phases.sparsify_end)
    merges = is_cut_next and settings.sora.consensus == "svd"
    report = rounds.end(engine, prox if prunes else None, choose=choose, keep_factors=merges)
    return {**report.fields, **(steering.fields if prunes else {})}


def change_form(training: Training, step: int) -> None:
    """Before the first step of a phase that asks for it: put the adapters into balanced form, or cut them to what
    consensus keeps, and build the optimizer and its engine anew around the tensors that are left (collective).

    Raises:
        RunFailed: processes disagree, or nothing is left to train.
    """
    job, engine, stage = training.job, training.engine, training.stage
    if step not in stage.changes:
        return
    training.tally.pause_clock()
    training.prove_agreement()
    old = engine.masters()
    importance: dict[str, Tensor] = {}
    with engine.released(whole=False) as model:
        if step < stage.phases.sparsify_end:
            dtype, device = DTYPES[job.config.sora.dtype], job.accelerator.device
            masters, importance = pipeline.balance(
                model, old, budgets=job.plan.budgets, dtype=dtype, world=job.world, device=device
            )
        else:
            cut = cut_adapter(training, model, old)
            if cut.ranks.kept_params == 0:
                if not job.config.output.allow_empty_adapter:
                    raise RunFailed(
                        f"consensus after step {training.done} left no rank to train; prune less (sora.sparse_lambda "
                        "or the budget), or set output.allow_empty_adapter"
                    )
                return
            masters = cut.masters
    del old
    renew_engine(training, model, masters, importance)
    training.steering.importance = {name.removesuffix(IMPORTANCE_SUFFIX): values for name, values in importance.items()}


def next_stage(training: Training, masters: Mapping[str, Tensor]) -> None:
    """Go on from the uncut `masters` with a fresh optimizer (collective)."""
    job = training.job
    with training.engine.released(whole=False) as model:
        pipeline.restore(model, masters, DTYPES[job.config.sora.dtype])
    renew_engine(training, model, masters, {})
    training.stage_number += 1
    training.first, training.has_ended, training.unlogged = training.done, False, None
    training.steering = make_steering(job, training.stage_number)
    training.patience.start_again()


def hyperparameters(config: Config) -> dict[str, int | float | str]:
    """The config as trackers take it: one flat dict of plain values."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else json.dumps(value)
        for section, values in to_dict(config).items()
        for key, value in values.items()
    }


@contextlib.contextmanager
def rehearsal_folder(job: Job) -> Iterator[Path]:
    """A folder that all processes see, as they will the run directory, and that is removed (collective)."""
    run_dir = user_path(job.config.output.output_dir, "output.output_dir")
    above = nearest_existing(run_dir.parent)
    folder = on_main(lambda: tempfile.mkdtemp(prefix=".dry-run-", dir=above), job.world)
    try:
        yield Path(folder)
    finally:
        if job.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def rehearse(job: Job) -> RunResult:
    """The dry run: one step and one save into a folder that is thrown away, then what a real run would take."""
    with rehearsal_folder(job) as folder:
        directory = RunDirectory(folder, is_main=job.world.is_main)
        training = load_and_inject(job, directory, StartPoint())
        engine, tally = training.engine, training.tally
        job.heed_stop()
        tally.start_clock()
        set_rates(training, 0)
        batches = job.batches(0)
        loss_sum, outcome = train_step(engine, batches, job.num_averaging)
        if distributed.any_process(outcome.skipped, engine.device):
            raise RunFailed(
                "dry run: the first step has a non-finite loss or gradient; look at model.dtype and the data"
            )
        tally.add(loss_sum, outcome, batches)
        training.done = 1
        if training.rounds is not None:
            training.rounds.end(engine)
        save_checkpoint(training)
        line = {**tally.flush(), "grad_norm": outcome.grad_norm, "peak_memory_gib": peak_memory_gib()}
    memory, steps = job.memory, job.plan.total_steps
    if job.data.train is None:
        tokens = f"{steps * batches.tokens:,}, of which {steps * batches.supervised_tokens:,} supervised"
    else:
        epochs = steps / job.order.steps_in(Fraction(1))
        tokens = f"{epochs * job.data.train.num_tokens:,.0f}, of which "
        tokens += f"{epochs * job.data.train.num_supervised:,.0f} supervised ({epochs:.2f} epochs)"
    say(
        job.world,
        "dry run: one step and one save worked, nothing was kept\n"
        f"  trainable parameters  {memory.trainable_parameters:,} beside {memory.frozen_parameters:,} frozen ones\n"
        f"  steps                 {steps} of {job.step_size}\n"
        f"  tokens                about {tokens}\n"
        f"{pipeline.memory_table(memory)}\n"
        f"  peak memory           {line['peak_memory_gib']:.2f} GiB per process in this step\n"
        f"  first loss            {line['loss']:.4f}, gradient norm {line['grad_norm']:.4g}",
    )
    return RunResult(None, line, {"state": "dry run"})


if __name__ == "__main__":
    sys.exit(main())
