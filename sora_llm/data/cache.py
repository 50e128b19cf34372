"""A folder that one of many processes fills (`fill_once`), and remembered hashes of files.

In the cache folder, next to the finished folders `<key>/`:

    <key>.lock                 held by the process that fills <key>/, then removed; names it, or says why it failed
    <key>.tmp-<host>-<random>  the folder being written
    digests/                   hashes of data files, see `remembered_sha256`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sora_llm.errors import RunFailed, UserError
from sora_llm.files import file_sha256, fsync, last_change, write_text_atomically
from sora_llm.terminal import say

_POLL_SECONDS = 0.1
_SILENT_SECONDS = 10  # a process that waits longer for the writer reports which one
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_ABANDONED_SECONDS = 3600  # another machine's temporary folder that has not grown for this long is abandoned
_REMEMBERED_BYTES = 8 << 20  # smaller files are hashed about as fast as they are looked up
_SETTLED_SECONDS = 2  # a file that changed more recently may change again within one tick of its time stamp

# ----- one writer -----------------------------------------------------------------------------------------------------


def fill_once(folder: Path, fill: Callable[[Path], None], wait_first: float = 0.0) -> bool:
    """Ensure that `folder` exists and is complete; returns whether it already did.

    However many processes and machines ask for the same folder at once, one of them calls `fill` with a temporary
    folder, which is then renamed; the others wait as long as it takes.  They wait for a lock on a file, which the
    kernel frees however the writer dies: the next one takes over.  If the writer fails, the waiting processes raise its
    error instead of failing one after the other.  On a file system without locks, every process fills a temporary
    folder, and the first to rename it wins.

    Args:
        wait_first: seconds for which this process lets others go first.

    Raises:
        UserError: the cache cannot be written.
        UserError, RunFailed: raised by `fill`, here or in the process that was waited for.
    """
    try:
        if folder.exists():
            return True
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _wait_or_write(folder, fill, wait_first)
    except OSError as error:
        raise _not_writable(folder.parent, error) from None


def _wait_or_write(folder: Path, fill: Callable[[Path], None], wait_first: float) -> bool:
    lock = folder.with_name(f"{folder.name}.lock")
    earlier_failure = _read_note(lock).get("failed")
    started = time.monotonic()
    silent = wait_first > 0  # one process per machine is enough to report the wait
    while not folder.exists():
        waited, note = time.monotonic() - started, _read_note(lock)
        if note.get("failed") not in (None, earlier_failure):
            raise (UserError if note["is_user_error"] else RunFailed)(note["message"])
        if waited >= wait_first:
            with lock.open("a+") as file:  # closing it frees the lock
                locked = _try_lock(file)
                if locked is not False and not folder.exists():
                    if locked:
                        _remove_leftovers(folder)
                    _write(folder, fill, file)
                    return False
                if locked:  # created again just now: the writer had finished and removed its own
                    lock.unlink(missing_ok=True)
        if waited >= _SILENT_SECONDS and not silent:
            silent = True
            say(f"waiting for {note.get('writer', 'another process')} to prepare the same data", sys.stderr)
        time.sleep(_POLL_SECONDS)
    return True


def _try_lock(file: IO[str]) -> bool | None:
    """Whether this process now holds the lock; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Path(file.name).stat().st_ino == os.fstat(file.fileno()).st_ino
    except (BlockingIOError, FileNotFoundError):  # the latter: its last holder had finished and removed it
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return None


def _write(folder: Path, fill: Callable[[Path], None], lock: IO[str]) -> None:
    writer = f"process {os.getpid()} on {socket.gethostname()}"
    _write_note(lock, writer=writer)
    temporary = folder.with_name(_temporary_prefix(folder) + uuid.uuid4().hex[:8])
    temporary.mkdir()  # (not tempfile's: other users, who may share the cache, could not access it)
    try:
        fill(temporary)
        for path in temporary.iterdir():
            fsync(path)
        _rename_unless_exists(temporary, folder)
        fsync(folder.parent)
    except (UserError, RunFailed, OSError) as error:
        failure = _not_writable(folder.parent, error) if isinstance(error, OSError) else error
        _write_note(
            lock,
            writer=writer,
            failed=f"{writer}, {time.time_ns()}",  # compared for identity, not as a time
            is_user_error=isinstance(failure, UserError),
            message=str(failure),
        )
        raise failure from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already gone if all went well
    Path(lock.name).unlink(missing_ok=True)


def _rename_unless_exists(temporary: Path, folder: Path) -> None:
    try:
        temporary.replace(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same content
            raise


def _temporary_prefix(folder: Path) -> str:
    return f"{folder.name}.tmp-{socket.gethostname()}-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left behind.  The lock's holder knows that no one else on this machine is writing; it
    cannot know this of other machines if a network file system's locks are local."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        is_ours = leftover.name.startswith(_temporary_prefix(folder))
        if is_ours or time.time() - last_change(leftover) > _ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _read_note(lock: Path) -> dict[str, Any]:
    """The writer's note about itself in its lock file; {} if there is none (yet)."""
    try:
        note = json.loads(lock.read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_note(lock: IO[str], **note: Any) -> None:
    with contextlib.suppress(OSError):  # on a full disk the others find out for themselves
        lock.seek(0)
        lock.truncate()
        lock.write(json.dumps(note))
        lock.flush()


def _not_writable(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"the data cache {cache} cannot be written ({error.strerror or error}): set data.cache_dir to a folder with "
        "space"
    )


# ----- hashes of files ------------------------------------------------------------------------------------------------


def remembered_sha256(file: Path, memory: Path) -> str:
    """Hex SHA-256 of a file's bytes, remembered in the folder `memory` so that a hundred gigabytes are read only once.

    The memory is keyed by the file's real path, size and times of last change (mtime, and ctime, which cannot be set
    back): only a change of the content that leaves all of these unchanged goes unnoticed.

    Raises:
        OSError: the file cannot be read; a memory that cannot be written is ignored.
    """
    before = file.stat()
    if before.st_size < _REMEMBERED_BYTES:
        return file_sha256(file)
    path = str(file.resolve())
    identity = [path, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
    note = memory / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == identity:
            return str(known["sha256"])
    digest = file_sha256(file)
    after = file.stat()
    is_settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED_SECONDS
    if is_settled and identity == [path, after.st_size, after.st_mtime_ns, after.st_ctime_ns]:
        with contextlib.suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_text_atomically(note, json.dumps({"file": identity, "sha256": digest}))
    return digest
