"""A run can be stopped at any moment and goes on as if nothing had happened; a death is told, by name, in seconds.

Trainers are real processes (nursery.py) to which something happens at a given moment (faults.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from nursery import Child
from runs import ACCELERATE, PLAIN
from small_runs import (
    CONFIG,
    DENSE_STEPS,
    EVAL_CALLS,
    EVALUATED_STEP,
    STEPS,
    WORLDS,
    Playground,
    checkpoints,
    overrides,
    result,
    status,
)
from spawn import TESTS, environment, free_port, launched

from sora_llm import checkpoint
from sora_llm.data.pool import map_in_order
from sora_llm.errors import Preempted, RunFailed
from sora_llm.running import lifeline, run_state
from sora_llm.running import stop as stop_module
from sora_llm.running.lifeline import LAUNCHER_GRACE_SECONDS
from sora_llm.running.stop import HEED_SECONDS, LOOK_SECONDS, SIGNALS, StopRequest

PREEMPTED = 75
END_SECONDS = 45
"""In which processes end after another one, or the launcher, has died."""
TENSORS = "adapter.safetensors"

# ----- signals and the STOP file --------------------------------------------------------------------------------------

MOMENTS = [
    # place, nth call of it, step of the status, step of the newest checkpoint
    ("prepare", 1, 0, None),
    ("load", 1, 0, None),
    ("evaluation", 2, 0, None),  # the first one
    ("step", DENSE_STEPS, DENSE_STEPS, DENSE_STEPS),
    ("evaluation", 2, EVALUATED_STEP, EVALUATED_STEP),  # in the middle, whose line is not written yet
    ("evaluation", 1, EVALUATED_STEP, EVALUATED_STEP),  # the same once more
    ("step", 2, 5, 5),
    ("step", 1, STEPS, STEPS),  # the last one
    ("cut", 1, STEPS, STEPS),
    ("reload", 1, STEPS, STEPS),
    ("evaluation", 2 * EVAL_CALLS + 2, STEPS, STEPS),  # after that of the last step's line and that of the cut adapter
]


@pytest.mark.parametrize(
    ("strategy", "num_processes", "requests"),
    [
        ("none", 1, [("TERM", 0), ("USR1", 0), ("INT", 0)]),
        pytest.param("none", 1, [("stop file", 0)], marks=pytest.mark.matrix),
        pytest.param("zero2", 2, [("TERM", 0), ("USR1", 1), ("stop file", 0)], marks=pytest.mark.matrix),
        pytest.param("zero2", 2, [("INT", 1), ("TERM", None)], marks=pytest.mark.matrix),
        pytest.param("ddp", 2, [("TERM", 1), ("stop file", 0)], marks=pytest.mark.matrix),
        pytest.param("zero3", 2, [("TERM", 1), ("stop file", 0)], marks=pytest.mark.matrix),
    ],
    ids=["signals", "STOP file", "zero2", "zero2, other signals", "ddp", "zero3"],
)
def test_a_run_that_is_stopped_again_and_again_ends_like_an_undisturbed_one(
    ground: Playground,
    undisturbed: dict[int, Path],
    strategy: str,
    num_processes: int,
    requests: Sequence[Any],
    request: pytest.FixtureRequest,
) -> None:
    name, options = f"stopped {request.node.callspec.id}", {"distributed.strategy": strategy}
    run_dir, whole = ground.run_dir(name), undisturbed[num_processes]
    if strategy in ("ddp", "zero3"):
        whole = ground.run_dir(f"undisturbed {strategy}")
        codes = ground.codes(f"undisturbed {strategy}", num_processes, **options, **{"output.save_steps": 1})
        assert codes == [0] * num_processes
    saved: set[str] = set()
    for index, (place, nth, step, newest) in enumerate(MOMENTS):
        what, process = requests[index % len(requests)]
        if place == "prepare" and num_processes > 1:  # no group yet: each is stopped by itself
            process = None
        fault = {"place": place, "nth": nth, "do": what, "process": process}
        processes = ground.start(name, num_processes, [fault], **options)
        codes = [child.wait() for child in processes]
        assert codes == [PREEMPTED] * num_processes, f"{fault}: {codes}\n{processes[0].output}"
        assert not (run_dir / "STOP").exists(), fault
        found = status(run_dir)
        wanted = None if newest is None else f"checkpoints/step-{newest}"
        assert (found["state"], found["step"], found["checkpoint"]) == ("preempted", step, wanted), fault
        assert found["error"] is None and found["adapter"] is None
        saved |= set() if newest is None else {f"step-{newest}"}
        assert checkpoints(run_dir) == sorted(saved), fault  # exactly one more, and nothing half-made
        if newest is not None:
            ours, theirs = (folder / "checkpoints" / f"step-{newest}" / TENSORS for folder in (run_dir, whole))
            assert ours.read_bytes() == theirs.read_bytes(), fault
    assert not (run_dir / "adapter").exists() and not (run_dir / ".adapter.tmp").exists()
    assert ground.codes(name, num_processes, **options) == [0] * num_processes
    assert result(run_dir) == result(whole)


def test_trackers_and_the_progress_go_on_where_the_run_was_stopped(ground: Playground) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name, options = "trackers", {"output.report_to": ["tensorboard"]}
    assert ground.codes(name, faults=[{"place": "step", "nth": 4, "do": "TERM"}], **options) == [PREEMPTED]
    (resumed,) = ground.start(name, **options)
    assert resumed.wait() == 0
    events = EventAccumulator(str(next((ground.run_dir(name) / "trackers").rglob("events.*")).parent)).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, STEPS + 1))
    assert re.findall(r"^step (\d)/6 sparsify", resumed.output, re.MULTILINE) == ["5", "6"]


def test_further_signals_while_the_checkpoint_is_saved_and_after_it_do_no_harm(
    ground: Playground, undisturbed: dict[int, Path]
) -> None:
    all_three = "TERM INT USR1"
    faults = [
        {"place": "step", "nth": 4, "do": "TERM"},
        {"place": "save", "do": all_three},
        {"place": "rename", "do": all_three},
        {"place": "end", "do": all_three},  # the interpreter is about to end
    ]
    assert ground.codes("signals in the save", faults=faults) == [PREEMPTED]
    run_dir = ground.run_dir("signals in the save")
    assert status(run_dir)["checkpoint"] == "checkpoints/step-4" and checkpoints(run_dir) == ["step-4"]
    ours, theirs = (folder / "checkpoints" / "step-4" / TENSORS for folder in (run_dir, undisturbed[1]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_signal_for_a_process_that_waits_in_a_collective_is_heeded(ground: Playground) -> None:
    name, faults = "in a collective", [{"place": "step", "nth": 4, "do": "wait", "process": 1}]
    processes = ground.start(name, 2, faults, **WORLDS[2])
    ground.reported(name, "step-4.1")
    time.sleep(0.2)  # the main process is on its way into the collective of this step; it makes no difference
    processes[0].kill(signal.SIGTERM)
    ground.go(name)
    assert [child.wait() for child in processes] == [PREEMPTED] * 2
    assert status(ground.run_dir(name))["checkpoint"] == "checkpoints/step-4"
    assert "stopped by SIGTERM" in processes[0].output


def test_a_stop_file_that_is_there_at_the_start_ends_the_run_at_once(
    ground: Playground, undisturbed: dict[int, Path]
) -> None:
    """Before the data is prepared; with the newest checkpoint in the status, if there is one."""
    name, faults = "stopped at the start", [{"place": "step", "nth": 2, "do": "stop file"}]
    run_dir = ground.run_dir(name)
    for newest in (None, "checkpoints/step-2"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "STOP").touch() if newest is None else (run_dir / "STOP").mkdir()
        assert ground.codes(name, faults=[{"place": "prepare", "do": "report"}]) == [PREEMPTED]
        assert not (run_dir / "STOP").exists() and not (run_dir.parent / "prepare-1.0").exists()
        assert (status(run_dir)["state"], status(run_dir)["checkpoint"]) == ("preempted", newest)
        if newest is None:
            assert ground.codes(name, faults=faults) == [PREEMPTED]
    (run_dir / "STOP").touch()
    _, processes = ground.nursery.launcher("faults:trainer", 2, ground.call(name, 2, **WORLDS[2]))
    assert processes[0].wait() == PREEMPTED and not (run_dir / "STOP").exists()
    assert processes[1].wait() in (PREEMPTED, -signal.SIGTERM)  # the latter if it has not even begun
    assert ground.codes(name) == [0] and result(run_dir) == result(undisturbed[1])


def test_a_stop_file_is_left_to_the_run_that_holds_the_directory(ground: Playground) -> None:
    """A second start of the same command, which waits for the first run to end, would swallow its request."""
    name = "stopped while another runs"
    run_dir = ground.run_dir(name)
    with run_state.run_lock(run_dir, 0):
        run_state.write_status(run_dir, "running", step=3, phase="sparsify")
        (run_dir / "STOP").touch()
        assert ground.codes(name) == [PREEMPTED]
        assert (run_dir / "STOP").exists() and status(run_dir)["state"] == "running"
        run_state.write_status(run_dir, "preempted", step=3, phase="sparsify")
    before = (run_dir / "status.json").stat().st_ino
    assert ground.codes(name) == [PREEMPTED] and not (run_dir / "STOP").exists()
    assert (run_dir / "status.json").stat().st_ino != before, "a job script looks for a status that is new"
    assert (status(run_dir)["step"], status(run_dir)["phase"]) == (3, "sparsify"), "it is where it was stopped before"


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_for_others_who_never_come_can_be_stopped(ground: Playground, process: int) -> None:
    """It waits inside torch, where Python's handlers of signals do not run: half an hour if it were for torch."""
    name, faults = f"alone {process}", [{"place": "group", "process": None, "do": "report"}]
    run_dir, environ = ground.run_dir(name), launched(2)[process]
    call = ground.call(name, 2, faults, **WORLDS[2])
    alone = ground.nursery.start("faults:trainer", call, environ)
    ground.reported(name, f"group-1.{process}")
    time.sleep(2)
    alone.kill(signal.SIGTERM)
    assert alone.wait(HEED_SECONDS + END_SECONDS) == PREEMPTED, alone.output
    if process == 0:
        assert (status(run_dir)["state"], status(run_dir)["checkpoint"]) == ("preempted", None)
        assert alone.output.count("stopped by SIGTERM: nothing to save") == 1


