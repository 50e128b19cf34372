"""A build of DeepSpeed's operator that somebody else has begun is waited for, and one that was killed is not."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sora_llm import extensions
from sora_llm.errors import UserError
from sora_llm.extensions import OPERATOR_SECONDS, await_build, operator_lock


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setattr(extensions, "locks_by_existence", lambda: True)
    return lock


@pytest.mark.parametrize("own", [True, False])
def test_the_lock_that_is_looked_at_is_the_one_that_torch_would_wait_for(tmp_path, monkeypatch, own: bool) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if not own:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    assert operator_lock().parent == Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False))


def test_without_a_lock_nothing_is_said(lock: Path) -> None:
    said: list[str] = []
    await_build(said.append)
    assert not said


def test_a_build_that_goes_on_is_waited_for_and_named_once(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 61,) * 2)  # a younger one is as a rule of another process of this run
    said: list[str] = []
    ending = threading.Timer(1.2, lock.unlink)
    began = time.monotonic()
    ending.start()
    await_build(said.append)
    ending.join()
    assert time.monotonic() - began > 1 and len(said) == 1 and str(lock) in said[0]


def test_one_that_was_killed_is_a_sentence_with_its_remedy(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - OPERATOR_SECONDS - 60,) * 2)
    with pytest.raises(UserError, match=f"rm {lock}$"):
        await_build(lambda _: None)


def test_where_the_kernel_holds_the_lock_its_file_says_nothing(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    os.utime(lock, (time.time() - OPERATOR_SECONDS - 60,) * 2)
    monkeypatch.setattr(extensions, "locks_by_existence", lambda: False)
    await_build(lambda _: None)


def test_what_torch_does_with_the_file_is_known() -> None:
    """By its release, so that another change of it is noticed."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert extensions.locks_by_existence() is (release < (2, 15))
