"""The operators that torch compiles on the machine they run on, and the locks that such builds take."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sora_llm.errors import UserError
from sora_llm.files import caches

STALE_LOCK_SECONDS = 600
"""DeepSpeed's operator takes a minute; a lock that is older is of a build that was killed."""
OPERATOR = "deepspeed_shm_comm"  # of ZeRO on a CPU


def extensions_folder() -> Path:
    """Where torch builds such operators."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else caches() / "torch_extensions"


def locks(folder: Path, operator: str = "*") -> Iterator[tuple[Path, float]]:
    """The locks of builds in `folder` and how many seconds old each is; later builds wait for them without an end."""
    now = time.time()
    for lock in [*folder.glob(f"{operator}/lock"), *folder.glob(f"*/{operator}/lock")]:
        with contextlib.suppress(OSError):
            yield lock, now - lock.stat().st_mtime


def await_build(say: Callable[[str], None]) -> None:
    """Wait for a build of DeepSpeed's operator by somebody else, as torch would, but not for ever.

    Raises:
        UserError: that build was killed, and its lock is still there.
    """
    has_said = False
    while held := list(locks(extensions_folder(), OPERATOR)):
        lock, age = max(held, key=lambda each: each[1])
        if age > STALE_LOCK_SECONDS:
            raise UserError(
                f"{lock} is {age / 60:,.0f} minutes old, of a build that was killed, and DeepSpeed would wait for it "
                f"without an end: rm {lock}"
            )
        if not has_said:
            say(f"waiting for another build of DeepSpeed's operator; if there is none: rm {lock}")
            has_said = True
        time.sleep(0.5)
