"""Writing files and folders atomically: complete, or absent."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from sora_llm.errors import UserError

_NO_FSYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot do it, or that do not let us read the folder."""

_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors for a path that belongs to another user, or is invalid."""

_ATTEMPTS = 20
_OWN_TOKENS: set[str] = set()
"""Tokens in the names of this process's staging folders."""
_ABANDONED_SECONDS = 24 * 3600


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` so that a reader sees the old or the new content, never a partial one, even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(path)
    except OSError:  # a full disk needs the space
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def publish(temporary: Path, folder: Path) -> None:
    """Put a complete folder in its place, or in the one that a link of that name leads to; an older one is moved aside
    first and deleted last.  Folders that a killed process left aside are deleted too.  If several processes do so at
    once, the last one's stays.  Files get the folder's permissions: safetensors makes its own readable only by their
    owner."""
    folder = folder.resolve()
    mode = temporary.stat().st_mode & 0o666
    for path in (*temporary.iterdir(), temporary):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(PermissionError):  # on file systems without modes
                path.chmod(mode)
        fsync(path)
    for attempt in range(_ATTEMPTS):
        old = folder.with_name(f".{folder.name}.old.{os.getpid()}.{attempt}")
        if folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has just moved it
                folder.rename(old)
        try:
            temporary.rename(folder)
            break
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and attempt + 1 < _ATTEMPTS:
                continue  # another process has just put its own there
            if old.exists():
                old.rename(folder)
            raise
    fsync(folder.parent)
    for replaced in folder.parent.glob(f".{glob.escape(folder.name)}.old.*"):
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, to fill and publish; not yet created, and removed at the end."""
    temporary = staging_folder(folder)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def staging_folder(folder: Path) -> Path:
    """`staging` for callers that remove the folder themselves.  Each process has its own; those left by killed
    processes are removed."""
    folder = folder.resolve()  # as `publish` does: a link may lead to another disk
    remove_abandoned(folder.parent, folder.name)
    token = secrets.token_hex(4)
    _OWN_TOKENS.add(token)
    return folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}-{token}.tmp")


def remove_abandoned(place: Path, name: str = "*") -> None:
    """Remove abandoned staging folders in `place`, for all folders or the one called `name`: those whose process on
    this machine is gone, and any untouched for a day."""
    pattern = name if name == "*" else glob.escape(name)
    for leftover in place.glob(f".{pattern}.*-*-*.tmp"):
        if not leftover.is_dir():
            continue
        machine, process, token = leftover.name.removesuffix(".tmp").rsplit("-", 2)
        is_ours = machine.endswith(f".{socket.gethostname()}") and process.isdecimal()
        with contextlib.suppress(PermissionError):  # another user's
            is_gone = is_ours and not _lives(leftover, int(process), token)
            if is_gone or time.time() - last_change(leftover) > _ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _lives(folder: Path, process: int, token: str) -> bool:
    """Whether the process that made the folder lives.  In a restarted container the next process often has the same
    number and host name; a concurrent one that shares them may have begun later than this process."""
    if process != os.getpid() or token in _OWN_TOKENS:
        return psutil.pid_exists(process)
    return last_change(folder) >= psutil.Process().create_time()


def last_change(folder: Path) -> float:
    """The time of the last change in a folder, as in `time.time`; now, if it is gone."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:  # it was renamed or removed just now
        return time.time()


def copy_folder(source: Path, folder: Path) -> None:
    """Put a copy of a complete folder in its place."""
    with staging(folder) as temporary:
        shutil.copytree(source, temporary)
        publish(temporary, folder)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents so that they survive a crash."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FSYNC_OF_FOLDERS):
            raise


@contextlib.contextmanager
def path_errors_as_user_errors() -> Iterator[None]:
    """Turn file system errors about unreachable paths in the block into UserErrors."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OUT_OF_REACH or error.filename is None:
            raise
        raise UserError(
            f"{error.filename} cannot be used: {error.strerror}; change its permissions, or name another path"
        ) from error


def user_path(text: str, key: str) -> Path:
    """A path from the config with ~ expanded; UserError for a home that does not exist or an invalid path."""
    if "\0" in text:
        raise UserError(f"{key} is {text!r}; a path cannot contain a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} is {text!r}: {error}") from None


def expand_home(text: str) -> str:
    """A path with its ~ expanded, or unchanged if nobody here has that home, as in another user's run."""
    return os.path.expanduser(text)  # noqa: PTH111 - pathlib raises for such a home


def cache_home() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache if it is not set: the folder for all programs' caches; UserError without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError("this user has no home folder for caches; set HOME or XDG_CACHE_HOME") from None


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest existing parent."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())
