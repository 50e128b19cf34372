"""status.json, and the lock with which one process holds a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.errors import RunFailed, UserError
from sora_llm.files import make_folder, write_text_atomically

LOCK_WAIT_SECONDS = 60


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of status.json, None if there is none that can be read."""
    try:
        status = json.loads((run_dir / run_files.STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def write_status(
    run_dir: Path,
    state: str,
    *,
    step: int,
    phase: str,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Replace status.json (paths relative to the run directory); returns its content."""
    content = {
        "state": state,
        "step": step,
        "phase": phase,
        "checkpoint": None if checkpoint is None else str(checkpoint.relative_to(run_dir)),
        "adapter": None if adapter is None else str(adapter.relative_to(run_dir)),
        "error": error,
    }
    write_text_atomically(run_dir / run_files.STATUS, json.dumps(content, indent=1) + "\n")
    return content


class DirectoryInUse(UserError):
    """Another run, described by `holder`, holds the run directory."""

    def __init__(self, run_dir: Path, holder: str) -> None:
        super().__init__(
            f"output.output_dir {run_dir} is in use by {holder}; wait for it to end, or name another folder"
        )
        self.holder = holder

    def __reduce__(self) -> tuple[Any, ...]:
        return UserError, (str(self),)  # when it is sent to other processes


@dataclass(frozen=True)
class RunLock:
    """The lock of a run directory: its path, and the descriptor of the file as its holder opened it."""

    path: Path
    descriptor: int

    def is_held(self) -> bool:
        """Whether the file at that path is still the one that is held."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.descriptor))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # the last if another machine removed it
                return False
            raise

    def require_held(self) -> None:
        """RunFailed if the directory was moved, deleted or replaced: whatever has its name now is somebody else's."""
        if not self.is_held():
            raise RunFailed(
                f"{self.path} is no longer the file that this run locked: the directory was moved, deleted or "
                "replaced (or its lock removed) during the run, and whatever has that name now is left alone; run the "
                "same command again where its checkpoints are"
            )


@contextlib.contextmanager
def run_lock(run_dir: Path, wait_seconds: float | None = None) -> Iterator[RunLock]:
    """Hold the run directory for one process (the kernel releases it when that process ends, however it ends).

    `wait_seconds` defaults to LOCK_WAIT_SECONDS.

    Raises:
        DirectoryInUse: somebody else still holds it after `wait_seconds`.
        UserError: the directory cannot be written.
    """
    deadline = time.monotonic() + (LOCK_WAIT_SECONDS if wait_seconds is None else wait_seconds)
    path, is_new = run_dir / run_files.LOCK, not run_dir.exists()
    try:
        while True:
            try:
                make_folder(run_dir)
                file = path.open("a+b", buffering=0)  # unbuffered: closing it writes nothing
            except FileNotFoundError:
                continue  # its last holder, leaving no trace, was just removing it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (lock := RunLock(path, file.fileno())).is_held():
                    break  # otherwise its last holder removed the file that was waited for
            except BlockingIOError:
                if time.monotonic() > deadline:
                    with file:
                        file.seek(0)
                        holder = file.read().decode(errors="replace").strip() or "another run"
                    raise DirectoryInUse(run_dir, holder) from None
            file.close()
            time.sleep(0.2)
        file.seek(0)
        before, dated, stamp = file.read(), os.fstat(file.fileno()), _stamp(run_dir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise UserError(f"output.output_dir {run_dir} cannot be written or locked: {error.strerror}") from None
    with file:
        try:
            yield lock
        finally:
            with contextlib.suppress(OSError):  # a disk that is full, or gone
                is_begun = (run_dir / run_files.CONFIG).exists()
                if lock.is_held() and is_begun:
                    file.truncate(0)
                    if _stamp(run_dir) == stamp:  # nothing was written here: leave the file as it was found
                        file.write(before)
                        os.utime(file.fileno(), ns=(dated.st_atime_ns, dated.st_mtime_ns))
                elif lock.is_held():  # nothing was begun here: leave no trace
                    path.unlink(missing_ok=True)
                    if is_new:
                        run_dir.rmdir()


def lost_holder(run_dir: Path) -> str | None:
    """The "process PID" that held the run directory, if it ran on this machine and died silently; else None.

    For another machine's process the lock may be inconclusive: not every shared file system supports locks.
    """
    with contextlib.suppress(OSError), (run_dir / run_files.LOCK).open("rb") as file:
        holder, _, machine = file.read().decode(errors="replace").partition(" on ")
        if machine == socket.gethostname():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return holder
    return None


def _stamp(run_dir: Path) -> int | None:
    """When the last status was written (ns); None if there is none."""
    try:
        return (run_dir / run_files.STATUS).stat().st_mtime_ns
    except OSError:
        return None
