"""The story of a run: one YAML in, a pruned and verified LoRA out.

    accelerate launch -m sora_llm.train configs/llama7b.yaml [section.key=value ...]

check the input → prepare the data → load and inject → train (dense, sparsify) → agree and cut → export.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm import checkpoint, distributed, export, hub, pipeline
from sora_llm.alarms import Alarms, Patience
from sora_llm.backbone import DTYPES, load_backbone
from sora_llm.config import Config, load_config, to_dict, to_yaml
from sora_llm.data.dataset import TokenDataset
from sora_llm.distributed import Engine, Replicas, on_every, on_main
from sora_llm.errors import Preempted, RunFailed, UserError
from sora_llm.export import Provenance
from sora_llm.files import user_path
from sora_llm.generation import sample_answers
from sora_llm.inject import adapter_parameters, adapters, cut_adapters, inject_sora, start_from
from sora_llm.inputs import (
    check_inputs,
    check_output,
    data_report,
    exported_template,
    load_data,
    prompt_form,
    prompt_ids,
    start_lora,
    target_modules,
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
from sora_llm.lifeline import Lifeline
from sora_llm.lifeline import say as say_last
from sora_llm.local_updates import OuterOptimizer
from sora_llm.loop import Tally, peak_memory_gib, seed_step, train_step
from sora_llm.optim import IMPORTANCE, ProxAdamW, parameter_groups
from sora_llm.pipeline import Cut
from sora_llm.plan import Stage, make_plan, rows_in_step, stage_name
from sora_llm.report import read_json_lines
from sora_llm.rounds import Gates, Prox, Rounds
from sora_llm.rundir import RunDirectory, environment
from sora_llm.schedule import DENSE, FINETUNE, SPARSIFY
from sora_llm.sora import soft_threshold
from sora_llm.start import RunResult, StartPoint, finished_before, note_preempted, resume_point
from sora_llm.steering import Steering
from sora_llm.stop import StopRequest, ignore_signals
from sora_llm.topology import (
    ZERO_STAGES,
    launched_world,
    resolve_strategy,
)

EXIT_FINISHED, EXIT_INTERRUPTED = 0, 130


def main(argv: Sequence[str] | None = None, prog: str = "python -m sora_llm.train") -> int:
    """The command.  Returns the exit code: 0 finished, 1 failed, 2 bad input (one sentence, once), 75 preempted."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Train SoRA adapters, cut them to the ranks they found, export a verified plain LoRA."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values read as YAML; null unsets")
    parser.add_argument("--print-config", action="store_true", help="print the whole config as it was read, and stop")
    parser.add_argument("--dry-run", action="store_true", help="everything up to one step and one save, and a report")
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; overrides have no dashes: train.max_steps=5")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
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
            print(f"sora_llm: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main:
            print("sora_llm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FINISHED


def let_main_speak() -> None:
    """Wait: an error that the main process has too ends all of them meanwhile, through the launcher.  The first
    process of a machine waits less, and so speaks for the others there."""
    time.sleep(3.0 if os.environ.get("LOCAL_RANK", "0") == "0" else 6.0)


def run(config_path: str | Path, *overrides: str, dry_run: bool = False) -> RunResult:
    """Run a config to its end, in this process or as one of the processes that a launcher started.

    In the main thread TERM, USR1 and INT, anywhere a file STOP in the run directory, make it stop with a checkpoint and
    the status "preempted".

    Raises:
        UserError: bad input; nothing was written.
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
        print(f"uploading {result.adapter} to the hub as {repo_id}", flush=True)
        print(hub.push(result.adapter, repo_id, stop.is_asked), flush=True)


def run_config(config: Config, run_dir: Path, stop: StopRequest, lifeline: Lifeline, dry_run: bool) -> RunResult:
    """Check, prepare and run."""
    world = launched_world(os.environ)
    settings = config.distributed
    strategy = resolve_strategy(
        settings.strategy, world, os.environ, config.model.dtype, sync_every=settings.sync_every
    )
    zero_options = deepspeed_options(config, strategy)
    if config.output.push_to_hub:
        hub.check_target(config.output.hub_model_id, run_dir)
    inputs = check_inputs(config, strategy)
    check_output(run_dir, config.output.resume)

    data = load_data(config, inputs, world)  # before the process group, whose timeout it may outlast
    order = training_order(config, inputs, data, rows_in_step(config, world))
    plan = make_plan(config, strategy, world, order.steps_in, target_shapes(config, inputs.skeleton))

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
            replicas = Replicas.make(settings.replica, world, accelerator.device)
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
    if start.passed_over:
        on_main(lambda: checkpoint.set_aside_damaged(directory.path), job.world)
    own_options = {"wandb": {"dir": str(directory.path), "name": directory.path.name}}
    job.accelerator.init_trackers("sora_llm", config=hyperparameters(job.config), init_kwargs=own_options)
    return training


def leave_preempted(run_dir: Path, stop: StopRequest, request: Preempted, dry_run: bool) -> RunResult:
    """What is left to do after a request to stop, once its checkpoint is complete: say so, remove the STOP file.

    A run that was stopped before it began has nothing to save: its status names the newest checkpoint, if any.
    """
    status = request.status
    is_main = launched_world(os.environ).is_main
    if status is None:
        status = {"state": "preempted", "checkpoint": None}
        if is_main and not dry_run:
            with contextlib.suppress(UserError), checkpoint.run_lock(run_dir, 0):  # else another run is in there
                status = note_preempted(run_dir)
    if is_main:
        if not dry_run:
            stop.remove_file()
        saved = status["checkpoint"]
        where = f"{run_dir / saved} is complete; start the same command again to go on" if saved else "nothing to save"
        print(f"stopped by {request}: {where}", flush=True)
    lines = read_json_lines(run_dir / "metrics.jsonl")
    return RunResult(None, lines[-1] if lines else {}, status)


def load_model(job: Job) -> nn.Module:
    """The frozen backbone on this process's device."""
    spec, device, data = job.inputs.backbone, job.accelerator.device, job.config.data
    model = load_backbone(spec, device, gradient_checkpointing=job.config.train.gradient_checkpointing)
    if data.sample_packing:
        pipeline.prove_packing(model, spec.attn_implementation, device, is_8bit=spec.load_in_8bit)
    return model


@dataclass
class Training:
    """A run in the middle of its loop.  `done` counts the optimizer steps behind it, `first` those before its stage."""

    job: Job
    directory: RunDirectory
    engine: Engine
    tally: Tally
    steering: Steering
    alarms: Alarms
    patience: Patience
    rounds: Rounds | None = None
    """Of local updates; None where all processes step together."""
    stage_number: int = 0
    first: int = 0
    done: int = 0
    has_ended: bool = False
    """Whether the last step of the stage is behind it; patience may have chosen which one that is."""
    alarmed: list[str] = field(default_factory=list)
    """Alarms that wait for the next line of metrics."""
    is_check_due: bool = False
    """Whether the replicas are to prove that they agree as soon as they do."""
    unlogged: Mapping[str, Any] | None = None
    """What the line of step `done` needs, where the run was interrupted before it could be written."""

    @property
    def stage(self) -> Stage:
        return self.job.plan.stages[self.stage_number]

    @property
    def phase(self) -> str:
        """Of the step that is behind it."""
        return self.stage.phases.at(max(0, self.done - self.first - 1))

    @property
    def agrees(self) -> bool:
        """Whether all processes hold the same adapter: always, but for inside a round of local updates."""
        return self.rounds is None or self.rounds.agree

    @property
    def labels(self) -> dict[str, Any]:
        """What every line of a path says."""
        if not self.job.plan.is_path:
            return {}
        return {"stage": self.stage_number, "sparse_lambda": self.stage.sparse_lambda}


def load_and_inject(job: Job, directory: RunDirectory, start: StartPoint) -> Training:
    """The frozen backbone with fresh or resumed adapters, under its engine (collective)."""
    sora, plan = job.config.sora, job.plan
    model = on_every(lambda: load_model(job))
    torch.manual_seed(job.config.train.seed)
    inject_sora(model, sora.r, sora.lora_alpha, sora.lora_dropout, target_modules(job.config), DTYPES[sora.dtype])
    alarms = Alarms(plan.budgets, pipeline.full_params(adapters(model)))
    patience = Patience(job.config.evaluation.early_stopping_patience)
    if start.folder is None or start.state is None:
        if job.config.model.adapter is not None:
            on_every(lambda: warm_start(job, model))
        engine = make_engine(job, model)
        rounds = make_rounds(job)
        if rounds is not None:
            rounds.begin(engine)
        tally = Tally.start(engine.device)
        return Training(job, directory, engine, tally, make_steering(job, 0), alarms, patience, rounds)
    folder, state = start.folder, start.state
    agreed = on_every(lambda: checkpoint.read_tensors(folder))
    tensors = agreed
    if job.replicas is not None:
        own_file = checkpoint.replica_file(job.replicas.index)
        tensors = on_every(lambda: checkpoint.read_tensors(folder, own_file))
    masters = take_masters(model, tensors, folder, is_cut=state["phase"] == FINETUNE)
    engine = make_engine(job, model)  # after the module has its values: ZeRO copies its masters from there
    own_steps = state["optimizer_steps"] if job.replicas is None else state["optimizer_steps"][job.replicas.index]
    engine.load(masters, tensors, own_steps)
    rounds = make_rounds(job)
    if rounds is not None:
        rounds.load(agreed, state["rounds"], engine)
    steering = make_steering(job, state["stage"]["number"])
    steering.load(
        state["steering"], {name.removesuffix(WEIGHTS): tensors[name] for name in tensors if name.endswith(WEIGHTS)}
    )
    tally = Tally.start(engine.device)
    tally.load(state["tally"], job.world.process_index)
    alarms.load(state["alarms"])
    patience.load(state["patience"])
    return Training(
        job,
        directory,
        engine,
        tally,
        steering,
        alarms,
        patience,
        rounds,
        stage_number=state["stage"]["number"],
        first=state["stage"]["first"],
        done=start.step,
        has_ended=state["stage"]["has_ended"],
        alarmed=state["alarms"]["waiting"],
        unlogged=state["unlogged"],
    )


def warm_start(job: Job, model: nn.Module) -> None:
    """Let the adapters begin where the saved one ended; DDP and ZeRO start with the main process's values anyway."""
    lora = start_lora(job.config)
    start_from(model, lora.factors, lora.scaling)


def make_steering(job: Job, stage_number: int) -> Steering:
    """A fresh one for a stage."""
    sparse_lambda = job.plan.stages[stage_number].sparse_lambda
    return Steering(str(job.config.sora.threshold), job.plan.budgets, sparse_lambda)


WEIGHTS = f".gate.{IMPORTANCE}"


def take_masters(model: nn.Module, tensors: dict[str, Tensor], folder: Path, is_cut: bool) -> dict[str, Tensor]:
    """Move the adapter's values from `tensors` into the module, which is cut to their shapes where the run was.

    Raises:
        UserError: they are not of this model.
    """
    if is_cut:
        dtypes = {name: layer.gate.dtype for name, layer in adapters(model).items() if layer.gate is not None}
        factors = {name: (A, B) for name, (A, B, _) in pipeline.factors_of(adapters(model), tensors).items()}
        try:
            cut_adapters(model, {name: (A.to(dtypes[name]), B.to(dtypes[name])) for name, (A, B) in factors.items()})
        except ValueError as error:
            raise UserError(f"the checkpoint {folder} is not of this model: {error}") from None
    parameters = adapter_parameters(model)
    for name, parameter in parameters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise UserError(f"the checkpoint {folder} is not of this model: {name} is missing or of another shape")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return {name: tensors.pop(name) for name in parameters}


def make_engine(job: Job, model: nn.Module) -> Engine:
    """`model` and a fresh optimizer under the run's strategy (collective)."""
    settings, budgets = job.config.train, job.plan.budgets
    groups = parameter_groups(
        model,
        settings.learning_rate,
        job.plan.stages[0].gate_lr,
        weight_decay=settings.weight_decay,
        threshold=str(job.config.sora.threshold),
        budgets={budget.name: list(budget.costs) for budget in budgets} or None,
        deferred=job.replicas is not None,
    )
    return Engine(job.accelerator, model, ProxAdamW(groups), job.plan.strategy, settings.max_grad_norm, job.replicas)


def make_rounds(job: Job) -> Rounds | None:
    """The rounds of local updates, not begun; None where all processes step together."""
    if job.replicas is None:
        return None
    settings = job.config.distributed
    return Rounds(job.replicas, OuterOptimizer(settings.outer_learning_rate, settings.outer_momentum))


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
        line = {"eval_loss": current_dev_loss(training), **ranks, **training.labels}
        training.directory.metrics(0, training.phase, line)
    if training.unlogged is not None:
        log_step(training, training.unlogged)
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
        check = engine.prove_agreement if due and training.rounds is None else None
        training.is_check_due |= due
        if training.rounds is not None:
            training.rounds.part()
        loss_sum, outcome = train_step(engine, batches, job.num_averaging, before_step=check)
        tally.add(loss_sum, outcome, batches)
        synced: dict[str, Any] = {}
        is_synced = training.rounds is None or training.has_ended or ends_round(training, step_of_stage)
        if training.rounds is not None and is_synced:
            synced = end_round(training, training.rounds, step_of_stage)
        if is_synced:
            refuse_more_skipping(training)
        is_logged = training.has_ended or is_due(config.output.logging_steps, done) or evaluation_due(job, done)
        if is_logged or synced:
            seen = {**steered, **synced, "supervised_tokens": batches.supervised_tokens}
            seen["grad_norm"] = mean_over_replicas(training, outcome.grad_norm)
            try:
                log_step(training, seen)
            except Preempted:  # in the evaluation: the resumed run begins with this line
                save_checkpoint(training, unlogged=seen)
                raise
            if training.rounds is not None and training.has_ended and not is_synced:  # patience ended it
                end_round(training, training.rounds, step_of_stage)
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
        elif not steering.is_adaptive:  # which chooses when the round ends
            first, end = stage.round_bounds(step, training.job.config.distributed.sync_every)
            if step == first:
                steering.choose(rounds.gates, stage.phases.place(end - 1), engine.device, num_steps=end - first)
            sparse_lambda = steering.chosen
        steered = steering.fields
    engine.set_rates(**stage.rates(step), sparse_lambda=sparse_lambda)
    return steered


def is_pruning(stage: Stage, step: int) -> bool:
    """Whether gates are cut in `step` of the stage."""
    return stage.phases.at(step) == SPARSIFY and step >= stage.weighed_at


def refuse_more_skipping(training: Training) -> None:
    """RunFailed after too many non-finite steps in a row (collective with local updates)."""
    in_a_row, _ = skipped(training)
    if in_a_row >= training.job.config.train.max_skipped_steps:
        raise RunFailed(
            f"the last {in_a_row} steps, up to step {training.done}, had a non-finite loss or gradient and were "
            "skipped; lower train.learning_rate or look at the data, and start the command again"
        )


def skipped(training: Training) -> tuple[int, int]:
    """Steps skipped in a row and in all, by the replica that skipped most (collective with local updates)."""
    tally = training.tally
    own = [tally.skipped_in_a_row, tally.skipped_steps]
    if training.rounds is None:
        return own[0], own[1]
    in_a_row, in_all = zip(*distributed.gather_integers(own, training.engine.device), strict=True)
    return max(in_a_row), max(in_all)


def mean_over_replicas(training: Training, value: float) -> float:
    """Of a figure that is the same on all processes of a replica (collective with local updates)."""
    if training.rounds is None:
        return value
    world = training.job.world
    return distributed.sum_over_processes(value, device=training.engine.device)[0] / world.num_processes


def ends_round(training: Training, step: int) -> bool:
    """Whether a round of local updates ends with `step` of the stage."""
    return step + 1 == training.stage.round_bounds(step, training.job.config.distributed.sync_every)[1]


def end_round(training: Training, rounds: Rounds, step: int) -> dict[str, Any]:
    """Let the replicas agree after `step` of the stage; what its line says of that (collective).

    Before consensus takes the best of the mean of products (`svd`) only the support is agreed on: factors stay apart
    for the merge.
    """
    stage, engine, steering = training.stage, training.engine, training.steering

    def prox(mean_gates: Gates) -> Prox:
        if steering.is_adaptive:
            steering.choose(mean_gates, stage.phases.place(step), engine.device)
            return lambda gates, thresholds: steering.cut(gates)
        return lambda gates, thresholds: {n: soft_threshold(gates[n], thresholds[n]) for n in gates}

    is_cut_next = stage.phases.at(step) == SPARSIFY and (training.has_ended or step + 1 == stage.phases.sparsify_end)
    merges = is_cut_next and training.job.config.sora.consensus == "svd"
    report = rounds.end(engine, prox if is_pruning(stage, step) else None, keep_factors=merges)
    if training.is_check_due and rounds.agree:
        engine.prove_agreement()
        training.is_check_due = False
    return {**report.fields, **(steering.fields if is_pruning(stage, step) else {})}


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
    if training.agrees:
        engine.prove_agreement()
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
    training.engine = make_engine(job, model)
    training.engine.load(masters, importance, 0)
    if training.rounds is not None:
        training.rounds.begin(training.engine)
    training.steering.importance = {name.removesuffix(WEIGHTS): values for name, values in importance.items()}


def next_stage(training: Training, masters: Mapping[str, Tensor]) -> None:
    """Go on from the uncut `masters` with a fresh optimizer (collective)."""
    job = training.job
    with training.engine.released(whole=False) as model:
        pipeline.restore(model, masters, DTYPES[job.config.sora.dtype])
    training.engine = make_engine(job, model)
    training.engine.load(masters, {}, 0)
    if training.rounds is not None:
        training.rounds.begin(training.engine)
    training.stage_number += 1
    training.first, training.has_ended, training.unlogged = training.done, False, None
    training.steering = make_steering(job, training.stage_number)
    training.patience.start_again()


def cut_adapter(
    training: Training, model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Cut:
    """Cut `model` as the config says, and say what became of it (collective)."""
    job = training.job
    sora, budgets = job.config.sora, job.plan.budgets
    had_gates = any(layer.gate is not None for layer in adapters(model).values())
    cut = pipeline.cut_by_consensus(
        model,
        masters,
        consensus=sora.consensus,
        budgets=budgets,
        dtype=DTYPES[sora.dtype] if dtype is None else dtype,
        world=job.world,
        device=job.accelerator.device,
        replicas=None if training.agrees else job.replicas,
    )
    if had_gates:
        if cut.spread is not None:
            say(job.world, f"merging replicas of which the farthest is {cut.spread:.1%} of ΔW from their mean")
        say(
            job.world,
            f"consensus ({sora.consensus}): mean rank {cut.ranks.mean_rank:.2f}, {cut.ranks.kept_params:,} parameters, "
            f"{cut.dropped_share:.1%} of ΔW's energy dropped",
        )
        training.alarmed += raise_alarms(job, training.alarms.of_cut(cut.ranks.ranks, cut.shortfall))
    return cut


def raise_alarms(job: Job, sentences: list[str]) -> list[str]:
    """Say them; the same sentences."""
    for sentence in sentences:
        say(job.world, f"warning: {sentence}")
    return sentences


def evaluation_due(job: Job, done: int) -> bool:
    """Whether the dev loss is measured after `done` steps."""
    return job.data.dev is not None and is_due(job.config.evaluation.eval_steps, done)


def log_step(training: Training, seen: Mapping[str, Any]) -> None:
    """The line of the step that is done (collective); `seen` is what only the step itself knew."""
    job, tally, done, stage = training.job, training.tally, training.done, training.stage
    step_of_stage, phase = done - training.first - 1, training.phase
    rates = stage.rates(step_of_stage)
    tally.pause_clock()
    ranks = current_ranks(training)
    evaluated = {"eval_loss": current_dev_loss(training)} if evaluation_due(job, done) else {}
    fields: dict[str, Any] = {
        **tally.flush(),
        "learning_rate": rates["learning_rate"],
        "gate_learning_rate": rates["gate_lr"] if phase != FINETUNE else None,
        **seen,
        "skipped_steps": skipped(training)[1],
        "peak_memory_gib": peak_memory_gib(),
        **ranks.fields,
        **evaluated,
        **training.labels,
    }
    place = stage.phases.place(step_of_stage) if phase == SPARSIFY else None
    found = training.alarms.of_line({"step": done, "phase": phase, **fields}, place)
    fields["alarms"] = (training.alarmed + raise_alarms(job, found)) or None
    training.alarmed = []
    training.directory.metrics(done, phase, fields)
    if phase != DENSE:
        training.directory.ranks(done, ranks.ranks, training.labels)
    if evaluated and phase != DENSE and (phase == FINETUNE or job.plan.is_path):
        training.has_ended |= training.patience.is_exhausted_by(evaluated["eval_loss"])


def is_due(interval: int | None, done: int) -> bool:
    """Whether something that happens every `interval` steps happens after `done` steps; None is never."""
    return interval is not None and done % interval == 0


def dev_loss(job: Job, model: nn.Module) -> float:
    """The loss of `model` over all dev rows (collective)."""
    assert job.data.dev is not None
    return loss_over(job, model, job.data.dev)


def current_dev_loss(training: Training) -> float:
    """That of the adapter as it is: inside a round of local updates, of the replicas' slot-wise mean (collective)."""
    rounds, engine = training.rounds, training.engine
    with contextlib.nullcontext() if rounds is None else rounds.averaged(engine):
        return dev_loss(training.job, engine.model)


def loss_over(job: Job, model: nn.Module, rows: TokenDataset) -> float:
    """The loss of `model` over all `rows` (collective)."""
    result = pipeline.evaluate(
        model,
        rows,
        job.inputs.batch,
        batch_size=job.config.evaluation.per_device_eval_batch_size,
        world=job.world,
        device=job.accelerator.device,
        before_batch=job.heed_stop,
    )
    return result.loss


def current_ranks(training: Training) -> pipeline.RankReport:
    """Ranks by the gates as they are, or as the replicas agreed on them last (collective)."""
    engine, rounds = training.engine, training.rounds
    return pipeline.rank_report(adapters(engine.module), engine.gates() if rounds is None else rounds.gates)


def save_checkpoint(training: Training, unlogged: Mapping[str, float] | None = None) -> None:
    """Write the canonical state of the run as it is (collective; the main process writes).

    `unlogged` is what the line of this step still needs where it has not been written.
    """
    job, engine, directory, step = training.job, training.engine, training.directory, training.done
    training.tally.pause_clock()
    moments, optimizer_steps = engine.optimizer_state()
    tensors = {**engine.masters(), **moments}
    state: dict[str, Any] = {
        "phase": training.phase,
        "stage": {"number": training.stage_number, "first": training.first, "has_ended": training.has_ended},
        "optimizer_steps": optimizer_steps,
        "tally": training.tally.state(),
        "steering": training.steering.state(),
        "alarms": {**training.alarms.state(), "waiting": training.alarmed},
        "patience": training.patience.state(),
        "unlogged": unlogged,
        "num_processes": job.world.num_processes,
        "data": job.fingerprint,
        "order": job.order.position(),
        "config": to_dict(job.config),
    }
    keep, rounds, num_replicas = job.config.output.save_total_limit, training.rounds, 0
    if rounds is not None:
        own, index, num_replicas = tensors, rounds.replicas.index, rounds.replicas.num
        importance = {name: tensor for name, tensor in own.items() if name.endswith(WEIGHTS)}
        tensors = {**rounds.tensors(), **importance}
        steps = distributed.gather_objects(optimizer_steps)
        state["optimizer_steps"] = [steps[members[0]] for members in rounds.replicas.members]
        state["rounds"] = rounds.state()
        on_main(lambda: checkpoint.begin_replicas(directory.path, step), job.world)
        if_lead = rounds.replicas.is_lead
        on_every(lambda: checkpoint.save_replica(directory.path, step, index, own) if if_lead else None)
    directory.checkpoint = on_main(
        lambda: checkpoint.save(directory.path, step, tensors, state, keep, num_replicas), job.world
    )
    directory.step = step
    directory.status("running", phase=training.phase)
    directory.report(to_dict(job.config))


@dataclass(frozen=True)
class StageResult:
    """A stage's adapter on disk, and the weights as they were before it was cut: the next stage goes on from them."""

    exported: pipeline.Exported
    masters: Mapping[str, Tensor]


def cut_and_export(training: Training) -> StageResult:
    """Cut what is not cut yet to what the processes agree on, export it, reload it from disk (collective)."""
    job, engine, directory = training.job, training.engine, training.directory
    config, is_path = job.config, job.plan.is_path
    directory.step = training.done
    directory.status("running", phase="export")
    if training.agrees:
        engine.prove_agreement()
    masters = engine.masters()
    goes_on_from = masters if training.rounds is None else training.rounds.tensors()
    with engine.released() as model:
        ranks = cut_adapter(training, model, masters, dtype=torch.float32).ranks
        job.heed_stop()
        fields: dict[str, Any] = {**ranks.fields, **training.labels, "alarms": training.alarmed or None}
        if job.data.dev is not None:
            fields["eval_loss"] = dev_loss(job, model)
        if is_path and job.data.train is not None:
            fields["train_loss"] = memorisation(job, model)
        exported = pipeline.export_verified(
            model,
            directory.path / "path" / stage_name(training.stage.sparse_lambda or 0.0)
            if is_path
            else directory.path / "adapter",
            config.output.export_layout,
            world=job.world,
            provenance=Provenance(
                base_model=config.model.name_or_path,
                data=[dataset.path for dataset in config.data.datasets],
                metrics={"dev loss of the trained adapter": fields["eval_loss"]} if "eval_loss" in fields else {},
                tokenizer_files=job.inputs.tokenizer_files,
                chat_template=exported_template(config, job.inputs),
                load_options=job.inputs.backbone.load_call,
            ),
            allow_empty=config.output.allow_empty_adapter,
            probe_ids=probe(job),
            eval_loss_of=lambda peft_model: None if job.data.dev is None else dev_loss(job, peft_model),
            before_publishing=job.heed_stop,
        )
        if job.world.is_main and training.stage is job.plan.stages[-1]:
            answer_samples(job, model, directory)
    if exported.eval_loss is not None:
        fields["eval_loss_exported"] = exported.eval_loss
    training.alarmed = []
    directory.metrics(training.done, "export", fields)
    directory.ranks(training.done, ranks.ranks, training.labels)
    worst = max(module["delta_error"] for module in exported.certificate["modules"].values())
    say(
        job.world,
        f"mean rank {config.sora.r} → {ranks.mean_rank:.2f}, {ranks.kept_params:,} parameters kept; self-check passed "
        f"(ΔW to {worst:.1e}, logits to {exported.certificate['logits_error']:.1e}); adapter: {exported.folder}",
    )
    return StageResult(exported, goes_on_from)


def finish(training: Training, result: StageResult) -> RunResult:
    """The last stage's adapter is the run's (collective)."""
    job, directory = training.job, training.directory
    adapter = directory.path / "adapter"
    if job.plan.is_path:
        on_main(lambda: export.copy_adapter(result.exported.folder, adapter), job.world)
    directory.adapter = adapter
    directory.status("finished", phase="done")
    directory.report(to_dict(job.config), plots=True)
    metrics, status = on_main(lambda: (directory.last_metrics, directory.last_status), job.world)
    return RunResult(adapter, metrics, status)


def memorisation(job: Job, model: nn.Module) -> float:
    """The loss of `model` over some rows that it was trained on, as many as dev rows, evenly spaced (collective)."""
    assert job.data.train is not None
    count = min(len(job.data.train), MEMORISED_ROWS if job.data.dev is None else len(job.data.dev))
    rows = [index * len(job.data.train) // count for index in range(count)]
    return loss_over(job, model, job.data.train.select(rows))


MEMORISED_ROWS = 256


def answer_samples(job: Job, model: nn.Module, directory: RunDirectory) -> None:
    """Print and keep the answers to evaluation.sample_prompts; one process, after the adapter is safe.

    A model that cannot generate costs the samples, not the run.
    """
    prompts = {text: prompt_ids(job.config, job.inputs, text) for text in job.config.evaluation.sample_prompts}
    if not prompts:
        return
    try:
        stop = prompt_form(job.config, job.inputs.tokenizer, job.inputs.chat_template).stop
        answers = sample_answers(model, job.inputs.tokenizer, prompts, stop)
    except Exception as error:
        say(job.world, f"evaluation.sample_prompts could not be answered: {type(error).__name__}: {error}")
        return
    directory.samples(answers)
    for answer in answers:
        say(job.world, f"> {answer['prompt']}\n  base:    {answer['base']!r}\n  adapted: {answer['adapted']!r}")


def hyperparameters(config: Config) -> dict[str, int | float | str]:
    """The config as trackers take it: one flat dict of plain values."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else json.dumps(value)
        for section, values in to_dict(config).items()
        for key, value in values.items()
    }


def probe(job: Job, num_tokens: int = 64) -> Tensor:
    """Token ids (1, T) of real text for the export's logits check: the start of the longest row."""
    rows = job.data.dev if job.data.dev is not None else job.order.sample()
    longest = int(rows.lengths.argmax())
    return torch.tensor(rows[longest][0][:num_tokens].tolist())[None]


def rehearse(job: Job) -> RunResult:
    """The dry run: one step and one save into a folder that is thrown away, then what a real run would take."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder), is_main=job.world.is_main)
        training = load_and_inject(job, directory, StartPoint())
        engine, tally = training.engine, training.tally
        job.heed_stop()
        tally.start_clock()
        set_rates(training, 0)
        batches = job.batches(0)
        loss_sum, outcome = train_step(engine, batches, job.num_averaging)
        if outcome.skipped:
            raise RunFailed(
                "dry run: the first step has a non-finite loss or gradient; look at model.dtype and the data"
            )
        tally.add(loss_sum, outcome, batches)
        training.done = 1
        if training.rounds is not None:
            training.rounds.end(engine, None)
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
