"""A run from start to finish: one YAML in, a pruned and verified LoRA out.

    accelerate launch -m sora_llm.train configs/llama7b.yaml [section.key=value ...]

check the input → prepare the data → load and inject → train (dense, sparsify) → agree and cut → export.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sora_llm import checkpoint, hub, run_files, terminal
from sora_llm.arguments import OVERRIDES, Parser
from sora_llm.backbone import check_attention
from sora_llm.compiled import check_compilable
from sora_llm.config import Config, from_dict, load_config, to_dict, to_yaml
from sora_llm.distributed.collectives import in_process_group, is_timeout, on_every, on_main
from sora_llm.distributed.group import uses_cuda
from sora_llm.distributed.replicas import Replicas
from sora_llm.errors import EXIT_INTERRUPTED, Preempted, RunFailed, UserError, first_line
from sora_llm.files import path_errors_as_user_errors, user_path
from sora_llm.prompt_format import names_template_file
from sora_llm.report import read_json_lines
from sora_llm.running import run_state
from sora_llm.running.assembly import load_and_inject
from sora_llm.running.dry_run import perform_dry_run
from sora_llm.running.finish import cut_and_export, finish
from sora_llm.running.inputs import check_inputs, check_output
from sora_llm.running.job import Job, hold_directory
from sora_llm.running.layouts import check_layout, check_place
from sora_llm.running.liveness import LivenessMonitor, print_final_error
from sora_llm.running.plan import make_plan, rows_in_step
from sora_llm.running.processes import (
    deepspeed_options,
    process_group,
    refuse_differing_runs,
    timeout_failure,
)
from sora_llm.running.run_state import RunLock
from sora_llm.running.rundir import RunDirectory, environment
from sora_llm.running.start import RunResult, StartPoint, finished_before, note_preempted, resume_point
from sora_llm.running.stop import StopRequest, ignore_signals
from sora_llm.running.summary import print_summary
from sora_llm.running.training import Training
from sora_llm.running.training_data import data_report, load_data, training_order
from sora_llm.running.training_loop import next_stage, train_stage
from sora_llm.running.unpack import target_shapes
from sora_llm.topology import (
    ZERO_STAGES,
    is_main_process,
    launched_world,
    refuse_lone_process,
    refuse_other_step,
    resolve_strategy,
)

EXIT_FINISHED = 0
AGAIN = "run the same command again: it resumes from the newest checkpoint, if there is one"


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="Train SoRA adapters, cut them to the ranks they found, export a verified plain LoRA.",
        unknown_hint="overrides have no dashes: train.max_steps=5",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help="values read as YAML; null unsets")
    parser.add_argument("--print-config", action="store_true", help="print the whole config as read, and exit")
    parser.add_argument("--dry-run", action="store_true", help="run up to one step and one save, and report")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m sora_llm.train") -> int:
    """The command.  Returns the exit code: 0 finished, 1 failed, 2 bad input (one sentence, once), 75 preempted."""
    parser = make_parser(prog)
    is_main = is_main_process(os.environ)
    terminal.escape_unencodable()
    try:
        arguments = parser.parse_intermixed_args(argv)
        if arguments.print_config:
            config = load_config(arguments.config, arguments.overrides)
            if is_main and not terminal.print_result(to_yaml(config).rstrip("\n")):
                return RunFailed.exit_code
        else:
            result = run(arguments.config, *arguments.overrides, dry_run=arguments.dry_run)
            if result.status["state"] == "preempted":
                ignore_signals()
                return Preempted.exit_code
    except (UserError, RunFailed) as error:
        if not is_main and not in_process_group():  # in a group, errors are agreed on, so the main process has them
            defer_to_main()
        if is_main or not in_process_group():
            terminal.print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if is_main:
            terminal.print_error("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_FINISHED


def defer_to_main() -> None:
    """Wait: if the main process has the same error, the launcher ends all processes in the meantime (on a busy machine,
    after seconds).  The first process of a machine waits less, and so reports for the others there."""
    time.sleep(5.0 if os.environ.get("LOCAL_RANK", "0") == "0" else 15.0)


def run(config: str | Path | Mapping[str, Any], *overrides: str, dry_run: bool = False) -> RunResult:
    """Run a config to its end, in this process or as one of a launcher's processes.

    `config` is a YAML file, or its content as {section: {key: value}}.  `overrides` are "section.key=value", with the
    value read as YAML.  Every process returns the same result; the main one writes the run directory.  For a run that
    was stopped, or had already finished, `status["state"]` says so.

    In the main thread TERM, USR1, INT and HUP (unless ignored, as under nohup), and in any thread a file STOP in the
    run directory, make it stop with a checkpoint and the status "preempted".

    Raises:
        UserError: bad input; nothing was written, unless streamed rows turned out to be bad later on.
        RunFailed: a run that could not continue; also recorded in status.json.
    """
    if not isinstance(config, str | os.PathLike | Mapping) or not all(isinstance(text, str) for text in overrides):
        raise UserError(
            'run takes a YAML file or a mapping of sections, and overrides as text: run(config, "train.max_steps=3")'
        )
    if isinstance(config, Mapping):
        loaded = from_dict(dict(config), "the config that was given", overrides)
    else:
        loaded = load_config(config, overrides)
    run_dir = user_path(loaded.output.output_dir, "output.output_dir")
    stop = StopRequest(
        run_dir,
        is_main=is_main_process(os.environ),
        others_wait=in_process_group,
        look_for_file=not dry_run,
        leave=lambda request: finish_preempted(run_dir, stop, request, dry_run),
    )
    with stop, contextlib.closing(LivenessMonitor(stop.is_asked)) as liveness:
        try:
            stop.start()
            result = run_config(loaded, run_dir, stop, liveness, dry_run)
        except Preempted as request:
            return finish_preempted(run_dir, stop, request, dry_run)
        if loaded.output.push_to_hub:
            push_to_hub(result, hub.repository(loaded.output.hub_model_id, run_dir), stop)
        return result


def push_to_hub(result: RunResult, repo_id: str, stop: StopRequest) -> None:
    """Upload the adapter of a finished run, now that its processes no longer wait for each other."""
    if result.status["state"] == "finished" and result.adapter is not None and launched_world(os.environ).is_main:
        terminal.say(f"uploading {result.adapter} to the hub as {repo_id}")
        terminal.say(hub.push(result.adapter, repo_id, stop.is_asked))


def run_config(config: Config, run_dir: Path, stop: StopRequest, liveness: LivenessMonitor, dry_run: bool) -> RunResult:
    """Check the input, prepare the data, and run (collective from the process group on).

    Raises:
        UserError: bad input, before the run directory is touched where possible.
        RunFailed: a run that could not continue.
        Preempted: a request to stop.
    """
    world = launched_world(os.environ)
    refuse_lone_process(os.environ)
    settings = config.distributed
    strategy = resolve_strategy(
        settings.strategy, world, os.environ, config.model.dtype, sync_every=settings.sync_every
    )
    refuse_other_step(os.environ, config.train.gradient_accumulation_steps, config.train.max_grad_norm)
    with contextlib.ExitStack() as stack:
        with path_errors_as_user_errors():
            zero_options = deepspeed_options(config, strategy)
            if config.output.push_to_hub:
                hub.check_target(config.output.hub_model_id, run_dir)
            inputs = check_inputs(config, strategy)
            check_attention(inputs.backbone)
            if config.train.torch_compile:
                check_compilable(inputs.skeleton, strategy, cuda=uses_cuda())
            check_output(
                run_dir, config.output.resume, [dataset.path for dataset in (*inputs.datasets, *inputs.val_datasets)]
            )
            shapes = target_shapes(config, inputs.skeleton)
            check_layout(config.output.export_layout, inputs, shapes, run_dir)

            data = load_data(config, inputs, world)  # before the process group, whose timeout it may exceed
            order = stack.enter_context(training_order(config, inputs, data, rows_in_step(config, world)))
            plan = make_plan(config, strategy, world, order.steps_in, shapes)

        group = process_group(config, strategy, world, run_dir, zero_options, liveness)
        accelerator = stack.enter_context(group)
        stop.at_once = False
        fingerprint = data.fingerprint(order)
        refuse_differing_runs(config, fingerprint)
        if not dry_run and (finished := on_main(lambda: finished_before(plan, run_dir, world))):
            return finished
        replicas = None
        if settings.sync_every > 1:
            replicas = Replicas.make(settings.replica, world, accelerator.device, settings.timeout_minutes)
        job = Job(inputs, plan, world, accelerator, data, order, fingerprint, stop, liveness, replicas)
        print_summary(job)
        if dry_run:
            return perform_dry_run(job)
        lock = hold_directory(job, run_dir, stack)
        if finished := on_main(lambda: finished_before(plan, run_dir, world)):  # by another run while this one waited
            return finished
        on_main(lambda: check_place(plan, inputs, run_dir))
        return run_in(job, run_dir, lock)


# -------------------------------------------------------------------------------------------------------- the run


def run_in(job: Job, run_dir: Path, lock: RunLock | None) -> RunResult:
    """Train, cut and export into `run_dir`, whose `lock` the main process holds.

    An exception leaves the status "failed"; a request to stop leaves a checkpoint and the status "preempted".
    """
    job.raise_if_stop_requested()
    start = resume_point(job, run_dir)
    directory = RunDirectory(run_dir, is_main=job.world.is_main, tracker=job.accelerator.log, lock=lock)
    directory.start_at(start.step, start.folder)
    job.liveness.on_lost_process = lambda sentence: report_lost_process(directory, sentence)
    try:
        training = begin(job, directory, start)
        while True:
            train_stage(training)
            result = cut_and_export(training)
            if training.stage is job.plan.stages[-1]:
                return finish(training, result)
            next_stage(training, result.masters)
    except Preempted as request:
        request.status = on_main(directory.preempted)
        directory.report(to_dict(job.config))
        raise
    except BaseException as error:
        failure = note_failure(job, directory, error)
        if failure is not error:
            raise failure from error
        raise


def note_failure(job: Job, directory: RunDirectory, error: BaseException) -> BaseException:
    """Record in the status and in the report that the run failed.  Returns the exception to raise: the error, or its
    cause, a process that died or did not arrive."""
    lost = None if isinstance(error, UserError | RunFailed) else job.liveness.wait_for_lost_process()
    if lost is not None:
        if job.world.is_main:  # which prints what it raises
            directory.record_lost_process(lost)
        else:
            report_lost_process(directory, lost)
        go_on = "the run had already finished" if directory.is_finished else AGAIN
        return RunFailed(f"{lost}; {go_on}")
    failure = error
    if is_timeout(error):
        failure = timeout_failure(job.world.process_index, job.config.distributed.timeout_minutes)
    if (directory.is_begun or not isinstance(error, UserError)) and not directory.is_finished:
        with contextlib.suppress(RunFailed):  # the error itself reports a full disk
            directory.status("failed", error=str(failure) or type(failure).__name__)
        directory.report(to_dict(job.config))
    return failure


def report_lost_process(directory: RunDirectory, sentence: str) -> None:
    """Let one of the remaining processes report which one died, in the status and on the terminal."""
    if directory.record_lost_process(sentence):
        print_final_error(sentence)


def begin(job: Job, directory: RunDirectory, start: StartPoint) -> Training:
    """Load the model, then write the first files (collective).

    Before anything is written: a stream that cannot find its position, or a model that cannot be loaded, is bad input.
    """
    zero_stage = ZERO_STAGES.get(job.plan.strategy)
    env = environment(num_processes=job.world.num_processes, strategy=job.plan.strategy, zero_stage=zero_stage)
    if start.state is not None:
        position = start.state["order"]
        on_every(lambda: job.order.seek(position))
    training = load_and_inject(job, directory, start)
    assert training.engine.zero_stage == zero_stage
    env |= {"adapter_params": training.full_params, "total_steps": job.plan.total_steps}
    job.raise_if_stop_requested()
    on_main(lambda: checkpoint.set_aside(directory.path, start.step))  # before their lines are dropped
    on_main(
        lambda: directory.begin(
            config_yaml=to_yaml(replace(job.config, output=replace(job.config.output, resume="auto"))),
            env=env,
            chat_template=job.inputs.chat_template if names_template_file(job.config) else None,
            data_report=None if job.data.train is None else data_report(job.config, job.inputs, job.data),
            total_steps=job.plan.total_steps,
            first_step=start.step,
            resumed_from=start.folder,
            is_logged=start.state is None or start.state["unlogged"] is None,
        )
    )
    on_main(lambda: start_trackers(job, directory.path))
    return training


def start_trackers(job: Job, run_dir: Path) -> None:
    """Start the trackers of output.report_to; on the main process, the only one that logs.

    Raises:
        RunFailed: one of them cannot be started, for example without a login.
    """
    own_options = {"wandb": {"dir": str(run_dir), "name": run_dir.name}}
    # accelerate has one name for all trackers, and TensorBoard's folder is called by it.
    project = os.environ.get("WANDB_PROJECT") if list(job.config.output.report_to) == ["wandb"] else None
    try:
        job.accelerator.init_trackers(
            project or "sora_llm", config=hyperparameters(job.config), init_kwargs=own_options
        )
    except Exception as error:  # from any library
        names = ", ".join(job.config.output.report_to)
        raise RunFailed(
            f"output.report_to {names} could not be started: {first_line(error)}; fix it, or set output.report_to=[]"
        ) from error


def hyperparameters(config: Config) -> dict[str, int | float | str]:
    """The config in the form for trackers: one flat dict of plain values."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else json.dumps(value)
        for section, values in to_dict(config).items()
        for key, value in values.items()
    }


