"""Two-process ZeRO-2 runs with faults injected at every stage, which must end as if nothing had happened.

    python benchmarks/chaos.py [--faults 200] [--seed 0] [--keep FOLDER] [--json]

from the project's root, as root (it mounts a small disk to fill it up).  A supervisor starts the same command again and
again until status.json says "finished", and injects a fault into every start:

    KILL        to the main process, the other one, both, or the launcher
    requests    TERM to one or both, USR1, a STOP file; TERM and soon after it KILL, as schedulers do
    disks       a disk that becomes full or read-only
    crashes     the main process dies before and after every file operation of a save, before every one of a logged
                step and of an export, and with half of a file written; or there is no space for that operation (the
                operations are those listed by an undisturbed run)

`--faults` of them at random moments: some time after the start, or after the run reached a random place.  Crashes come
on top of these.  Trainers are forked from a process that has imported everything (tests/nursery.py); a few more faults
go through torchrun and accelerate.  Checked after each fault: all processes end soon, no checkpoint is damaged, at most
one save interval is lost, nothing on a request, and no step has two lines; at the end of each run: adapter, metrics and
ranks are those of an undisturbed run.  Problems are printed, and the exit code is 1.  Prints the tables of chaos.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sora_llm.running import run_state

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from conftest import ROOT  # which also sets where DeepSpeed builds, and that nothing is downloaded
from nursery import Child, Nursery
from runs import ACCELERATE
from small_runs import CONFIG, MODULES, overrides, result, short_rows, status
from spawn import environment, free_port, warm_deepspeed

from sora_llm import checkpoint

BENCHMARKS = ROOT / "benchmarks"
STEPS, SAVE_STEPS, EVAL_STEPS = 40, 4, 16
PHASES = {"dense": (0, 8), "sparsify": (8, 24), "finetune": (24, STEPS)}
"""Each phase's first step, and the first step after it."""
OPTIONS: dict[str, Any] = {
    "distributed.strategy": "zero2",
    "train.max_steps": STEPS,
    "sora.sparse_lambda": None,
    "sora.target_rank": 1.5,  # of 4: adaptive, so that the adapters change their form twice
    "sora.gate_lr": "auto",
    "sora.dense_ratio": PHASES["dense"][1] / STEPS,
    "sora.consensus_at": PHASES["sparsify"][1] / STEPS,
    "sora.consensus": "svd",
    "sora.target_modules": ["q_proj", "v_proj"],
    "data.sequence_len": 96,
    "output.save_steps": SAVE_STEPS,
    "output.save_total_limit": 2,
    "evaluation.eval_steps": EVAL_STEPS,
}
DISK_MIB = 8
END_SECONDS = 30
"""The longest that processes may take to end after a fault."""
START_SECONDS = 180
"""The longest a start may take from its beginning to its end."""
POLL_SECONDS = 0.004
MOST_MISSES = 20
"""Starts for which a fault may come too late before the campaign is given up."""

# ----- faults ---------------------------------------------------------------------------------------------------------

DEATHS = ("KILL main", "KILL other", "KILL both", "KILL launcher")
REQUESTS = ("TERM main", "TERM other", "TERM both", "USR1 both", "USR1 other", "STOP file")
MIXED = ("TERM, then KILL",)
DISKS = ("disk full", "disk read-only")
IN_TRAINING = ("prepare", "group", "load", "begin", *PHASES, "balance", "cut", "line", "evaluation", "save")
IN_EXPORT = ("cut", "evaluation", "export", "reload", "publish")
CRASHES = {
    "before": "crash before an operation",
    "after": "crash after it",
    "torn": "crash with half of a file written",
    "no space": "an operation fails: no space",
}
NEEDS_ROOM = ("mkdir", "open", "write", "fsync")
CRASHES_AFTER_TOO = ("save",)
"""Places where the main process dies after each operation as well as before it."""


@dataclass(frozen=True)
class Fault:
    """The fault for a start.

    `place`: where the main process must have arrived, for the `nth` time; None: at its beginning.  `delay`: how long
    after that.  `gap`: from TERM to KILL.  `crash`: passed to the trainer, which crashes itself.
    """

    kind: str
    place: str | None = None
    nth: int = 1
    delay: float = 0.0
    gap: float = 0.0
    crash: dict[str, Any] | None = None

    def is_request(self) -> bool:
        return self.kind in REQUESTS or self.kind == "TERM launcher"


