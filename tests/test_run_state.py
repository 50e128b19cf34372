"""The status and the lock of a run directory tell the truth, whoever is killed."""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from sora_llm import files as file_functions
from sora_llm.errors import UserError
from sora_llm.running import run_state

# ----- status ---------------------------------------------------------------------------------------------------------


def test_status_is_what_was_written_with_relative_paths(tmp_path):
    assert run_state.read_status(tmp_path) is None
    content = run_state.write_status(
        tmp_path, "preempted", step=3, phase="dense", checkpoint=tmp_path / "checkpoints" / "step-3", error=None
    )
    assert content == {
        "state": "preempted",
        "step": 3,
        "phase": "dense",
        "checkpoint": "checkpoints/step-3",
        "adapter": None,
        "error": None,
    }
    assert run_state.read_status(tmp_path) == content == json.loads((tmp_path / "status.json").read_text())
    for damaged in ('{"state": "run', "[]", "null"):
        (tmp_path / "status.json").write_text(damaged)
        assert run_state.read_status(tmp_path) is None


def test_a_write_that_fails_half_way_leaves_the_old_status(tmp_path, monkeypatch):
    run_state.write_status(tmp_path, "running", step=1, phase="dense")

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_functions, "fsync", fail)
    with pytest.raises(OSError):
        run_state.write_status(tmp_path, "finished", step=2, phase="done")
    assert run_state.read_status(tmp_path)["state"] == "running"


def test_a_reader_never_sees_half_a_status(tmp_path):
    """A second process rewrites the file as fast as it can while this one reads."""
    run_state.write_status(tmp_path, "running", step=0, phase="dense")
    context = multiprocessing.get_context("fork")
    enough = context.Event()
    writer = context.Process(target=_write_statuses, args=(tmp_path, enough), daemon=True)
    writer.start()
    seen = set()
    while writer.is_alive():
        status = json.loads((tmp_path / "status.json").read_text())
        assert len(status["error"] or "") in (0, 20_000)
        seen.add(status["step"])
        if len(seen) > 20:
            enough.set()
    writer.join()
    assert writer.exitcode == 0 and len(seen) > 20


def _write_statuses(run_dir, enough):
    for step in itertools.takewhile(lambda _: not enough.is_set(), itertools.count(1)):
        run_state.write_status(run_dir, "running", step=step, phase="dense", error="x" * 20_000)


# ----- lock -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_lock, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    if process.is_alive():
        process.kill()
    process.join()


def _hold_lock(run_dir, ready):
    with run_state.run_lock(run_dir):
        ready.set()
        time.sleep(120)


def test_a_second_run_waits_and_then_names_the_holder(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(UserError) as raised, run_state.run_lock(tmp_path, wait_seconds=1):
        pass
    assert time.monotonic() - start >= 1
    assert f"process {holder.pid} on {socket.gethostname()}" in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_the_lock_of_a_killed_holder_is_free(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    with run_state.run_lock(tmp_path, wait_seconds=10):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_run_that_was_begun_keeps_its_lock_file_as_it_was(tmp_path):
    """Who only looks in, and refuses to go on, leaves the directory as it was found."""
    (tmp_path / "config.yaml").write_text("")
    lock = tmp_path / ".lock"
    lock.write_text("process 7 on elsewhere")
    os.utime(lock, (1, 1))
    with run_state.run_lock(tmp_path):
        assert lock.read_text() != "process 7 on elsewhere"
    assert (lock.read_text(), lock.stat().st_mtime) == ("process 7 on elsewhere", 1)
    with run_state.run_lock(tmp_path):
        run_state.write_status(tmp_path, "finished", step=1, phase="done")
    assert lock.read_text() == "", "one that went on leaves nobody's name"


def test_the_lock_is_released_at_the_end_and_after_an_error_and_makes_the_folder(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with pytest.raises(KeyError), run_state.run_lock(run_dir):
        raise KeyError
    with run_state.run_lock(run_dir, wait_seconds=0):
        pass


def test_a_run_directory_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_state.run_lock(tmp_path / "file" / "run"):
        pass