def finish_preempted(run_dir: Path, stop: StopRequest, request: Preempted, dry_run: bool) -> RunResult:
    """The last steps after a request to stop, once its checkpoint is complete: report it, remove the STOP file.

    A run that was stopped before it began has nothing to save: its status names the newest checkpoint, if any.  If
    another run uses the directory, status and file are left to that run.
    """
    status, in_use = request.status, False
    is_main = launched_world(os.environ).is_main
    if status is None:
        status = {"state": "preempted", "checkpoint": None}
        if is_main and not dry_run:
            try:
                with contextlib.suppress(OSError), run_state.run_lock(run_dir, 0):
                    status = note_preempted(run_dir)
            except run_state.DirectoryInUse:
                in_use = True
            except UserError:  # it cannot be written
                pass
    if is_main:
        if not dry_run and not in_use:
            stop.remove_file()
        saved = status["checkpoint"]
        where = f"nothing to save; another run is in {run_dir}" if in_use else "nothing to save"
        if status.get("phase") == "done":
            where = f"{run_dir} was already finished; its adapter is {run_dir / status['adapter']}"
        elif saved:
            where = f"{run_dir / saved} is complete; run the same command again to resume"
        terminal.say(f"stopped by {request}: {where}")
    lines = read_json_lines(run_dir / run_files.METRICS)
    return RunResult(None, lines[-1] if lines else {}, status)


if __name__ == "__main__":
    sys.exit(main())
