"""Runs in several processes, for as long as there is time: each is a line of a file, and one that is there stays.

What is run is a *run*: a cell of protocol.py, or what another script makes of its own.  What comes next may depend on
what has ended, so a queue is asked again after every run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from typing import Protocol as Interface

from protocol import Cell, Protocol, read_lines
from tasks import GSM8K_ANSWERS, Task

if TYPE_CHECKING:
    from runner import Runner

HEADROOM = 1.3
"""A run is begun if the longest of the last ones, times this, fits into the time left."""
LAST = 24
TOO_MANY = 8
"""Failed runs in a row."""

Line = dict[str, Any]
Lines = Mapping[str, Mapping[str, Any]]


class Run(Interface):
    """`str(run)` is what is said of it."""

    @property
    def key(self) -> str:
        """Of its line: a hash or text of all that makes the result."""


RunT = TypeVar("RunT", bound=Run)
RunT_co = TypeVar("RunT_co", bound=Run, covariant=True)


class Runs(Interface[RunT_co]):
    """A queue."""

    @property
    def protocol(self) -> Protocol:
        """What its runs have in common."""

    def missing(self, lines: Lines) -> Iterator[RunT_co]:
        """What can be run now, the most urgent first, given the lines that are there."""


# ------------------------------------------------------------------------------------------------------ what is needed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of every script that works off a queue."""
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a model of its own")
    parser.add_argument("--again", action="store_true", help="make runs that failed again")


def lines_there(out: Path, again: bool) -> dict[str, Line]:
    """Those of runs that are not to be made; with `again` without failed ones."""
    return {key: line for key, line in read_lines(out).items() if not (again and "failed" in line)}


def unusable(out: Path) -> str | None:
    """Why lines cannot be written there, in a sentence."""
    if not out.absolute().parent.is_dir():
        return f"--out is {out}, whose folder does not exist; make it first"
    return f"--out is {out}, a folder; name a file" if out.is_dir() else None


def missing_data(task: Task = GSM8K_ANSWERS) -> str | None:
    """Which of a task's files is not there, in a sentence."""
    for needed in task.needed:
        if not needed.exists():
            return f"{needed} is missing; set SORA_TEST_DATA to the folder that holds data/ and models/"
    return None


def missing_device(device: str) -> str | None:
    """Why nothing can run on it, in a sentence."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "--device is cuda, but torch sees no GPU here; use --device cpu"
    return None


def too_few_workers(count: int) -> str | None:
    """Of --workers, in a sentence."""
    return f"--workers is {count}; give 1 or more" if count < 1 else None


# --------------------------------------------------------------------------------------------------------- a worker

_runner: Runner


def _set_up(protocol: Protocol, folder: Path, device: str) -> None:
    """Once per worker: import, load, tokenise."""
    global _runner
    os.environ["OMP_NUM_THREADS"] = "1"
    from runner import Runner

    _runner = Runner(protocol, folder, device)


def _run_and_write(execute: Callable[[Runner, RunT], Line], run: RunT, out: Path) -> Line:
    """The run's line, which is on disk when this returns."""
    line = execute(_runner, run)
    append(out, line)
    return line


def run_cell(runner: Runner, cell: Cell) -> Line:
    """What is executed for a cell of protocol.py."""
    return runner.run(cell)


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a whole line, whoever else does so at the same time, also behind one that a dying machine cut off."""
    with file.open("ab+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        if opened.seek(0, os.SEEK_END):
            opened.seek(-1, os.SEEK_END)
            if opened.read(1) != b"\n":
                opened.write(b"\n")
        opened.write(json.dumps(line).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


# ------------------------------------------------------------------------------------------------------ the scheduler


def work_off(
    queue: Runs[RunT],
    lines: dict[str, Line],
    out: Path,
    execute: Callable[[Runner, RunT], Line],
    *,
    device: str = "cpu",
    num_workers: int = 1,
    seconds: float | None = None,
) -> str | None:
    """Give missing runs to workers until there are none, or no time.

    Args:
        lines: what counts as there; every new line is added, and appended to `out`.
        execute: gives the line of a run, whatever happens to it; of the top level of its module, for it goes to other
            processes by name.

    Returns: what broke it off, in a sentence.
    """
    if next(queue.missing(lines), None) is None:
        return None
    deadline = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from runner import split

        split(queue.protocol, folder)
        pool = ProcessPoolExecutor(
            num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_set_up,
            initargs=(queue.protocol, folder, device),
        )
        scheduler = Scheduler(queue, lines, deadline, lambda run: pool.submit(_run_and_write, execute, run, out))
        try:
            with pool:
                scheduler.go(num_workers)
        except BrokenProcessPool:
            return "a worker died; what it ran is lost, start the command again to go on"
    if scheduler.has_given_up:
        return f"the last {TOO_MANY} runs failed; their lines in {out} say why, and --again makes them again"
    return None


class Scheduler(Generic[RunT]):
    """Keeps `num_workers` runs going; what comes next depends on what has ended."""

    def __init__(
        self,
        queue: Runs[RunT],
        lines: dict[str, Line],
        deadline: float | None,
        submit: Callable[[RunT], Future[Line]],
    ) -> None:
        self._queue, self._lines, self._deadline, self._submit = queue, lines, deadline, submit
        self._running: dict[Future[Line], RunT] = {}
        self._last_seconds: deque[float] = deque([0.0], maxlen=LAST)  # the first runs of workers warm up
        self._begun, self._failed_in_a_row = time.monotonic(), 0

    def go(self, num_workers: int) -> None:
        """Until nothing is missing, or nothing more fits into the time left."""
        self._fill(num_workers)
        while self._running:
            ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in ended:
                run = self._running.pop(future)
                line = self._lines[run.key] = future.result()
                self._last_seconds.append(line["wall_seconds"])
                print(f"{time.monotonic() - self._begun:6.0f} s  {run} {outcome(line)}", flush=True)
                self._failed_in_a_row = self._failed_in_a_row + 1 if "failed" in line else 0
            self._fill(num_workers)

    @property
    def has_given_up(self) -> bool:
        """Whether it must be the machine, not the arms: a GPU that has failed once fails every run after it."""
        return self._failed_in_a_row >= TOO_MANY

    def _fill(self, num_workers: int) -> None:
        if self.has_given_up or len(self._running) >= num_workers or self._is_late():
            return
        underway = {run.key for run in self._running.values()}
        for run in self._queue.missing(self._lines):
            if run.key not in underway:
                self._running[self._submit(run)] = run
                underway.add(run.key)
            if len(self._running) >= num_workers:
                return

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() + HEADROOM * max(self._last_seconds) > self._deadline


def outcome(line: Mapping[str, Any]) -> str:
    """Of a run that has ended, in a few words."""
    found = f"FAILED: {line['failed']}" if "failed" in line else f"loss {line['loss']:.4f}"
    return f"{found}  ({line['wall_seconds']:.1f} s)"