def random_fault(chooser: random.Random, places: Sequence[str], seconds: dict[str, float]) -> Fault:
    """At a random moment of a random place; one in four at some time after the start, wherever that is."""
    kind = chooser.choice([*DEATHS, *REQUESTS, *MIXED, *DISKS])
    gap = chooser.uniform(0, 0.3)
    if places is IN_TRAINING and chooser.random() < 0.25:
        return Fault(kind, None, 1, chooser.uniform(0, seconds["start"] + 2 * SAVE_STEPS * seconds["step"]), gap)
    place = chooser.choice(places)
    often = place == "line" or place in PHASES
    nth = chooser.randint(1, 2 * SAVE_STEPS) if often else 1
    return Fault(kind, place, nth, chooser.uniform(0, seconds[place]), gap)


def crashes(operations: Sequence[str], chooser: random.Random) -> list[Fault]:
    """At least one at each of them."""
    faults = []
    for operation in operations:
        place, what, _ = operation.split(" ", 2)
        moments = ["before"] + ["after"] * (place in CRASHES_AFTER_TOO) + ["torn"] * (what == "write")
        moments += ["no space"] * (what in NEEDS_ROOM)
        for when in moments:
            visit = chooser.randint(1, 6) if place == "line" else 1
            crash = {"operation": operation, "when": when, "visit": visit}
            faults.append(Fault(CRASHES[when], place, visit, crash=crash))
    return faults


ONLY_FIRST_SAVE = ("save mkdir checkpoints #1", "save fsync . #1")
"""When checkpoints/ is created."""


LAST_STEP_BEFORE = {**{phase: end for phase, (_, end) in PHASES.items()}, "balance": PHASES["dense"][1] + 1}
"""A start that resumes from there, or from later, does not reach these places."""


class Deck:
    """The remaining faults, dealt in shuffled order; one that cannot happen yet waits for its turn."""

    def __init__(self, faults: Sequence[Fault], chooser: random.Random) -> None:
        self.faults = list(faults)
        chooser.shuffle(self.faults)
        self._misses: Counter[str] = Counter()

    def deal(self, step: int, has_saved: bool) -> Fault | None:
        """The next one that can happen to a start that resumes from `step`; `has_saved`: checkpoints/ exists."""
        for index, fault in enumerate(self.faults):
            is_past = step >= LAST_STEP_BEFORE.get(fault.place or "", STEPS + 1)
            is_past |= fault.place == "line" and fault.nth > STEPS - step
            is_past |= has_saved and fault.crash is not None and fault.crash["operation"] in ONLY_FIRST_SAVE
            if not is_past:
                return self.faults.pop(index)
        return None

    def put_back(self, fault: Fault) -> None:
        """Keep a fault that came too late for another start.

        Raises:
            SystemExit: it has come too late so often that what it waits for seems to be gone.
        """
        self.faults.append(fault)
        self._misses[str(fault)] += 1
        if self._misses[str(fault)] == MOST_MISSES:
            raise SystemExit(f"{fault} did not happen in {MOST_MISSES} starts: is its place, or its operation, gone?")


