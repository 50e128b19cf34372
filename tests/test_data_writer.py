"""One writer for a folder of the cache: of several processes one prepares, the others wait and read."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from conversations import byte_tokenizer
from preparing import TEXTS, decoded, refuse, run, texts
from preparing import fills as fills
from preparing import prepared as prepared

from sora_llm.data import cache, chunks, prepare
from sora_llm.data.cache import fill_once
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.sources import DatasetSpec
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


def until_written(lock: Path) -> None:
    """Wait for its holder to have named itself in it: the file alone may be there before it is locked."""
    until(lambda: lock.exists() and lock.read_text())


@pytest.fixture
def waiting(monkeypatch, tmp_path) -> Callable[[], int]:
    """How many processes have found that another one writes; those started are forks, which know it, too."""
    pids, try_lock = tmp_path / "waiting", cache._try_lock

    def told(file: IO[str]) -> bool | None:
        is_locked = try_lock(file)
        if is_locked is False:
            with pids.open("a") as lines:
                lines.write(f"{os.getpid()}\n")
        return is_locked

    monkeypatch.setattr(cache, "_try_lock", told)
    return lambda: len(set(pids.read_text().splitlines())) if pids.exists() else 0


def _prepare_and_tell(folder: Path, barrier, results) -> None:
    barrier.wait(timeout=60)
    spec = DatasetSpec(str(folder / "a.jsonl"), "completion")
    try:
        dataset, report = run([spec], byte_tokenizer(), cache_dir=folder / "cache", num_proc=1)
        results.put((decoded(dataset, byte_tokenizer()), report.to_json() | {"from_cache": None}))
    except UserError as error:
        results.put(str(error))


def together(count: int, folder: Path) -> list:
    """What so many processes get that prepare a.jsonl of a folder at once."""
    barrier, results = FORK.Barrier(count), FORK.Queue()
    processes = [start(_prepare_and_tell, folder, barrier, results) for _ in range(count)]
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found


def entries(folder: Path) -> list[str]:
    """What is in a cache folder, finished folders as "done"."""
    return sorted("done" if path.is_dir() and len(path.name) == 32 else path.name for path in folder.iterdir())


def _no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


# ----- several preparations -------------------------------------------------------------------------------------------


def test_of_eight_processes_one_writes_and_all_read_the_same(tmp_path, fills):
    texts(tmp_path, *TEXTS * 20)
    results = together(8, tmp_path)
    assert len(fills) == 1
    assert all(result == results[0] and len(result[0]) == 200 for result in results)
    assert entries(tmp_path / "cache") == ["done"]


def test_an_error_of_the_writer_is_that_of_all_who_waited_and_is_not_run_into_again(
    tmp_path, fills, waiting, monkeypatch
):
    """Each of eight processes would read a hundred gigabytes up to the line that is no csv."""
    texts(tmp_path, *TEXTS)
    counted = prepare._fill

    def awaited(*arguments: object) -> None:
        until(lambda: waiting() == 3)
        counted(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_fill", awaited)
    monkeypatch.setattr(prepare, "_tokenized", _cannot_read)
    assert together(4, tmp_path) == ["a.csv:7 is not valid csv"] * 4
    assert len(fills) == 1
    assert together(1, tmp_path) == ["a.csv:7 is not valid csv"] and len(fills) == 2, "a later run tries again"


def _cannot_read(*arguments: object):
    raise UserError("a.csv:7 is not valid csv")
    yield


def _write_for_ever(folder: Path, num_proc: int) -> None:
    tokenize = Tokenizing.tokenize

    def stuck(self, chunk):
        if "last" in chunk[1][-1][1]["text"]:
            time.sleep(1000)
        return tokenize(self, chunk)

    Tokenizing.tokenize = stuck
    spec = DatasetSpec(str(folder / "a.jsonl"), "completion")
    run([spec], byte_tokenizer(), cache_dir=folder / "cache", num_proc=num_proc)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_where_the_writer_is_killed_midway_the_next_takes_over_and_cleans_up(
    tmp_path, byte, fills, waiting, monkeypatch, num_proc
):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)
    spec = texts(tmp_path, *TEXTS * 20, {"text": "last"})
    cache_dir = tmp_path / "cache"
    writer = start(_write_for_ever, tmp_path, num_proc)
    until(lambda: list(cache_dir.glob("*.tmp-*/tokens.bin")))
    barrier, results = FORK.Barrier(2), FORK.Queue()
    others = [start(_prepare_and_tell, tmp_path, barrier, results) for _ in range(2)]
    until(lambda: waiting() == 2)
    assert results.empty() and len(fills) == 1, "they wait"
    os.kill(writer.pid, signal.SIGKILL)
    rows = [results.get(timeout=30)[0] for _ in others]
    assert rows[0] == rows[1] and len(rows[0]) == 201
    assert len(fills) == 2 and entries(cache_dir) == ["done"]
    for process in (writer, *others):
        process.join(timeout=30)
    assert len(run([spec], byte, cache_dir=cache_dir)[0]) == 201


def test_what_another_machine_writes_is_left_alone_until_it_is_abandoned(prepared, tmp_path):
    """Where locks of a network file system are local, a lock says nothing about other machines."""
    _, report = prepared(*TEXTS)
    folder = Path(report.cache_folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    names = [f"{folder.name}.tmp-{host}-x" for host in (socket.gethostname(), "new", "old")]
    for name in names:
        (folder.parent / name).mkdir()
        (folder.parent / name / "tokens.bin").write_text("…")
    for path in (folder.parent / names[2] / "tokens.bin", folder.parent / names[2]):
        os.utime(path, (0, 0))
    prepared(*TEXTS)
    assert entries(tmp_path / "cache") == sorted(["done", names[1]])


def test_without_locks_everybody_writes_and_the_first_wins(tmp_path, fills, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    texts(tmp_path, *TEXTS * 20)
    results = together(4, tmp_path)
    assert 1 <= len(fills) <= 4
    assert all(result == results[0] and len(result[0]) == 200 for result in results)
    assert entries(tmp_path / "cache") == ["done"]


# ----- a folder that is filled once -----------------------------------------------------------------------------------


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
    assert fill_once(tmp_path / "key", refuse, wait_first=30.0)
    first.join(timeout=30)
    assert (tmp_path / "key" / "content").read_text() == "first"
    started = time.monotonic()
    assert fill_once(tmp_path / "key", refuse, wait_first=30.0) and time.monotonic() - started < 5
    assert not fill_once(tmp_path / "other", lambda folder: None, wait_first=0.5), "nobody came: it writes"


def test_who_waits_fails_as_the_writer_does(tmp_path, waiting):
    def fail(folder: Path) -> None:
        until(waiting)
        raise RunFailed("a process was killed")

    first = start(fill_once, tmp_path / "key", fail)
    until_written(tmp_path / "key.lock")
    with pytest.raises(RunFailed, match="a process was killed"):
        fill_once(tmp_path / "key", refuse)
    first.join(timeout=30)


def test_others_may_read_what_one_has_written(tmp_path):
    fill_once(tmp_path / "key", lambda folder: None)
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "key").stat().st_mode == (tmp_path / "usual").stat().st_mode


def _interruptible(function, *arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
    return function(*arguments)


def test_who_waits_can_be_interrupted(tmp_path, waiting):
    with (tmp_path / "key.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = start(_interruptible, fill_once, tmp_path / "key", refuse)
        until(waiting)
        os.kill(other.pid, signal.SIGINT)
        other.join(timeout=30)
        assert other.exitcode == 1, "KeyboardInterrupt"


def test_who_waits_long_says_for_whom(tmp_path, waiting, monkeypatch, capfd):
    monkeypatch.setattr(cache, "_SILENT_SECONDS", 0.0)
    first = start(fill_once, tmp_path / "key", lambda folder: until(waiting))
    until_written(tmp_path / "key.lock")
    fill_once(tmp_path / "key", refuse)
    first.join(timeout=30)
    assert (
        capfd.readouterr().err
        == f"waiting for process {first.pid} on {socket.gethostname()} to prepare the same data\n"
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
