"""A build of DeepSpeed's operator that somebody else has begun is waited for, and one that was killed is not."""

import os
import threading
import time
from pathlib import Path

import pytest

from sora_llm.errors import UserError
from sora_llm.extensions import STALE_LOCK_SECONDS, await_build


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    return lock


def test_without_a_lock_nothing_is_said(lock: Path) -> None:
    said: list[str] = []
    await_build(said.append)
    assert not said


def test_a_build_that_goes_on_is_waited_for_and_named_once(lock: Path) -> None:
    lock.touch()
    said: list[str] = []
    ending = threading.Timer(1.2, lock.unlink)
    ending.start()
    began = time.monotonic()
    await_build(said.append)
    ending.join()
    assert time.monotonic() - began > 1 and len(said) == 1 and str(lock) in said[0]


def test_one_that_was_killed_is_a_sentence_with_its_remedy(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - STALE_LOCK_SECONDS - 60,) * 2)
    with pytest.raises(UserError, match=f"rm {lock}$"):
        await_build(lambda _: None)
