"""One writer for a folder of the cache, and hashes of files that are remembered."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sora_llm.data import cache
from sora_llm.data.cache import fill_once, remembered_sha256
from sora_llm.errors import RunFailed, UserError

FORK = multiprocessing.get_context("fork")


def start(function: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    """Run a function in a process of its own."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


def _refuse(*arguments: object, **options: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def _no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_the_slower_of_two_writers_without_locks_takes_what_the_faster_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks)

    def overtaken(temporary: Path) -> None:
        (temporary / "content").write_text("slow")
        fill_once(tmp_path / "key", lambda folder: (folder / "content").write_text("fast"))

    fill_once(tmp_path / "key", overtaken)
    assert (tmp_path / "key" / "content").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def _fill_slowly(folder: Path) -> None:
    (folder / "content").write_text("first")
    time.sleep(1)


def test_a_process_that_waits_first_lets_another_write_and_does_not_wait_for_what_is_there(tmp_path):
    first = start(lambda: time.sleep(0.5) or fill_once(tmp_path / "key", _fill_slowly))
    assert fill_once(tmp_path / "key", _refuse, wait_first=30.0)
    first.join(timeout=30)
    assert (tmp_path / "key" / "content").read_text() == "first"
    started = time.monotonic()
    assert fill_once(tmp_path / "key", _refuse, wait_first=30.0) and time.monotonic() - started < 5
    assert not fill_once(tmp_path / "other", lambda folder: None, wait_first=0.5), "nobody came: it writes"


def _fail_slowly(folder: Path) -> None:
    time.sleep(1)
    raise RunFailed("a process was killed")


def test_who_waits_fails_as_the_writer_does(tmp_path):
    first = start(fill_once, tmp_path / "key", _fail_slowly)
    until(lambda: (tmp_path / "key.lock").exists())
    with pytest.raises(RunFailed, match="a process was killed"):
        fill_once(tmp_path / "key", _refuse)
    first.join(timeout=30)


def test_others_may_read_what_one_has_written(tmp_path):
    fill_once(tmp_path / "key", lambda folder: None)
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "key").stat().st_mode == (tmp_path / "usual").stat().st_mode


def _interruptible(function, *arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
    return function(*arguments)


def test_who_waits_can_be_interrupted(tmp_path):
    with (tmp_path / "key.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = start(_interruptible, fill_once, tmp_path / "key", _refuse)
        time.sleep(0.5)
        assert waiting.is_alive()
        os.kill(waiting.pid, signal.SIGINT)
        waiting.join(timeout=10)
        assert waiting.exitcode == 1, "KeyboardInterrupt"


def test_who_waits_long_says_for_whom(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cache, "_SILENT_SECONDS", 0.2)
    first = start(fill_once, tmp_path / "key", _fill_slowly)
    until(lambda: (tmp_path / "key.lock").exists())
    fill_once(tmp_path / "key", _refuse)
    first.join(timeout=30)
    assert (
        capfd.readouterr().err
        == f"waiting for process {first.pid} on {socket.gethostname()}, which prepares the same data\n"
    )


def test_who_comes_when_the_writer_is_just_done_leaves_no_lock_behind(tmp_path, monkeypatch):
    """It saw no folder yet, and made the lock file anew that the writer had removed."""
    real = cache._try_lock

    def after_the_writer(file):
        (tmp_path / "key").mkdir()
        return real(file)

    monkeypatch.setattr(cache, "_try_lock", after_the_writer)
    assert fill_once(tmp_path / "key", lambda folder: pytest.fail("it was written again"))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing_but_the_note(tmp_path):
    def full(folder: Path) -> None:
        (folder / "tokens.bin").write_text("…")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        fill_once(tmp_path / "key", full)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert not fill_once(tmp_path / "key", lambda folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


# ----- hashes that are remembered -------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read to be hashed."""
    files = []
    sha256 = cache.file_sha256
    monkeypatch.setattr(cache, "file_sha256", lambda file: (files.append(file), sha256(file))[1])
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 4)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1)
    return files


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, hashed):
    file, memory = tmp_path / "a.jsonl", tmp_path / "cache" / "digests"
    file.write_text("content")
    first = remembered_sha256(file, memory)
    (tmp_path / "link").symlink_to(file)
    assert remembered_sha256(tmp_path / "link", memory) == first == remembered_sha256(file, memory)
    assert len(hashed) == 1
    written = file.stat()
    time.sleep(0.05)  # longer than a tick of the clock that file systems take their times from
    file.write_text("CONTENT")
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    second = remembered_sha256(file, memory)
    assert second != first and len(hashed) == 2, "the same size and a time that was set back: ctime tells"
    file.write_text("content")
    assert remembered_sha256(file, memory) == first
    assert len(list(memory.iterdir())) == 1, "one note for each file"


def test_a_file_that_may_still_be_written_is_not_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", 2)
    (tmp_path / "a").write_text("content")
    for count in (1, 2):
        remembered_sha256(tmp_path / "a", tmp_path / "digests")
        assert len(hashed) == count


def test_small_files_and_a_memory_that_cannot_be_written_are_no_trouble(tmp_path, hashed):
    (tmp_path / "small").write_text("abc")
    (tmp_path / "large").write_text("content")
    (tmp_path / "file").write_text("")
    for name in ("small", "large"):
        remembered_sha256(tmp_path / name, tmp_path / "file" / "digests")
    (tmp_path / "digests").mkdir()
    remembered_sha256(tmp_path / "small", tmp_path / "digests")
    assert len(hashed) == 3 and list((tmp_path / "digests").iterdir()) == []
