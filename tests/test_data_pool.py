"""Several processes that tokenise: the same result, in order, and no process is left behind."""

import multiprocessing
import os
import signal
import time

import pytest
from preparing import TEXTS, decoded, run, texts
from small_runs import END_SECONDS

from sora_llm.data import chunks, pool, prepare
from sora_llm.errors import RunFailed, UserError


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    monkeypatch.setattr(prepare, "_SERIAL_CHUNKS", 2)


def test_the_number_of_processes_changes_nothing(tmp_path, byte, small_chunks, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    spec = texts(tmp_path, *[{"text": str(i % 400)} if i % 9 else {"text": ""} for i in range(500)])
    found = {}
    for num_proc in (1, 2, 3):
        options = {"num_proc": num_proc, "cache_dir": tmp_path / str(num_proc), "drop_duplicates": True}
        dataset, report = run([spec], byte, max_bad_row_fraction=1.0, **options)
        found[num_proc] = decoded(dataset, byte), report
    assert found[1] == found[2] == found[3]
    assert found[1][1].num_bad_rows == 56 and found[1][1].duplicates > 50
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_the_processes_work_at_the_same_time_and_give_back_in_order():
    pids = []
    for value, pid in pool.map_in_order(_met_at_first, range(40), 3):
        assert value == len(pids)
        pids.append(pid)
    assert len(set(pids)) == 3 and os.getpid() not in pids


_all_three = multiprocessing.get_context("fork").Barrier(3)


def _met_at_first(value: int) -> tuple[int, int]:
    if value < 3:
        _all_three.wait(60)  # each in a process of its own, or never
    return value, os.getpid()


def test_few_items_are_under_way_at_any_time():
    taken = []
    results = pool.map_in_order(lambda value: value, (taken.append(i) or i for i in range(1000)), 2)
    for _ in range(10):
        next(results)
    assert len(taken) <= 10 + 2 * 2
    results.close()


def test_a_row_that_stops_the_run_ends_the_processes_as_well(tmp_path, byte, small_chunks, monkeypatch):
    spec = texts(tmp_path, *TEXTS * 10)
    monkeypatch.setattr(prepare._Tally, "add", _cannot_count)
    with pytest.raises(UserError, match="cannot count") as stopped:
        run([spec], byte, num_proc=2, cache_dir=tmp_path / "cache")
    assert stopped.tb is not None, "a caller who keeps the traceback keeps the generators"
    assert multiprocessing.active_children() == []


def _cannot_count(*arguments: object) -> None:
    raise UserError("cannot count")


def test_a_killed_process_ends_the_run_with_a_sentence(tmp_path, byte, small_chunks, monkeypatch):
    monkeypatch.setattr(pool, "_apply", _die)
    with pytest.raises(RunFailed, match=r"was killed.*data.num_proc=1"):
        run([texts(tmp_path, *TEXTS * 2)], byte, num_proc=2, cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def _die(item: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_of_which_one_process_is_killed_ends_within_seconds() -> None:
    """Its executor sends TERM to the others, and waits for them."""
    started = time.monotonic()
    with pytest.raises(RunFailed, match="killed"):
        list(pool.map_in_order(_die_at_three, range(20), 2))
    assert time.monotonic() - started < END_SECONDS


def _die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number
