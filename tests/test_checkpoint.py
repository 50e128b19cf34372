"""What a checkpoint holds comes back bit for bit or is refused; the lock and the status tell the truth."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sora_llm import checkpoint
from sora_llm import files as file_functions
from sora_llm.errors import RunFailed, UserError
from sora_llm.running import run_state

TENSORS = {
    "a.lora_A": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.lora_B": torch.tensor([[float("inf"), -0.0, 1e-45]]),
    "a.gate": torch.tensor([1.0, 0.0, 0.5]),
    "a.lora_A.exp_avg": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).T,  # not contiguous
    "empty.lora_A": torch.zeros(0, 7),
    "half": torch.tensor([1.0, 1 / 3]).bfloat16(),
}
STATE = {"phase": "sparsify", "config": {"sora": {"r": 4}}, "tally": {"loss_sum": 0.1 + 0.2}, "text": "λ ≤ 1"}


def saved(tmp_path, step=7, keep=None, **options):
    folder = checkpoint.save(tmp_path, step, TENSORS, STATE, **options)
    checkpoint.drop_older(folder, keep)
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that −0 is not 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ----- round trip -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    folder = saved(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-7"
    assert checkpoint.read_state(folder) == {**STATE, "step": 7}
    read = checkpoint.read_tensors(folder)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor)), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path)
    folder = checkpoint.save(tmp_path, 7, {"x": torch.ones(2)}, {"phase": "dense"})
    assert checkpoint.read_state(folder) == {"phase": "dense", "step": 7}
    assert list(checkpoint.read_tensors(folder)) == ["x"]


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (2, 9, 10, 100):
        saved(tmp_path, step, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-10", "step-100"}


def test_everything_is_kept_without_a_limit(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


# ----- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["COMPLETE", "state.json", "adapter.safetensors"])
def test_truncated_grown_and_missing_files_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    content = (folder / name).read_bytes()
    grown = content + b"}"
    for damaged in (b"", content[: len(content) // 2], content[:-1], grown):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match="step-7"):
            checkpoint.read_state(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match="step-7"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"state.json": 1}', b"\xff\xfe"])
def test_a_complete_file_that_says_something_else_is_refused(tmp_path, content):
    folder = saved(tmp_path)
    (folder / "COMPLETE").write_bytes(content)
    with pytest.raises(UserError, match="step-7"):
        checkpoint.read_state(folder)


def test_files_of_another_checkpoint_are_refused(tmp_path):
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    shutil.copy(one / "state.json", two / "state.json")
    with pytest.raises(UserError, match=r"state\.json is not what was saved"):
        checkpoint.read_state(two)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])
    for step in (8, 9, 10, 11):
        saved(tmp_path, step)
    newest = tmp_path / "checkpoints"
    (newest / "step-11" / "COMPLETE").unlink()  # killed while it was written: no claim, no warning
    (newest / "step-10" / "state.json").write_text("{}")
    (newest / "step-9" / "adapter.safetensors").unlink()
    found, warnings = checkpoint.newest(tmp_path)
    assert found == newest / "step-8"
    assert len(warnings) == 2
    assert "step-10" in warnings[0] and "state.json" in warnings[0]
    assert "step-9" in warnings[1] and "adapter.safetensors" in warnings[1]


def test_strangers_among_the_checkpoints_do_no_harm(tmp_path):
    folder = saved(tmp_path)
    (tmp_path / "checkpoints" / ".step-9.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-9.tmp" / "COMPLETE").write_text("{}")
    copy = tmp_path / "checkpoints" / "step-7-copy"
    shutil.copytree(folder, copy)
    assert checkpoint.newest(tmp_path) == (folder, [])


# ----- failing disks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: no space")]
)
@pytest.mark.parametrize("step", [2, 1])
def test_a_full_disk_fails_the_run_and_leaves_older_checkpoints_whole(tmp_path, monkeypatch, failure, step):
    folder = saved(tmp_path, 1)
    before = files(tmp_path)

    def full(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match=f"step {step} could not be saved.*space.*earlier checkpoints are intact"):
        saved(tmp_path, step, keep=1)
    assert files(tmp_path) == before
    assert checkpoint.newest(tmp_path) == (folder, [])


@pytest.mark.parametrize("failing", ["write_text_atomically", "fsync", "file_sha256"])
def test_a_disk_that_fails_at_any_later_moment_does_no_more_harm(tmp_path, monkeypatch, failing):
    folder = saved(tmp_path, 1)
    before = files(tmp_path)
    real = getattr(checkpoint, failing)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(RunFailed, match="Input/output error"):
        saved(tmp_path, 2, keep=1)
    monkeypatch.setattr(checkpoint, failing, real)
    assert files(tmp_path) == before
    assert checkpoint.newest(tmp_path) == (folder, [])


def test_a_place_that_is_no_folder_is_a_failed_run(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunFailed, match="step 7 could not be saved"):
        saved(tmp_path)


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
