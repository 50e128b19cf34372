"""Tune, freeze, confirm: runs whatever cells of the experiment are missing, for as long as there is time.

    python benchmarks/quality/grid.py --device cuda --workers 12 --minutes 9        # on a GPU, everything
    python benchmarks/quality/grid.py --device cpu --workers 2                      # goes on where that stopped
    python benchmarks/quality/grid.py --task roleplay --workers 2                   # other rows, fewer questions
    python benchmarks/quality/grid.py --dry-run                                     # what is there, what is missing

Every run is a line of --out (default runs.jsonl in the folder of the task, which for the first one is this folder),
written when it ends; a run that is there is not made again, so the command can be stopped and started, also twice at
once (the worst that happens is a run made twice).
Learning rates are chosen from the tuning runs by the rule in README.md.  A run that failed has a line too and is not
tried again unless asked to (--again).  What it says: `python benchmarks/quality/verdicts.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import (
    ARMS,
    CORE_SIZES,
    WHOLE,
    Cell,
    Group,
    Protocol,
    Queue,
    core_blocks,
    extra_groups,
    read_lines,
)
from tasks import GSM8K_ANSWERS, TASKS, Task

if TYPE_CHECKING:
    from runner import Runner

HEADROOM = 1.3
"""A cell is begun if the longest of the last runs, times this, fits into the time left."""
LAST = 24
TOO_MANY = 8
"""Failed runs in a row."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a model of its own")
    parser.add_argument("--minutes", type=float, help="begin no run that would not end within so many")
    parser.add_argument("--task", choices=TASKS, default=GSM8K_ANSWERS.name)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these (the first question needs lora)")
    parser.add_argument("--sizes", nargs="+", type=float, default=CORE_SIZES, help="shares of LoRA at r = 16")
    parser.add_argument("--core-only", action="store_true", help="no extras when the core is done")
    parser.add_argument("--again", action="store_true", help="make runs that failed again")
    parser.add_argument("--dry-run", action="store_true", help="only say what is there and what is missing")
    arguments = parser.parse_args()
    if wrong := bad_input(arguments):
        print(f"grid.py: {wrong}", file=sys.stderr)
        return 2
    started = time.monotonic()
    task = TASKS[arguments.task]
    out = arguments.out or task.runs
    protocol = Protocol.of(task, arguments.steps)
    blocks = core_blocks(task, arguments.sizes)
    is_complete = arguments.arms is None and tuple(arguments.sizes) == CORE_SIZES
    if is_complete and not arguments.core_only:
        blocks += [[group] for group in extra_groups(task)]
    if arguments.arms is not None:
        sizes = {arm: [WHOLE] if ARMS[arm].is_whole else arguments.sizes for arm in arguments.arms}
        blocks = [[Group(size, arm) for arm in arguments.arms for size in sizes[arm]]]
    queue = Queue(protocol, blocks)
    if arguments.dry_run:
        print(overview(queue, read_lines(out)))
        return 0
    seconds = None if arguments.minutes is None else 60 * arguments.minutes - (time.monotonic() - started)
    out.parent.mkdir(exist_ok=True)
    return work_off(queue, out, arguments.device, arguments.workers, seconds, again=arguments.again)


def bad_input(arguments: argparse.Namespace) -> str | None:
    """What cannot work, in a sentence."""
    if arguments.workers < 1:
        return f"--workers is {arguments.workers}; give 1 or more"
    if arguments.steps < 10:
        return f"--steps is {arguments.steps}; the phases of a run need 10 or more"
    if arguments.minutes is not None and arguments.minutes <= 0:
        return f"--minutes is {arguments.minutes:g}; give more than 0, or leave it out"
    if wrong := [size for size in arguments.sizes if not 0.05 <= size < 1]:
        return f"--sizes has {wrong[0]:g}; give shares of LoRA at r = 16, from 0.05 to below 1"
    if arguments.out is not None and (message := unusable(arguments.out)):
        return message
    return missing_data(TASKS[arguments.task]) or missing_device(arguments.device)


def unusable(out: Path) -> str | None:
    if not out.absolute().parent.is_dir():
        return f"--out is {out}, whose folder does not exist; make it first"
    return f"--out is {out}, a folder; name a file" if out.is_dir() else None


def missing_data(task: Task = GSM8K_ANSWERS) -> str | None:
    for needed in task.needed:
        if not needed.exists():
            return f"{needed} is missing; set SORA_TEST_DATA to the folder that holds data/ and models/"
    return None


def missing_device(device: str) -> str | None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "--device is cuda, but torch sees no GPU here; use --device cpu"
    return None


# -------------------------------------------------------------------------------------------------------- the workers