# ----- a start --------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """One start of the command: its processes, its fault, and its trace."""

    folder: Path
    fault: Fault | None
    launcher: psutil.Popen | int
    began: float
    children: list[Child] = field(default_factory=list)
    """None if a real launcher started them, with an interpreter that imports everything again."""
    fired: float | None = None
    missed: bool = False
    ended: float = 0.0
    overdue: bool = False
    codes: list[int | None] = field(default_factory=list)
    """Exit codes; with a real launcher the return value of `main`, None if it did not return."""
    _lines: dict[int, list[list[Any]]] = field(default_factory=lambda: {0: [], 1: []})
    _read: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})

    def events(self, process: int = 0) -> list[list[Any]]:
        """[seconds, what, value] of all events a process has noted so far."""
        path = self.folder / f"trace.{process}"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read[process])
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[process] += len(whole)
            self._lines[process] += [json.loads(line) for line in whole.splitlines()]
        return self._lines[process]

    def values(self, what: str, process: int = 0) -> list[Any]:
        return [value for _, said, value in self.events(process) if said == what]

    @property
    def pids(self) -> list[int]:
        """Of the trainers that have begun."""
        return [pid for process in (0, 1) for pid in self.values("pid", process)]

    @property
    def launcher_pid(self) -> int:
        return self.launcher if isinstance(self.launcher, int) else self.launcher.pid

    @property
    def is_cold(self) -> bool:
        return not self.children

    @property
    def output(self) -> str:
        """The output of the processes."""
        if self.is_cold:
            return (self.folder / "output").read_text(errors="replace")
        return "".join(child.output for child in self.children)

    def is_alive(self) -> bool:
        if not isinstance(self.launcher, int):
            self.launcher.poll()
        return any(map(_is_alive, (self.launcher_pid, *self.pids)))

    @property
    def resumed(self) -> int | None:
        """The step it resumed from, None if it did not get that far."""
        return next(iter(self.values("resume")), None)

    @property
    def last_step(self) -> int | None:
        """The last step it took, or resumed from."""
        return (self.values("done") or [self.resumed])[-1]

    def place(self) -> str:
        """Where the main process was when the fault happened."""
        places: list[str] = []
        resumed, step = False, 0
        for seconds, what, value in self.events():
            if self.fired is not None and seconds > self.fired:
                break
            if what == "begin":
                places.append(value)
            elif what == "end":
                places.pop()
            elif what in ("resume", "done"):
                resumed, step = True, value
        if not places:
            return "at the end" if resumed and self.values("resume") and step == STEPS else "checks"
        if places[-1] != "step":
            return places[-1]
        return next(phase for phase, (first, end) in PHASES.items() if first <= step < end)

    def time_of(self, what: str, value: Any = None) -> float | None:
        """When it was noted first."""
        return next((t for t, said, is_ in self.events() if said == what and value in (None, is_)), None)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# ----- the ground -----------------------------------------------------------------------------------------------------


class Ground:
    """A disk for run directories, rows, a nursery; starts trainers and injects faults into them."""

    def __init__(self, folder: Path, disk: Path, nursery: Nursery) -> None:
        self.folder, self.disk, self.nursery = folder, disk, nursery
        self._count = itertools.count()

    def start(self, run_dir: Path, fault: Fault | None, launcher: str | None = None) -> Start:
        """Start the command with a fault to come, and wait until all of it has ended."""
        folder = self.folder / "starts" / f"{next(self._count)}"
        folder.mkdir(parents=True)
        arguments = [CONFIG, *overrides(self.folder, run_dir, 2, **OPTIONS)]
        crash = None if fault is None else fault.crash
        call = {"arguments": arguments, "folder": str(folder), "run_dir": str(run_dir), "crash": crash}
        began = time.monotonic()
        if launcher is None:
            parent, children = self.nursery.launcher("chaos_trainer:trainer", 2, call)
            start = Start(folder, fault, parent.pid, began, children)
        else:
            start = Start(folder, fault, self._launch(launcher, call, folder), began)
        try:
            self._watch(start, run_dir)
        finally:
            self._repair(run_dir)
        start.codes = [child.wait(10) for child in start.children]
        start.codes = start.codes or [next(iter(start.values("exit", process)), None) for process in (0, 1)]
        return start

    def _launch(self, launcher: str, call: dict[str, Any], folder: Path) -> psutil.Popen:
        command = [*LAUNCHERS[launcher], str(free_port()), str(BENCHMARKS / "chaos_trainer.py"), json.dumps(call)]
        with (folder / "output").open("w") as file:
            return psutil.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)

    def _watch(self, start: Start, run_dir: Path) -> None:
        while len(start.pids) < 2 or start.is_alive():
            now = time.monotonic()
            if start.fired is None and start.fault is not None:
                self._hurt(start, start.fault, run_dir, now)
            if now > (start.fired + END_SECONDS if start.fired else start.began + START_SECONDS):
                start.overdue = True
                for pid in (start.launcher_pid, *start.pids):
                    _send(pid, signal.SIGKILL)
                break
            time.sleep(POLL_SECONDS)
        start.ended = time.monotonic()

    def _hurt(self, start: Start, fault: Fault, run_dir: Path, now: float) -> None:
        """Inject the fault if it is time."""
        if fault.crash is not None:
            start.fired = start.time_of("crash")
        elif not start.missed and (reached := _reached(start, fault)) is not None and now >= reached + fault.delay:
            start.missed = not self._happen(start, fault, run_dir)
            start.fired = None if start.missed else now

    def _happen(self, start: Start, fault: Fault, run_dir: Path) -> bool:
        """Whether a process was left for it to happen to."""
        kind, gap = fault.kind, fault.gap
        main, other = start.pids
        what, _, whom = kind.partition(" ")
        pids = {"main": [main], "other": [other], "both": [main, other], "launcher": [start.launcher_pid]}
        if not (_is_alive(main) and _is_alive(other)):
            return False
        if kind == "TERM, then KILL":
            for pid in (main, other):
                _send(pid, signal.SIGTERM)
            time.sleep(gap)
            for pid in (main, other):
                _send(pid, signal.SIGKILL)
        elif kind == "STOP file":
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "STOP").touch()
        elif kind == "disk full":
            _fill(self.disk / "filler")
        elif kind == "disk read-only":
            return _make_read_only(run_dir / "checkpoints")
        else:
            return all(_send(pid, getattr(signal, f"SIG{what}")) for pid in pids[whom])
        return True

    def _repair(self, run_dir: Path) -> None:
        (self.disk / "filler").unlink(missing_ok=True)
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        if str(run_dir / "checkpoints") in mounted:
            subprocess.run(["umount", str(run_dir / "checkpoints")], check=True)


