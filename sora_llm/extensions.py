"""Operators that torch compiles at run time, the tools for it, and the lock files of such builds."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sora_llm.errors import UserError
from sora_llm.files import cache_home

STALE_LOCK_SECONDS = 1800
"""An older lock was left by a killed build."""
NOT_BUILT = "DeepSpeed's operator for ZeRO on a CPU could not be compiled"
"""The beginning of the message when that build fails."""
OPERATOR, OPERATOR_SECONDS = "deepspeed_shm_comm", 600  # for ZeRO on a CPU; takes a minute to compile


COMPILER, NINJA, HEADERS = "a C++ compiler", "ninja", "Python's headers"
_REMEDIES = {COMPILER: "apt install g++", NINJA: "pip install ninja", HEADERS: "apt install python3-dev"}


def missing_tools(*names: str) -> dict[str, str]:
    """{tool: how to install it} of those `names`, of the three above, that this machine lacks."""
    # PATH as if the environment of this Python were activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = {
        COMPILER: shutil.which((os.environ.get("CXX") or "g++").split()[0], path=path) is not None,  # which torch takes
        NINJA: shutil.which("ninja", path=path) is not None,
        HEADERS: Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    }
    return {name: _REMEDIES[name] for name in names if not found[name]}


def extensions_folder() -> Path:
    """Where torch builds such operators."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else cache_home() / "torch_extensions"


def locks_by_existence() -> bool:
    """Whether this torch considers a lock held as long as its file exists; from 2.15 on, the kernel holds it while the
    process lives, and the file stays."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


def locks(folder: Path) -> Iterator[tuple[Path, float]]:
    """The locks of builds in `folder` and the age of each in seconds; later builds wait for them forever."""
    for lock in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
        if (age := _age(lock)) is not None:
            yield lock, age


def _age(lock: Path) -> float | None:
    """The age of a lock in seconds; None if it is gone."""
    with contextlib.suppress(OSError):
        return time.time() - lock.stat().st_mtime
    return None


def operator_lock() -> Path:
    """The lock of DeepSpeed's operator for this Python and torch."""
    import torch
    from torch.utils import cpp_extension

    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return extensions_folder() / OPERATOR / "lock"
    cuda = torch.version.cuda
    runs_on = "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root(), f"{python}_{runs_on}", OPERATOR, "lock")


def await_build(say: Callable[[str], None]) -> None:
    """Wait for another process's build of DeepSpeed's operator, as torch would, but not forever.

    Raises:
        UserError: that build was killed, and its lock is still there.
    """
    if not locks_by_existence():
        return
    has_said, lock = False, operator_lock()
    while (age := _age(lock)) is not None:
        if age > OPERATOR_SECONDS:
            raise UserError(
                f"{lock} is {age / 60:,.0f} minutes old, left by a killed build, and DeepSpeed would wait for it "
                f"forever: rm {lock}"
            )
        if not has_said and age > 60:  # younger ones usually belong to another process of this run
            say(f"waiting for a build of DeepSpeed's operator by another process; if there is none: rm {lock}")
            has_said = True
        time.sleep(0.5)
