"""A death is told, by name, in seconds, whether of a process or of the launcher, and the next start resumes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import ROOT
from runs import ACCELERATE, PLAIN
from small_runs import (
    CONFIG,
    END_SECONDS,
    PREEMPTED,
    STEPS,
    WORLDS,
    Playground,
    checkpoints,
    overrides,
    result,
    status,
)
from spawn import TESTS, environment, free_port

from sora_llm import checkpoint
from sora_llm.config import load_config
from sora_llm.distributed import group
from sora_llm.errors import RunFailed
from sora_llm.running import liveness, run_state
from sora_llm.running.liveness import LAUNCHER_GRACE_SECONDS
from sora_llm.running.processes import process_group
from sora_llm.topology import World

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
    with liveness._listen(socket.gethostname()) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")
        for address in ("127.0.0.1", "127.0.1.1"):
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    with liveness._listen("127.0.0.1") as server:
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


@pytest.mark.parametrize("process_index", [0, 1, 2])
def test_a_process_that_dies_before_the_run_begins_is_named(process_index, tmp_path, monkeypatch, capsys):
    """By the next one where the main process dies, which speaks for all."""
    closed, dead = [], 1 if process_index == 0 else 0
    watch = SimpleNamespace(
        connect=lambda *_: None,
        close=lambda failure=None: closed.append(failure),
        wait_for_lost_process=lambda: f"process {dead} on vm died",
    )
    monkeypatch.setattr(group, "make_accelerator", lambda *_, **__: None)
    config, world = (
        load_config(CONFIG),
        World(num_processes=3, process_index=process_index, local_process_index=0),
    )
    with (
        pytest.raises(RunFailed, match=f"process {dead} on vm died; run the same command again"),
        process_group(config, "ddp", world, tmp_path, None, watch),
    ):
        raise RuntimeError("Connection closed by peer")
    assert len(closed) == 1 and ("process 0 on vm died" in capsys.readouterr().err) == (process_index == 1)


# ----- launchers ------------------------------------------------------------------------------------------------------


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
    time.sleep(LAUNCHER_GRACE_SECONDS + 1)
    assert trainer.is_alive()
    ground.go(name)
    assert trainer.wait() == 0 and status(ground.run_dir(name))["state"] == "finished"


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