LAUNCHERS = {
    "accelerate": (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port"),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
}


def _reached(start: Start, fault: Fault) -> float | None:
    """When the place of the fault was reached."""
    if fault.place is None:
        return start.began if len(start.pids) == 2 else None
    if len(start.pids) < 2:
        return None
    if fault.place in PHASES:
        if start.resumed is None:
            return None
        first, last = PHASES[fault.place]
        first = max(start.resumed, first)
        nth, place = first - start.resumed + min(fault.nth, last - first), "step"
    else:
        nth, place = fault.nth, fault.place
    begun = [seconds for seconds, what, value in start.events() if (what, value) == ("begin", place)]
    return begun[nth - 1] if len(begun) >= nth > 0 else None


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _fill(filler: Path) -> None:
    """Fill the disk."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


def _make_read_only(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    for _ in range(100):  # refused while a file is open for writing
        if not subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], capture_output=True).returncode:
            return True
        time.sleep(0.01)
    return False


# ----- one run, and its checks ----------------------------------------------------------------------------------------


@dataclass
class Record:
    """A fault that happened.  `lost`: steps to be repeated; `next_step`: seconds from it to the end of a step."""

    run: int
    kind: str
    place: str
    step: int
    lost: int
    ending: float
    is_cold: bool
    operation: str | None = None
    fired: float = 0.0
    next_step: float | None = None


@dataclass
class Tally:
    """Totals of a campaign.

    For the forked trainers, in seconds: `wall` from each start to the end of all its processes, which is `starting` (to
    the training loop) + `training` + `exporting` + `ending` (after a fault); `to_step`, from a start to its first step.
    """

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    too_late: int = 0
    starts: int = 0
    runs: int = 0
    steps: int = 0
    starting: float = 0.0
    training: float = 0.0
    exporting: float = 0.0
    ending: float = 0.0
    to_step: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return self.starting + self.training + self.exporting + self.ending


def run_until_finished(
    ground: Ground,
    name: str,
    deal: Callable[[int, bool], Fault | None],
    put_back: Callable[[Fault, int], None],
    reference: dict[str, Any],
    tally: Tally,
    launcher: Callable[[], str | None] = lambda: None,
) -> None:
    """Start the command until the run is finished, with all checks after each start."""
    run_dir = ground.disk / name
    step = 0
    waiting: list[Record] = []
    tally.runs += 1
    while True:
        fault = deal(step, (run_dir / "checkpoints").exists())
        start = ground.start(run_dir, fault, launcher())
        tally.starts += 1
        waiting = _account(tally, start, waiting)
        found, problems = inspect(start, run_dir, step)
        if start.fired is not None and fault is not None:
            record = _record(tally.runs, start, fault, found, step)
            tally.records.append(record)
            waiting.append(record)
        elif fault is not None:
            put_back(fault, step)
            tally.too_late += 1
        for problem in problems:
            tell(f"PROBLEM run {tally.runs} start {start.folder.name} {fault} at {start.place()}: {problem}")
            tell(start.output[-6000:])
        tally.problems += [f"run {tally.runs}, {fault and fault.kind} at {start.place()}: {p}" for p in problems]
        step = found
        if is_finished(run_dir) or problems:  # with problems it is no longer evidence
            break
    if is_finished(run_dir):
        differing = compare(run_dir, reference)
        tally.problems += [f"run {tally.runs}: {problem}" for problem in differing]
        for problem in differing:
            tell(f"PROBLEM run {tally.runs}: {problem}")
    shutil.rmtree(run_dir)


def is_finished(run_dir: Path) -> bool:
    return (run_state.read_status(run_dir) or {}).get("state") == "finished"


def inspect(start: Start, run_dir: Path, before: int) -> tuple[int, list[str]]:
    """The step of the newest checkpoint, and the problems after a start; `before`: the newest step before it."""
    newest, warnings = checkpoint.newest(run_dir)
    step = 0 if newest is None else checkpoint.read_state(newest)["step"]
    problems = [f"a damaged checkpoint: {warning}" for warning in warnings]
    output, fault = start.output, start.fault
    if start.overdue:
        problems.append(f"not all processes ended within {END_SECONDS if start.fired else START_SECONDS} s")
    if "warning: skipped" in output:
        problems.append("a checkpoint was skipped")
    if start.resumed not in (None, before):
        problems.append(f"went on from step {start.resumed}, the newest checkpoint was of step {before}")
    reached = before if start.last_step is None else start.last_step
    if not 0 <= reached - step <= SAVE_STEPS:
        problems.append(f"the newest checkpoint is of step {step}, step {reached} was reached")
    problems += _repeated_lines(run_dir)
    if start.fired is None and not is_finished(run_dir):
        problems.append(f"ended with {start.codes} although nothing was done to it")
    if fault is not None and fault.kind in (*REQUESTS, *DISKS, CRASHES["no space"]) and not start.is_cold:
        problems += ["a traceback"] * ("Traceback" in output)
    if fault is not None and start.fired is not None and fault.is_request():
        problems += _refused(start, run_dir, reached, step)
    if (run_dir / "STOP").exists():
        (run_dir / "STOP").unlink()
        if not is_finished(run_dir):
            problems.append("the STOP file is still there")
    return step, problems


def _refused(start: Start, run_dir: Path, reached: int, step: int) -> list[str]:
    """Signs that a request to stop was not obeyed properly."""
    if is_finished(run_dir):
        return []  # nothing was left to do
    problems = [] if step == reached else [f"a request to stop lost {reached - step} steps"]
    has_begun = start.time_of("begin", "prepare") is not None
    # Asked while the group is formed, the other one leaves without a word: the main process finds it gone, and says so.
    is_deserted = start.codes == [1, 75] and "could not form a group" in start.output
    if has_begun and start.codes[0] != 75 and not is_deserted:
        problems.append(f"ended with {start.codes} after a request to stop")
    said = status(run_dir)["state"] if (run_dir / "status.json").exists() else None
    if start.codes[0] == 75 and said != "preempted":
        problems.append(f"status.json says {said} after a request to stop")
    return problems


def _repeated_lines(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    seen = [(line["step"], line["phase"] == "export") for line in map(json.loads, lines)]
    return [f"metrics.jsonl has a step twice or out of order: {seen}"] if seen != sorted(set(seen)) else []


def compare(run_dir: Path, reference: dict[str, Any]) -> list[str]:
    """Differences from an undisturbed run, and leftover files."""
    found = result(run_dir)
    problems = [f"{name} is not that of an undisturbed run" for name in found if found[name] != reference[name]]
    names = [*run_dir.iterdir(), *(run_dir / "checkpoints").iterdir()]
    left = sorted(path.name for path in names if path.name.startswith((".", "damaged")) and path.name != ".lock")
    return problems + [f"left lying about: {left}"] * bool(left)


def _record(run: int, start: Start, fault: Fault, found: int, before: int) -> Record:
    assert start.fired is not None
    reached = before if start.last_step is None else start.last_step
    return Record(
        run=run,
        kind=fault.kind,
        place=start.place(),
        step=reached,
        lost=reached - found,
        ending=start.ended - start.fired,
        is_cold=start.is_cold,
        operation=None if fault.crash is None else fault.crash["operation"],
        fired=start.fired,
    )


def _account(tally: Tally, start: Start, waiting: list[Record]) -> list[Record]:
    """Add the times of a start; returns the records that still wait for a step."""
    tally.steps += len(start.values("done"))
    if not start.is_cold:
        hurt = start.fired or start.ended
        training = min(start.time_of("begin", "training") or hurt, hurt)
        trained = min(start.time_of("end", "training") or hurt, hurt)
        tally.starting += training - start.began
        tally.training += trained - training
        tally.exporting += hurt - trained
        tally.ending += start.ended - hurt
    first = start.time_of("done")
    if first is None or (start.fired is not None and first > start.fired):
        return [] if start.resumed == STEPS else waiting  # no step follows the last one
    if not start.is_cold:
        tally.to_step.append(first - start.began)
    for record in waiting[-1:]:  # others were followed by one that came before a step
        record.next_step = first - record.fired
    return []


# ----- undisturbed runs -----------------------------------------------------------------------------------------------


def spans(start: Start, place: str) -> list[float]:
    """Seconds of every visit."""
    found, open_since = [], []
    for seconds, what, value in start.events():
        if value == place and what == "begin":
            open_since.append(seconds)
        elif value == place and what == "end":
            found.append(seconds - open_since.pop())
    return found


def undisturbed(ground: Ground, name: str) -> tuple[Start, dict[str, Any]]:
    """A run without faults, and its result."""
    run_dir = ground.disk / name
    start = ground.start(run_dir, None)
    if start.codes != [0, 0]:
        raise SystemExit(f"the undisturbed run failed with {start.codes}:\n{start.output[-4000:]}")
    found = result(run_dir)
    shutil.rmtree(run_dir)
    return start, found


def typical_seconds(start: Start) -> dict[str, float]:
    """How long a visit of each place takes; "start": to the first step."""
    places = {value for what, value in ((said, is_) for _, said, is_ in start.events()) if what == "begin"}
    seconds = {place: statistics.median(spans(start, place)) for place in places}
    first = start.time_of("begin", "step")
    assert first is not None
    return {**seconds, **dict.fromkeys(PHASES, seconds["step"]), "start": first - start.began}


def operations_of(start: Start) -> dict[str, list[str]]:
    """The names of all file operations by place, in order of first occurrence."""
    names = list(dict.fromkeys(start.values("operation")))
    return {place: [name for name in names if name.split(" ")[0] == place] for place in ("save", "line", *IN_EXPORT)}


def useful_seconds(start: Start) -> float:
    """The steps of a complete run, without its saves."""
    return sum(spans(start, "training")) - sum(spans(start, "save"))


# ----- the campaign ---------------------------------------------------------------------------------------------------

EXPORTS_PER_RUN = 8
COLD = (
    ("torchrun", Fault("KILL main", "sparsify", 3)),
    ("accelerate", Fault("KILL other", "save")),
    ("torchrun", Fault("TERM launcher", "line", 3)),
    ("accelerate", Fault("disk full", "line", 2)),
    ("accelerate", Fault("KILL launcher", "prepare")),
    ("torchrun", Fault("STOP file", "evaluation")),
)


def campaign(ground: Ground, num_faults: int, seed: int) -> dict[str, Any]:
    """The entire campaign; returns the figures of the tables."""
    chooser = random.Random(seed)
    undisturbed(ground, "first")  # while the nursery is importing
    quiet, reference = undisturbed(ground, "second")
    seconds, operations = typical_seconds(quiet), operations_of(quiet)
    quiets = [quiet, undisturbed(ground, "third")[0]]
    in_training = crashes(operations["save"] + operations["line"], chooser)
    in_export = crashes([name for place in IN_EXPORT for name in operations[place]], chooser)
    num_late = num_faults // 6
    in_training += [random_fault(chooser, IN_TRAINING, seconds) for _ in range(num_faults - num_late)]
    in_export += [random_fault(chooser, IN_EXPORT, seconds) for _ in range(num_late)]
    tell(f"seed {seed}: {len(in_training)} faults in training, {len(in_export)} in the export")
    early, late, tally = Deck(in_training, chooser), Deck(in_export, chooser), Tally()
    while early.faults or late.faults:
        dealt = itertools.count()

        def deal(step: int, has_saved: bool, dealt: Iterator[int] = dealt) -> Fault | None:
            if step < STEPS and (fault := early.deal(step, has_saved)) is not None:
                return fault
            return late.deal(step, has_saved) if next(dealt) < EXPORTS_PER_RUN else None

        def put_back(fault: Fault, step: int) -> None:
            (early if step < STEPS else late).put_back(fault)

        run_until_finished(ground, f"run-{tally.runs}", deal, put_back, reference, tally)
        tell(
            f"run {tally.runs}: {len(tally.records)} faults, {tally.starts} starts, {len(tally.problems)} problems, "
            f"{len(early.faults)} + {len(late.faults)} to come, {tally.wall:.0f} s"
        )
    quiets += [undisturbed(ground, name)[0] for name in ("fourth", "fifth")]
    num_warm = tally.runs
    run_cold(ground, reference, tally)
    return figures(tally, quiets, num_warm) | {"operations": {k: len(v) for k, v in operations.items() if v}}


def run_cold(ground: Ground, reference: dict[str, Any], tally: Tally) -> None:
    """A few faults through real launchers."""
    faults = iter([*COLD, ("torchrun", None)])
    pending: list[str] = []

    def deal(_step: int, _has_saved: bool) -> Fault | None:
        launcher, fault = next(faults)
        pending.append(launcher)
        return fault

    def put_back(fault: Fault, _step: int) -> None:
        tally.problems.append(f"{fault} did not happen")

    run_until_finished(ground, "cold", deal, put_back, reference, tally, pending.pop)


def figures(tally: Tally, quiets: Sequence[Start], num_runs: int) -> dict[str, Any]:
    """All figures of the tables; times in seconds."""
    warm = [record for record in tally.records if not record.is_cold]
    cold = [record for record in tally.records if record.is_cold]
    saves = [seconds for quiet in quiets for seconds in spans(quiet, "save")]
    useful = statistics.mean(map(useful_seconds, quiets))
    save, interval = statistics.mean(saves), useful / STEPS * SAVE_STEPS
    ending = statistics.mean(record.ending for record in warm)
    restart = statistics.mean(tally.to_step)
    between = tally.training / len(warm)
    times = {"save": save, "interval": interval, "ending": ending, "restart": restart, "between_faults": between}
    cold_steps = [record.next_step for record in cold if record.next_step is not None]
    down_cold = statistics.mean(cold_steps) if cold_steps else None
    return {
        "faults": len(tally.records),
        "recoveries": sum(record.run not in _failed_runs(tally) for record in tally.records),
        "problems": tally.problems,
        "runs": tally.runs,
        "starts": tally.starts,
        "too_late": tally.too_late,
        "kinds": summaries(warm, lambda record: record.kind),
        "cold": summaries(cold, lambda record: record.kind),
        "places": summaries(warm, lambda record: record.place),
        "times": times,
        "down_cold": down_cold,
        "wall": {name: getattr(tally, name) for name in ("wall", "starting", "training", "exporting", "ending")},
        "lost_mean": statistics.mean(record.lost for record in warm),
        "down_mean": statistics.mean(record.next_step for record in warm if record.next_step is not None),
        "useful": useful * num_runs,
        "steps_taken": tally.steps,
        "steps_needed": STEPS * tally.runs,
        "measured": useful * num_runs / tally.wall,
        "model": model(save, interval, ending + restart, between),
        "extrapolated": {
            f"{hours} h": [model(save, interval, down, hours * 3600) for down in (ending + restart, down_cold or 0)]
            for hours in (3, 24)
        },
        "records": [asdict(record) for record in tally.records],
    }


def _failed_runs(tally: Tally) -> set[int]:
    return {int(problem.split()[1].rstrip(",:")) for problem in tally.problems if problem.startswith("run ")}


def model(save: float, interval: float, down: float, between_faults: float) -> float:
    """The share of useful time: τ/(τ+C) / (1 + (D+R+τ/2)/MTBF)."""
    return interval / (interval + save) / (1 + (down + interval / 2) / between_faults)


def summaries(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, dict[str, Any]]:
    """By kind or place: count, steps lost, seconds to the end of all processes and to the next step."""
    found = {}
    for name in sorted({key(record) for record in records}):
        chosen = [record for record in records if key(record) == name]
        steps = [record.next_step for record in chosen if record.next_step is not None]
        found[name] = {
            "faults": len(chosen),
            "lost_mean": statistics.mean(record.lost for record in chosen),
            "lost_max": max(record.lost for record in chosen),
            "ending_median": statistics.median(record.ending for record in chosen),
            "ending_max": max(record.ending for record in chosen),
            "next_step_median": statistics.median(steps) if steps else None,
            "followed": len(steps),
        }
    return found


# ----- output ---------------------------------------------------------------------------------------------------------


def tell(text: str) -> None:
    """Progress, separate from the tables."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        f"| {title} | faults | steps lost, mean | max | s to the end of all, median | max | s to a step, median (of) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        step = "–" if row["next_step_median"] is None else f"{row['next_step_median']:.1f} ({row['followed']})"
        lines.append(
            f"| {name} | {row['faults']} | {row['lost_mean']:.1f} | {row['lost_max']} | {row['ending_median']:.1f} "
            f"| {row['ending_max']:.1f} | {step} |"
        )
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """The tables of chaos.md."""
    times = found["times"]
    lines = [
        table("fault", found["kinds"]),
        table("real launcher", found["cold"]),
        table("place", found["places"]),
        f"faults {found['faults']}, recovered {found['recoveries']}, runs {found['runs']}, starts {found['starts']}, "
        f"came too late {found['too_late']}, steps taken {found['steps_taken']} for {found['steps_needed']}",
        f"operations listed: {found['operations']}",
        f"C {times['save']:.3f} s, τ {times['interval']:.3f} s, D {times['ending']:.2f} s, R {times['restart']:.2f} s, "
        f"MTBF {times['between_faults']:.2f} s of training; down with a real launcher {found['down_cold'] or 0:.1f} s",
        f"fault to next step {found['down_mean']:.2f} s on average; steps lost {found['lost_mean']:.2f} on average",
        "seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["wall"].items()),
        f"useful {found['useful']:.0f} s",
        f"effective ratio: measured {found['measured']:.3f}, model {found['model']:.3f}",
        *(
            f"model at MTBF {name}: {fork:.4f}, with real launchers {cold:.4f}"
            for name, (fork, cold) in found["extrapolated"].items()
        ),
        *(f"PROBLEM {problem}" for problem in found["problems"]),
    ]
    return "\n\n".join(lines)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A separate, small file system."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults")
    parser.add_argument("--keep", type=Path, help="a new folder for traces and output, which stay there")
    parser.add_argument("--json", action="store_true", help="print all figures, and each fault, as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # in order: the disk must be unmounted
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    warm_deepspeed()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.resolve()
        (folder / "processes").mkdir(parents=True)
        short_rows(folder)
        disk = stack.enter_context(small_disk(folder / "disk"))
        nursery = stack.enter_context(Nursery(folder / "processes", *MODULES[1:], "chaos_trainer"))
        found = campaign(Ground(folder, disk, nursery), args.faults, args.seed)
    print(json.dumps(found, indent=1) if args.json else report(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
