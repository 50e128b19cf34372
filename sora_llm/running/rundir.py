"""The run directory: every small file that a run writes there, apart from checkpoints and adapter."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import sora_llm
from sora_llm import run_files
from sora_llm.checkpoint import remove_leftovers
from sora_llm.errors import RunFailed, UserError, first_line
from sora_llm.files import remove_abandoned, write_text_atomically
from sora_llm.report import JsonLines, Progress
from sora_llm.report_page import write_report
from sora_llm.running.run_state import RunLock, read_status, run_lock, write_status
from sora_llm.terminal import say

_DYING_SECONDS = 2.0
"""How long to wait for the lock of a killed process: its connections may close before the kernel releases its locks."""

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "peft", "datasets")


class RunDirectory:
    """The main process's writer of metrics.jsonl, ranks.jsonl, status.json, samples.jsonl, trackers, the progress line.

    Every process has one; only the main process's writes.  `step`, `phase`, `checkpoint` and `adapter` go into the next
    status.json.
    """

    def __init__(self, path: Path, *, is_main: bool, tracker: Any = None, lock: RunLock | None = None):
        self.path, self.is_main, self._tracker, self._lock = path, is_main, tracker, lock
        self.step, self.phase = 0, "prepare"
        self.checkpoint: Path | None = None
        self.adapter: Path | None = None
        self.last_metrics: dict[str, Any] = {}
        self.last_status: dict[str, Any] = {}
        self.is_begun = False
        self._status_before = read_status(path)

    def begin(
        self,
        *,
        config_yaml: str,
        env: Mapping[str, Any],
        chat_template: str | None = None,
        data_report: Mapping[str, Any] | None = None,
        total_steps: int,
        first_step: int = 0,
        resumed_from: Path | None = None,
        is_logged: bool = True,
    ) -> None:
        """Write config.yaml and env.json, and drop the lines of steps that are going to be taken (again); on the main
        process.  If `resumed_from` is a checkpoint of another run, that run's lines come before.

        `chat_template`: the text of a template file, saved because the file may change; checkpoints are prompted with
        it.
        `is_logged`: whether the line of the step of `resumed_from` was written before that checkpoint.
        """
        self.is_begun = True
        self.start_at(first_step, resumed_from)
        last_step = -1 if resumed_from is None else first_step if is_logged else first_step - 1
        source = self._run_before(resumed_from)
        with self._writing():
            for leftover in self.path.glob(".*.tmp"):  # from a process that was killed while writing
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
            for place in (self.path, self.path / run_files.PATH):
                remove_abandoned(place)
            remove_leftovers(self.path)  # here too, since nothing is saved after the last step
            # Never next to the config of another number of processes, wherever this process dies.
            (self.path / run_files.ENV).unlink(missing_ok=True)
            write_text_atomically(self.path / run_files.CONFIG, config_yaml)
            write_text_atomically(self.path / run_files.ENV, _json(env))
            if chat_template is not None:
                write_text_atomically(self.path / run_files.CHAT_TEMPLATE, chat_template)
            if data_report is not None:
                write_text_atomically(self.path / run_files.DATA_REPORT, _json(data_report))
            # If the step's own line is still to come, the one before may be the last of a stage, which was exported.
            self._metrics, self._ranks = (
                JsonLines(self.path / name, last_step, exports_again=is_logged, source=source / name)
                for name in (run_files.METRICS, run_files.RANKS)
            )
        self._progress = Progress(total_steps, first_step)
        self.status("running")

    def _run_before(self, resumed_from: Path | None) -> Path:
        """The run directory that a checkpoint is in; this one if it is in none (a copy)."""
        if resumed_from is not None and (checkpoints := resumed_from.resolve().parent).name == run_files.CHECKPOINTS:
            return checkpoints.parent if (checkpoints.parent / run_files.METRICS).is_file() else self.path
        return self.path

    def require_held(self) -> None:
        """RunFailed if the directory is no longer the one that the run began in; on the main process."""
        if self._lock is not None:
            self._lock.require_held()

    @property
    def is_finished(self) -> bool:
        """Whether the run has recorded that it finished; later errors do not change that."""
        return self.last_status.get("state") == "finished"

    def start_at(self, step: int, resumed_from: Path | None) -> None:
        """Report from now on that the run is at `step`, with the checkpoint it resumes from as its own."""
        self.step = step
        if resumed_from is not None and resumed_from.resolve().is_relative_to(self.path.resolve()):
            self.checkpoint = self.path / resumed_from.resolve().relative_to(self.path.resolve())

    def metrics(self, step: int, phase: str, fields: Mapping[str, Any]) -> None:
        """Write one line to metrics.jsonl, the progress display and the trackers."""
        self.step, self.phase = step, phase
        if not self.is_main:
            return
        with self._writing():
            line = self._metrics.write({"step": step, "phase": phase, **fields})
        self.last_metrics = line
        self._progress.show(line)
        self.status("running")
        self._track({key: value for key, value in line.items() if key not in ("step", "phase")}, step)

    def _track(self, values: Mapping[str, Any], step: int) -> None:
        """Log to the trackers.  An error there only affects their curves, not the run."""
        if self._tracker is None:
            return
        try:
            self._tracker(values, step)
        except Exception as error:
            self._tracker = None
            say(f"warning: output.report_to: nothing is logged there any more: {first_line(error)}")

    def ranks(self, step: int, ranks: Mapping[str, int], labels: Mapping[str, Any]) -> None:
        """Write one line to ranks.jsonl."""
        if self.is_main:
            with self._writing():
                self._ranks.write({"step": step, **labels, "ranks": dict(ranks)})

    def samples(self, answers: Sequence[Mapping[str, str]]) -> None:
        """Write samples.jsonl: {"prompt", "base", "adapted"} per prompt."""
        if self.is_main:
            with self._writing():
                write_text_atomically(self.path / run_files.SAMPLES, "".join(_json(answer, None) for answer in answers))

    def status(self, state: str, *, phase: str | None = None, error: str | None = None) -> None:
        """Replace status.json."""
        self.phase = phase or self.phase
        if not self.is_main:
            return
        with self._writing():
            self._write_status(state, error)

    def _write_status(self, state: str, error: str | None) -> None:
        self.last_status = write_status(
            self.path,
            state,
            step=self.step,
            phase=self.phase,
            checkpoint=self.checkpoint,
            adapter=self.adapter,
            error=error,
        )

    def report(self, config: Mapping[str, Any], *, plots: bool = False) -> None:
        """Refresh report.html and, with `plots`, plots/*.png from the current files.

        Call it after writing the status it should show.  An error here only affects the page, not the run.
        """
        if not self.is_main or not self.is_begun or (self._lock is not None and not self._lock.is_held()):
            return
        try:
            write_report(self.path, config, plots=plots)
        except Exception as error:
            say(f"warning: report.html is not up to date: {type(error).__name__}: {error}")

    def preempted(self) -> dict[str, Any] | None:
        """Record in the status that the run was asked to stop; None before `begin`.  Call it on the main process."""
        if not self.is_begun:
            return None
        self.status("preempted")
        return self.last_status

    def record_lost_process(self, sentence: str) -> bool:
        """Record that a process of the run, or the launcher, was lost; returns whether this process wrote the status.

        Normally the main process writes it; if that died, the first process to find its lock free and no final status.
        """
        with contextlib.suppress(UserError, RunFailed, OSError):  # a failing disk must not keep this process alive
            if self.is_finished:
                return False
            if self.is_main:
                self.status("failed", error=sentence)
                return True
            with run_lock(self.path, _DYING_SECONDS):
                found = read_status(self.path)
                if found is None or found == self._status_before or found.get("state") == "running":
                    self._write_status("failed", sentence)
                    return True
        return False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.require_held()
            yield
        except OSError as error:
            raise RunFailed(
                f"{self.path} cannot be written ({error.strerror}); checkpoints are intact: free some space and run "
                "the same command again"
            ) from error


def _json(value: Mapping[str, Any], indent: int | None = 1) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def environment(*, num_processes: int, strategy: str, zero_stage: int | None) -> dict[str, Any]:
    """Versions, hardware and topology for env.json: never a token, never the process environment."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    content: dict[str, Any] = {
        "versions": {
            "sora_llm": sora_llm.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
        },
        "num_processes": num_processes,
        "strategy": strategy,
        "git_commit": _git_commit(),
    }
    if zero_stage is not None:
        content["zero_stage"] = zero_stage
    return content


def _git_commit() -> str | None:
    """The commit of the running code, None if the package is not in its own git checkout."""
    package = Path(sora_llm.__file__).resolve().parent
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        output = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = output.stdout.strip().partition("\n")
    return commit if output.returncode == 0 and Path(top) == package.parent else None