_runner: Runner


def set_up(protocol: Protocol, folder: Path, device: str) -> None:
    """Once per worker: import, load, tokenise."""
    global _runner
    os.environ["OMP_NUM_THREADS"] = "1"
    from runner import Runner

    _runner = Runner(protocol, folder, device)


def run_and_write(cell: Cell, out: Path) -> dict[str, Any]:
    """The cell's line, which is on disk when this returns."""
    line = _runner.run(cell)
    append(out, line)
    return line


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


def work_off(queue: Queue, out: Path, device: str, num_workers: int, seconds: float | None, again: bool = False) -> int:
    """Give missing cells to workers until there are none, or no time; the exit code."""
    deadline = None if seconds is None else time.monotonic() + seconds
    lines = read_lines(out)
    if again:
        lines = {key: line for key, line in lines.items() if "failed" not in line}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from runner import split

        split(queue.protocol, folder)
        pool = ProcessPoolExecutor(
            num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=set_up,
            initargs=(queue.protocol, folder, device),
        )
        scheduler = Scheduler(queue, lines, deadline, lambda cell: pool.submit(run_and_write, cell, out))
        try:
            with pool:
                scheduler.go(num_workers)
        except BrokenProcessPool:
            print("grid.py: a worker died; what it ran is lost, start the command again to go on", file=sys.stderr)
            return 1
    print(overview(queue, lines))
    if scheduler.has_given_up:
        print(
            f"grid.py: the last {TOO_MANY} runs failed; look at what their lines in {out} say, and start the command "
            "again with --again",
            file=sys.stderr,
        )
        return 1
    return 0


class Scheduler:
    """Keeps `num_workers` cells running; what comes next depends on what has ended."""

    def __init__(
        self,
        queue: Queue,
        lines: dict[str, dict[str, Any]],
        deadline: float | None,
        submit: Callable[[Cell], Future[dict[str, Any]]],
    ) -> None:
        self._queue, self._lines, self._deadline, self._submit = queue, lines, deadline, submit
        self._running: dict[Future[dict[str, Any]], Cell] = {}
        self._last_seconds: deque[float] = deque([0.0], maxlen=LAST)  # the first runs of workers warm up
        self._begun, self._failed_in_a_row = time.monotonic(), 0

    def go(self, num_workers: int) -> None:
        """Until nothing is missing, or nothing more fits into the time left."""
        self._fill(num_workers)
        while self._running:
            ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in ended:
                cell = self._running.pop(future)
                line = self._lines[cell.key] = future.result()
                self._last_seconds.append(line["wall_seconds"])
                say(cell, line, time.monotonic() - self._begun)
                self._failed_in_a_row = self._failed_in_a_row + 1 if "failed" in line else 0
            self._fill(num_workers)

    @property
    def has_given_up(self) -> bool:
        """Whether it must be the machine, not the arms: a GPU that has failed once fails every run after it."""
        return self._failed_in_a_row >= TOO_MANY

    def _fill(self, num_workers: int) -> None:
        if self.has_given_up or len(self._running) >= num_workers or self._is_late():
            return
        underway = {cell.key for cell in self._running.values()}
        for cell in self._queue.missing(self._lines):
            if cell.key not in underway:
                self._running[self._submit(cell)] = cell
                underway.add(cell.key)
            if len(self._running) >= num_workers:
                return

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() + HEADROOM * max(self._last_seconds) > self._deadline


def say(cell: Cell, line: Mapping[str, Any], seconds: float) -> None:
    """A line about a run that has ended."""
    found = f"FAILED: {line['failed']}" if "failed" in line else f"{cell.rows} loss {line['loss']:.4f}"
    took = f"{line['wall_seconds']:.1f} s"
    print(
        f"{seconds:6.0f} s  {cell.group!s:<14} lr {cell.learning_rate:<8g} seed {cell.seed:<4} {found}  ({took})",
        flush=True,
    )


def overview(queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per arm and size: its learning rate, and how many of its runs are there."""
    rows = []
    for group in (group for block in queue.blocks for group in block):
        rate = queue.tuned(group, lines)
        losses = queue.tuning_losses(group, lines)
        cells = queue.test_cells(group, lines)
        done = sum(cell.key in lines for cell in cells)
        state = f"{len(losses)} rates tried, not tuned yet"
        if rate is not None:
            state = f"lr {rate:g} of {len(losses)}; {done} of {len(cells)} seeds"
        rows.append(f"{group!s:<14} {state}")
    failed = sum("failed" in line for line in lines.values())
    return "\n".join([*rows, f"{len(lines)} runs are there, {failed} of them failed"])


if __name__ == "__main__":
    sys.exit(main())
