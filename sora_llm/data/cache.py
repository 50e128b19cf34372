"""A folder that one of many processes fills (`fill_once`), and hashes of files that are remembered.

In the cache folder, beside the finished folders `<key>/`:

    <key>.lock                 held by who fills <key>/; gone once that is done.  Says who it is, or why it failed
    <key>.tmp-<host>-<random>  what is being written
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

_POLL_SECONDS = 0.1
_SILENT_SECONDS = 10  # a process that waits longer for the writer says for whom
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_ABANDONED_SECONDS = 3600  # another machine's temporary folder that has not grown for so long is nobody's
_REMEMBERED_BYTES = 8 << 20  # smaller files are hashed about as fast as they are looked up
_SETTLED_SECONDS = 2  # a file that changed less long ago may change again within one tick of its time stamp

# ----- one writer -----------------------------------------------------------------------------------------------------


def fill_once(folder: Path, fill: Callable[[Path], None], wait_first: float = 0.0) -> bool:
    """See to it that `folder` is there and complete; returns whether it was before.

    However many processes and machines ask for the same folder at once, one of them calls `fill` with a temporary
    folder, which is then renamed; the others wait as long as it takes.  They wait for a lock on a file, which the
    kernel frees when the writer dies, however it dies: the next one takes over.  Where the writer fails, those who
    waited for it raise its error instead of failing one after the other.  On a file system without locks everybody
    fills a temporary folder, and the first to rename it wins.

    Args:
        wait_first: seconds for which this process lets others go first.

    Raises:
        UserError: the cache cannot be written.
        UserError, RunFailed: what `fill` has raised, here or in the process that was waited for.
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
    silent = wait_first > 0  # of several processes on a machine, one is enough to say what is waited for
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
                if locked:  # made anew just now: the writer was done, and had removed its own
                    lock.unlink(missing_ok=True)
        if waited >= _SILENT_SECONDS and not silent:
            silent = True
            print(f"waiting for {note.get('writer', 'another process')} to prepare the same data", file=sys.stderr)
        time.sleep(_POLL_SECONDS)
    return True


def _try_lock(file: IO[str]) -> bool | None:
    """Whether this process holds the lock now; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Path(file.name).stat().st_ino == os.fstat(file.fileno()).st_ino
    except (BlockingIOError, FileNotFoundError):  # the latter: its last holder was done and removed it
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return None


def _write(folder: Path, fill: Callable[[Path], None], lock: IO[str]) -> None:
    writer = f"process {os.getpid()} on {socket.gethostname()}"
    _write_note(lock, writer=writer)
    temporary = folder.with_name(_temporary_prefix(folder) + uuid.uuid4().hex[:8])
    temporary.mkdir()  # (not tempfile's: that would be closed to others, who may share the cache)
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
            failed=f"{writer}, {time.time_ns()}",  # compared for being another one, not as a time
            is_user_error=isinstance(failure, UserError),
            message=str(failure),
        )
        raise failure from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone by then if all went well
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
    """What killed writers have left behind.  Who holds the lock knows that nobody on this machine writes; of other
    machines it does not, where locks of a network file system are local."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        is_ours = leftover.name.startswith(_temporary_prefix(folder))
        if is_ours or time.time() - last_change(leftover) > _ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _read_note(lock: Path) -> dict[str, Any]:
    """What the writer says of itself in its lock file; {} where it says nothing (yet)."""
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
    """Hex SHA-256 of a file's bytes, remembered in the folder `memory`, so that a hundred gigabytes are read once.

    The memory goes by the file's real path, size, and times of its last change (mtime, and ctime, which nobody can
    set back): a change of the content that leaves all of them as they were is the one thing not seen.

    Raises:
        OSError: the file cannot be read; a memory that cannot be written is done without.
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
