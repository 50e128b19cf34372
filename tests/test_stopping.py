"""A run can be stopped at any moment and goes on as if nothing had happened."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from nursery import Child
from small_runs import (
    DENSE_STEPS,
    END_SECONDS,
    EVAL_CALLS,
    EVALUATED_STEP,
    PREEMPTED,
    STEPS,
    WORLDS,
    Playground,
    checkpoints,
    result,
    status,
)
from spawn import launched

from sora_llm.data.pool import map_in_order
from sora_llm.errors import Preempted
from sora_llm.running import run_state
from sora_llm.running import stop as stop_module
from sora_llm.running.stop import LOOK_SECONDS, SIGNALS, STOP_GRACE_SECONDS, StopRequest

TENSORS = "adapter.safetensors"


def stop_request(
    run_dir: Path, others_wait: Callable[[], bool] = lambda: False, look_for_file: bool = True
) -> StopRequest:
    """That of a main process with nothing to write before it leaves."""
    return StopRequest(
        run_dir, is_main=True, others_wait=others_wait, look_for_file=look_for_file, leave=lambda request: None
    )


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


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_file_that_comes_too_late_is_gone_when_the_run_has_finished(ground: Playground, world: int) -> None:
    name, faults = f"asked too late {world}", [{"place": "publish", "do": "stop file"}]
    codes = ground.codes(name, world, faults=faults, **WORLDS[world])
    assert codes == [0] * world and status(ground.run_dir(name))["state"] == "finished"
    assert not (ground.run_dir(name) / "STOP").exists()
    assert ground.codes(name, world, **WORLDS[world]) == [0] * world, "the next launch is not stopped by it"


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
    assert alone.wait(STOP_GRACE_SECONDS + END_SECONDS) == PREEMPTED, alone.output
    if process == 0:
        assert (status(run_dir)["state"], status(run_dir)["checkpoint"]) == ("preempted", None)
        assert alone.output.count("stopped by SIGTERM: nothing to save") == 1


def test_a_process_whose_partner_is_gone_when_they_connect_says_so_in_a_sentence(ground: Playground) -> None:
    """One that was asked to stop while the group was formed leaves at once, too."""
    call = ground.call("gone", 2, [{"place": "connect", "do": "KILL"}], **WORLDS[2])
    main, other = (ground.nursery.start("faults:trainer", call, environ) for environ in launched(2))
    assert main.wait(END_SECONDS) == -signal.SIGKILL
    assert other.wait(END_SECONDS) == 1
    assert other.output.count("process 1 on") == 1 and "one of them has ended (see its output)" in other.output
    assert "Traceback" not in other.output


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
    with stop_request(tmp_path) as stop:
        stop.start()
        with pytest.raises(Preempted, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # what the first one has begun goes on
        assert stop.reason(look_for_file=False) == "SIGUSR1"
    with stop_request(tmp_path) as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Preempted, match="SIGINT"):
            stop.start()
    with stop_request(tmp_path, others_wait=lambda: True) as stop:
        stop.start()
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason(look_for_file=False) == "SIGTERM"
    with pytest.raises(Preempted, match="STOP"), stop_request(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        stop.start()
        time.sleep(30)
    with stop_request(tmp_path, look_for_file=False) as stop:
        stop.start()
        time.sleep(3 * LOOK_SECONDS)
        stop.at_once = False
        assert stop.reason(look_for_file=True) is None, "it is not this one's to obey"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_closed_terminal_stops_a_run_that_is_not_to_outlive_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_request(tmp_path) as stop:
            stop.start()
            with pytest.raises(Preempted, match="SIGHUP"):
                signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        with stop_request(tmp_path) as stop:
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
    monkeypatch.setattr(stop_module, "STOP_GRACE_SECONDS", 300.0)  # a slow machine must not end this process
    libc = ctypes.CDLL(None)  # its functions end at a signal, and run no handler
    ask = {"file": partial(os.mkdir, tmp_path / "STOP"), "SIGTERM": partial(libc.kill, os.getpid(), signal.SIGTERM)}
    busy = partial(libc.usleep, 900_000)
    started = time.monotonic()
    with (
        pytest.raises(Preempted, match="STOP" if request_comes == "file" else "SIGTERM"),
        stop_request(tmp_path) as stop,
    ):
        stop.start()
        deque(map(partial.__call__, [ask[request_comes], busy, partial(time.sleep, 60)]))
    assert time.monotonic() - started < 45


def test_a_signal_is_known_to_other_threads_while_the_main_one_is_busy(tmp_path: Path) -> None:
    """As in a long wait for a device: the main thread's handler has not run yet."""
    seen: dict[str, Any] = {}
    begin, end = threading.Lock(), threading.Lock()
    with begin, stop_request(tmp_path) as stop:
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


def test_only_the_main_process_writes_into_the_run_directory(undisturbed: dict[int, Path]) -> None:
    written = [json.loads((undisturbed[2].parent / f"writes.{process}").read_text()) for process in (0, 1)]
    assert {Path(path).name for path in written[0]} >= {".lock", "metrics.jsonl", TENSORS, "certificate.json"}
    assert written[1] == []


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
    workers = family(trainer)
    assert len(workers) == 2
    for process in workers:
        for number in SIGNALS:
            os.kill(process.pid, number)
    ground.go(name)
    assert trainer.wait() == 0, trainer.output


def test_a_signal_to_a_process_that_tokenises_is_not_taken_for_one_to_its_parent(tmp_path: Path) -> None:
    with stop_request(tmp_path) as stop:
        pids = map_in_order(_ask_to_stop, range(4), 2)
        assert os.getpid() not in set(pids) and not stop.is_asked()


def _ask_to_stop(_number: int) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return os.getpid()