def test_a_finished_run_stays_finished_when_its_command_is_started_again_and_stopped(
    ground: Playground, undisturbed: dict[int, Path]
) -> None:
    run_dir = ground.run_dir("finished")
    shutil.copytree(undisturbed[1], run_dir)
    before = status(run_dir)
    assert ground.codes("finished", faults=[{"place": "prepare", "do": "TERM"}]) == [PREEMPTED]
    assert status(run_dir) == before and before["state"] == "finished"


def test_a_run_that_is_asked_to_stop_when_nothing_is_left_to_do_finishes(ground: Playground) -> None:
    assert ground.codes("too late", faults=[{"place": "publish", "do": "TERM"}]) == [0]
    found = status(ground.run_dir("too late"))
    assert (found["state"], found["adapter"]) == ("finished", "adapter")


def test_a_run_that_waits_for_another_one_to_end_can_be_stopped(ground: Playground) -> None:
    name = "waiting"
    run_dir = ground.run_dir(name)
    with run_state.run_lock(run_dir):
        (waiting,) = ground.start(name, faults=[{"place": "lock", "do": "report"}])
        ground.reported(name, "lock-1.0")
        waiting.kill(signal.SIGTERM)
        assert waiting.wait(END_SECONDS) == PREEMPTED
        assert not (run_dir / "status.json").exists()  # the directory is not its own


