"""Where a run starts: at step 0, at a checkpoint, or not at all because it has already finished."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm import checkpoint, run_files, terminal
from sora_llm.config import load_config, to_dict
from sora_llm.distributed.collectives import on_main
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.report import read_json_lines
from sora_llm.running import run_state
from sora_llm.running.job import Job
from sora_llm.running.layouts import extra_layout
from sora_llm.running.plan import Plan, refuse_other_config
from sora_llm.running.run_folders import written_since
from sora_llm.running.snapshot import refuse_other_run
from sora_llm.topology import World


@dataclass(frozen=True)
class RunResult:
    """The result that `run` returns to a pipeline.

    `adapter` is the exported folder (None after a dry run or if the run was asked to stop), `metrics` the last line
    of metrics.jsonl, `status` the content of status.json.
    """

    adapter: Path | None
    metrics: dict[str, Any]
    status: dict[str, Any]


def finished_before(plan: Plan, run_dir: Path, world: World) -> RunResult | None:
    """The result of the finished run in this directory, or None; also None if its adapter is gone, which is then
    exported again from the newest checkpoint.  For the main process.

    Raises:
        UserError: the directory belongs to a run with another config.
    """
    saved, env, resume = run_dir / run_files.CONFIG, run_dir / run_files.ENV, plan.config.output.resume
    if not saved.exists() or not env.exists():
        return None
    if resume == "never":
        raise UserError(f"output.output_dir {run_dir} already holds a run and output.resume is never; name another")
    try:
        num_processes = json.loads(env.read_text(encoding="utf-8"))["num_processes"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{env} is damaged; move {run_dir} aside, or name a new output.output_dir") from None
    refuse_other_config(plan, to_dict(load_config(saved)), num_processes, world, str(run_dir))
    status = run_state.read_status(run_dir)
    if status is None or status.get("state") != "finished":
        return None
    if resume != "auto" and written_since(run_dir, resume) is None:
        return None  # it goes back to that checkpoint
    adapter = run_dir / status["adapter"]
    if not adapter.is_dir():
        return None
    terminal.say(f"{run_dir} is already finished; its adapter is {adapter} (a new run needs a new output.output_dir)")
    lines = read_json_lines(run_dir / run_files.METRICS)
    metrics = lines[-1] if lines else {}
    for line in what_is_missing(plan.config.output.export_layout, run_dir, metrics):
        terminal.say(line)
    return RunResult(adapter, metrics, status)


def what_is_missing(layout: str, run_dir: Path, metrics: Mapping[str, Any]) -> list[str]:
    """The lines to print if a finished run left no `layout` next to its adapter; `metrics` is its last line.

    An adapter without any rank cannot have a gguf.
    """
    is_empty = metrics.get("kept_params") == 0
    if extra_layout(layout) is None or (run_dir / layout).is_dir() or (layout == "gguf" and is_empty):
        return []
    run, out = shlex.quote(str(run_dir)), shlex.quote(str(run_dir / layout))
    return [f"it has no {layout}: sora-llm export {run} --layout {layout} --out {out}"]


@dataclass(frozen=True)
class StartPoint:
    """Step 0, or a checkpoint: `state` is its state.json."""

    step: int = 0
    folder: Path | None = None
    state: Mapping[str, Any] | None = None


def resume_point(job: Job, run_dir: Path) -> StartPoint:
    """Where the run starts; the main process looks, and all processes get the same answer (collective).

    Raises:
        UserError: the checkpoint is from another config or other data.
    """
    return on_main(lambda: _newest_start(job, run_dir))


def _newest_start(job: Job, run_dir: Path) -> StartPoint:
    resume = job.config.output.resume
    warnings: list[str] = []
    if resume == "never":
        return StartPoint()
    if resume == "auto":
        folder, warnings = checkpoint.newest(run_dir)
        for warning in warnings:
            job.say(f"warning: skipped: {warning}")
    else:
        folder = written_since(run_dir, resume) or user_path(resume, "output.resume")
    if folder is None:
        if warnings:
            job.say(f"warning: no checkpoint in {run_dir} is intact; starting again at step 0")
        return StartPoint()
    state = checkpoint.read_state(folder)
    refuse_other_run(job, run_dir, folder, state)
    job.say(f"resuming from {folder}: step {state['step']} of {job.plan.total_steps}")
    return StartPoint(state["step"], folder, state)


def note_preempted(run_dir: Path) -> dict[str, Any]:
    """The status of a run that was stopped before it began; the file of a finished run stays as it is, and a run that
    was already stopped at a later step keeps that step."""
    before = run_state.read_status(run_dir)
    if before is not None and before.get("state") == "finished":
        return {**before, "state": "preempted"}
    found, _ = checkpoint.newest(run_dir)
    newest = None if found is None else str(found.relative_to(run_dir))
    if before is not None and (before.get("state"), before.get("checkpoint")) == ("preempted", newest):
        # Written all the same: anything that waits for this launch to end looks for a new status.
        step, phase = before["step"], before["phase"]
        return run_state.write_status(run_dir, "preempted", step=step, phase=phase, checkpoint=found)
    step = 0 if found is None else checkpoint.read_state(found)["step"]
    return run_state.write_status(run_dir, "preempted", step=step, phase="prepare", checkpoint=found)