def test_signals_count_once_and_handlers_are_as_they_were_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(tmp_path) as stop:
        stop.start()
        with pytest.raises(Preempted, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # what the first one has begun goes on
        assert stop.reason(look_for_file=False) == "SIGUSR1"
    with StopRequest(tmp_path) as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Preempted, match="SIGINT"):
            stop.start()
    with StopRequest(tmp_path, others_wait=lambda: True) as stop:
        stop.start()
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason(look_for_file=False) == "SIGTERM"
    with pytest.raises(Preempted, match="STOP"), StopRequest(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        stop.start()
        time.sleep(30)
    with StopRequest(tmp_path, look_for_file=False) as stop:
        stop.start()
        time.sleep(3 * LOOK_SECONDS)
        stop.at_once = False
        assert stop.reason(look_for_file=True) is None, "it is not this one's to obey"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_closed_terminal_stops_a_run_that_is_not_to_outlive_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest(tmp_path) as stop:
            stop.start()
            with pytest.raises(Preempted, match="SIGHUP"):
                signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        with StopRequest(tmp_path) as stop:
            stop.start()
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason(look_for_file=False) is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("request_comes", ["file", "SIGTERM"])
def test_a_request_that_comes_just_before_a_blocking_call_is_heeded(
    tmp_path: Path, request_comes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs no handler between the calls of this chain, and none of an earlier signal interrupts the last one."""
    monkeypatch.setattr(stop_module, "HEED_SECONDS", 300.0)  # a slow machine must not end this process
    libc = ctypes.CDLL(None)  # its functions end at a signal, and run no handler
    ask = {"file": partial(os.mkdir, tmp_path / "STOP"), "SIGTERM": partial(libc.kill, os.getpid(), signal.SIGTERM)}
    busy = partial(libc.usleep, 900_000)
    started = time.monotonic()
    with (
        pytest.raises(Preempted, match="STOP" if request_comes == "file" else "SIGTERM"),
        StopRequest(tmp_path) as stop,
    ):
        stop.start()
        deque(map(partial.__call__, [ask[request_comes], busy, partial(time.sleep, 60)]))
    assert time.monotonic() - started < 45


# ----- processes that tokenise ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_rows(ground: Playground) -> dict[str, Any]:
    """So many that processes tokenise them, cut so short that it is done at once."""
    lines = (ground.folder / "rows.jsonl").read_text().splitlines()
    rows = ground.folder / "many.jsonl"
    rows.write_text("\n".join(line[:-2] + str(n) + line[-2:] for n, line in enumerate(lines * 80)))
    columns = {"prompt": "question", "completion": "answer"}
    return {
        "data.datasets": [{"path": str(rows), "type": "prompt_completion", "columns": columns}],
        "data.num_proc": 2,
        "data.sequence_len": 24,
        "data.train_on_inputs": True,
        "train.max_steps": 3,
    }


def family(child: Child) -> list[psutil.Process]:
    """The processes that a trainer has started."""
    return psutil.Process(child.pid).children(recursive=True)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_every_process_while_the_data_is_prepared_stops_the_run_in_order(
    ground: Playground, many_rows: dict[str, Any], number: str
) -> None:
    name, cache = f"tokenising {number}", str(ground.folder / f"cache {number}")
    faults = [{"place": "rows", "nth": 3, "do": "wait"}]
    (trainer,) = ground.start(name, faults=faults, **many_rows, **{"data.cache_dir": cache})
    ground.reported(name, "rows-3.0")
    workers = family(trainer)
    for process in (*workers, trainer):  # those that tokenise first
        os.kill(process.pid, getattr(signal, number))
    ground.go(name)
    assert trainer.wait(END_SECONDS) == PREEMPTED, trainer.output
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=END_SECONDS)[1]
    assert status(ground.run_dir(name))["state"] == "preempted" and "Traceback" not in trainer.output
    assert not [path for path in Path(cache).iterdir() if ".tmp" in path.name]


def test_a_signal_that_only_processes_that_tokenise_get_does_no_harm(
    ground: Playground, many_rows: dict[str, Any]
) -> None:
    name, faults = "tokenising alone", [{"place": "rows", "nth": 3, "do": "wait"}]
    options = {**many_rows, "data.cache_dir": str(ground.folder / "cache alone")}
    (trainer,) = ground.start(name, faults=faults, **options)
    ground.reported(name, "rows-3.0")
    for process in family(trainer):
        for number in SIGNALS:
            os.kill(process.pid, number)
    ground.go(name)
    assert trainer.wait() == 0, trainer.output


def test_a_pool_of_which_one_process_is_killed_ends_within_seconds(tmp_path: Path) -> None:
    """Its executor sends TERM to the others, and waits for them."""
    started = time.monotonic()
    with pytest.raises(RunFailed, match="killed"):
        list(map_in_order(_die_at_three, range(20), 2))
    assert time.monotonic() - started < END_SECONDS


def test_a_signal_to_a_process_that_tokenises_is_not_taken_for_one_to_its_parent(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        pids = map_in_order(_ask_to_stop, range(4), 2)
        assert os.getpid() not in set(pids) and not stop.is_asked()


def _ask_to_stop(_number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return os.getpid()


def _die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number


# ----- deaths ---------------------------------------------------------------------------------------------------------

HOST = socket.gethostname()
DEATHS = [
    # place, nth call of it, process, what happens, what the status says of it
    ("load", 1, 1, "KILL", f"process 1 on {HOST} died"),
    ("step", 2, 1, "KILL", f"process 1 on {HOST} died"),
    ("step", 2, 0, "KILL", f"process 0 on {HOST} died"),
    ("save", 1, 0, "KILL", f"process 0 on {HOST} died"),
    ("rename", 1, 0, "KILL", f"process 0 on {HOST} died"),
    ("evaluation", 1, 1, "raise", f"process 1 on {HOST} failed: CUDA out of memory"),
    ("reload", 1, 1, "KILL", f"process 1 on {HOST} died"),
    ("publish", 1, 0, "KILL", f"process 0 on {HOST} died"),
]


def test_after_a_death_the_others_end_soon_the_status_names_it_and_the_next_start_resumes(
    ground: Playground, undisturbed: dict[int, Path]
) -> None:
    name, run_dir = "deaths", ground.run_dir("deaths")
    options = {**WORLDS[2], "output.save_steps": 1}
    for place, nth, process, what, sentence in DEATHS:
        fault = {"place": place, "nth": nth, "process": process, "do": what}
        processes = ground.start(name, 2, [fault], **options)
        died = processes[process].wait()
        assert died == (-signal.SIGKILL if what == "KILL" else 1), fault
        survivor = processes[1 - process]
        assert survivor.wait(END_SECONDS) == 1, fault
        found = status(run_dir)
        assert found["state"] == "failed" and sentence in found["error"], (fault, found)
        outputs = processes[0].output + processes[1].output
        assert outputs.count(f"sora_llm: {sentence}") == 1, outputs
        newest, _ = checkpoint.newest(run_dir)
        assert found["checkpoint"] == (newest and str(newest.relative_to(run_dir))), fault
        with run_state.run_lock(run_dir, wait_seconds=0):
            pass
    assert ground.codes(name, 2, **options) == [0, 0]
    assert result(run_dir) == result(undisturbed[2])
    assert checkpoints(run_dir) == [f"step-{step}" for step in range(1, STEPS + 1)]  # no half-made one is left


def test_processes_that_hang_after_a_death_are_ended(ground: Playground) -> None:
    """As they do in a collective of nccl's: the main one, and another one."""
    started = {}
    for hung in (0, 1):
        name = f"hung {hung}"
        faults = [
            {"place": "step", "nth": 3, "process": hung, "do": "wait"},
            {"place": "step", "nth": 3, "process": 1 - hung, "do": "KILL"},
        ]
        started[hung] = ground.start(name, 2, faults, **WORLDS[2], **{"output.save_steps": 1})
    for hung, processes in started.items():
        assert processes[1 - hung].wait() == -signal.SIGKILL
        assert processes[hung].wait(END_SECONDS) == 1
        found, sentence = status(ground.run_dir(f"hung {hung}")), f"process {1 - hung} on {HOST} died"
        assert (found["state"], found["checkpoint"], found["error"]) == ("failed", "checkpoints/step-2", sentence)
        assert processes[hung].output.count(sentence) == 1


def test_the_main_machine_is_reached_whatever_it_takes_its_own_name_for() -> None:
    """Debian's /etc/hosts calls a machine's own name 127.0.1.1: whoever listens there alone is deaf to the others."""
    with lifeline._listen(socket.gethostname()) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")
        for address in ("127.0.0.1", "127.0.1.1"):
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    with lifeline._listen("127.0.0.1") as server:
        assert server.getsockname()[0] == "127.0.0.1", "a run of one machine is nobody else's"


def test_a_process_that_stands_still_is_not_dead(ground: Playground, undisturbed: dict[int, Path]) -> None:
    name, faults = "asleep", [{"place": "step", "nth": 3, "process": 1, "do": "STOP"}]
    processes = ground.start(name, 2, faults, **WORLDS[2])
    asleep = psutil.Process(processes[1].pid)
    deadline = time.monotonic() + 60
    while asleep.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(3)
    assert all(child.is_alive() for child in processes) and status(ground.run_dir(name))["state"] == "running"
    processes[1].kill(signal.SIGCONT)
    assert [child.wait() for child in processes] == [0, 0]
    assert result(ground.run_dir(name)) == result(undisturbed[2])


def test_workers_end_soon_after_their_launcher_and_the_next_run_waits_for_them(
    ground: Playground, undisturbed: dict[int, Path]
) -> None:
    name, options = "orphans", {**WORLDS[2], "output.save_steps": 1}
    faults = [{"place": "step", "nth": 3, "process": None, "do": "wait"}]
    launcher, workers = ground.nursery.launcher("faults:trainer", 2, ground.call(name, 2, faults, **options))
    for process in (0, 1):
        ground.reported(name, f"step-3.{process}")
    launcher.kill()
    follower = ground.start(name, 2, **options)
    assert [worker.wait(END_SECONDS) for worker in workers] == [1, 1]
    said = re.findall("sora_llm: (the launcher of process . on .* died)", workers[0].output + workers[1].output)
    assert len(said) == 1 and HOST in said[0]
    assert [child.wait() for child in follower] == [0, 0], follower[0].output
    assert f"resuming from {ground.run_dir(name)}/checkpoints/step-2" in follower[0].output
    assert result(ground.run_dir(name)) == result(undisturbed[2])


def test_workers_that_were_asked_to_stop_do_so_without_their_launcher(ground: Playground) -> None:
    """A signal to all processes of a job before its time is up kills launchers at once: what is left saves."""
    name, faults = "stopping orphans", [{"place": "step", "nth": 3, "process": None, "do": "wait"}]
    launcher, workers = ground.nursery.launcher("faults:trainer", 2, ground.call(name, 2, faults, **WORLDS[2]))
    for process in (0, 1):
        ground.reported(name, f"step-3.{process}")
    for process in (launcher, *workers):
        process.kill(signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1
    time.sleep(LAUNCHER_GRACE_SECONDS + 1)
    ground.go(name)
    assert [worker.wait() for worker in workers] == [PREEMPTED] * 2
    assert status(ground.run_dir(name))["checkpoint"] == "checkpoints/step-3"


def test_a_signal_is_known_to_other_threads_while_the_main_one_is_busy(tmp_path: Path) -> None:
    """As in a long wait for a device: the main thread's handler has not run yet."""
    seen: dict[str, Any] = {}
    begin, end = threading.Lock(), threading.Lock()
    with begin, StopRequest(tmp_path) as stop:
        end.acquire()

        def ask() -> None:
            begin.acquire()
            seen["before"] = stop.is_asked()
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # not to the main one, whose wait it would end
            seen["asked"], seen["noted"] = stop.is_asked(), stop.reason(look_for_file=False)
            end.release()

        thread = threading.Thread(target=ask)
        thread.start()
        deque(map(partial.__call__, [partial(begin.release), partial(end.acquire)]))  # no handler runs between these
        thread.join()
        assert seen == {"before": False, "asked": True, "noted": None} and stop.reason(False) == "SIGTERM"


def test_a_launcher_that_dies_while_the_data_is_prepared_takes_its_workers_with_it(ground: Playground) -> None:
    name, faults = "orphans early", [{"place": "prepare", "process": None, "do": "wait"}]
    launcher, workers = ground.nursery.launcher("faults:trainer", 2, ground.call(name, 2, faults, **WORLDS[2]))
    for process in (0, 1):
        ground.reported(name, f"prepare-1.{process}")
    launcher.kill()
    assert [worker.wait(END_SECONDS) for worker in workers] == [1, 1]


def test_a_run_whose_output_nobody_reads_any_more_goes_on(ground: Playground, undisturbed: dict[int, Path]) -> None:
    """As behind `| head -1`, or a `tee` that died: hours of training are worth more than their log."""
    run_dir = ground.run_dir("unread")
    command = [*PLAIN, CONFIG, *overrides(ground.folder, run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    complaints = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Error" not in complaints, complaints
    assert result(run_dir) == result(undisturbed[1])


def test_a_run_outlives_the_shell_that_started_it(ground: Playground) -> None:
    name, faults = "nohup", [{"place": "step", "nth": 3, "do": "wait"}]
    shell, (trainer,) = ground.nursery.launcher("faults:trainer", 1, ground.call(name, 1, faults), marks=False)
    ground.reported(name, "step-3.0")
    shell.kill()
    time.sleep(2)
    assert trainer.is_alive()
    ground.go(name)
    assert trainer.wait() == 0 and status(ground.run_dir(name))["state"] == "finished"


def test_only_the_main_process_writes_into_the_run_directory(undisturbed: dict[int, Path]) -> None:
    written = [json.loads((undisturbed[2].parent / f"writes.{process}").read_text()) for process in (0, 1)]
    assert {Path(path).name for path in written[0]} >= {".lock", "metrics.jsonl", TENSORS, "certificate.json"}
    assert written[1] == []


# ----- real launchers -------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port"),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
}


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[str, dict[str, Any]], tuple[psutil.Popen, Path]]]:
    """Starts two trainers with a real launcher; gives it and the file of its output."""
    started = []

    def start(launcher: str, call: dict[str, Any]) -> tuple[psutil.Popen, Path]:
        output = tmp_path / f"output {len(started)}"
        command = [*LAUNCHERS[launcher], str(free_port()), str(TESTS / "faults.py"), json.dumps(call)]
        with output.open("w") as file:
            process = psutil.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)
        return process, output

    yield start
    for process in started:
        if process.is_running():
            for member in (*process.children(recursive=True), process):
                member.kill()


@pytest.mark.parametrize(
    ("stopped", "number", "killed"),
    [
        ("accelerate", signal.SIGTERM, "torchrun"),
        pytest.param("torchrun", signal.SIGINT, "accelerate", marks=pytest.mark.matrix),
    ],
)
def test_launchers_hand_signals_on_and_their_workers_do_not_outlive_them(
    ground: Playground, undisturbed: dict[int, Path], launch: Any, stopped: str, number: int, killed: str
) -> None:
    name, run_dir = f"{stopped} {killed}", ground.run_dir(f"{stopped} {killed}")
    faults = [{"place": "step", "nth": 3, "process": 1, "do": "until asked"}]
    launcher, output = launch(stopped, ground.call(name, 2, faults, **WORLDS[2]))
    ground.reported(name, "step-3.1")
    launcher.send_signal(number)
    assert launcher.wait(60) != 0
    found = status(run_dir)
    assert (found["state"], found["checkpoint"]) == ("preempted", "checkpoints/step-3"), output.read_text()
    assert checkpoints(run_dir) == ["step-3"]

    faults = [{"place": "step", "nth": 2, "process": None, "do": "wait"}]
    launcher, output = launch(killed, ground.call(name, 2, faults, **WORLDS[2], **{"output.save_steps": 1}))
    ground.reported(name, "step-2.0")
    ground.reported(name, "step-2.1")
    workers = launcher.children(recursive=True)
    launcher.kill()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=END_SECONDS)[1]
    found = status(run_dir)
    assert (found["state"], found["checkpoint"]) == ("failed", "checkpoints/step-4"), output.read_text()
    assert re.match(f"the launcher of process . on {HOST} died", found["error"])
    assert ground.codes(name, 2, **WORLDS[2]) == [0, 0]
    assert result(run_dir) == result(undisturbed[2])
