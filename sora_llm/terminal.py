"""Terminal output: messages on separate lines, and one progress line that is overwritten."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO, TypeGuard

_open_on: TextIO | None = None
"""The stream with a progress line that waits to be overwritten: one per process, like its terminal."""


def escape_unencodable() -> None:
    """Escape characters that the terminal's encoding lacks (λ, →) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    """Whether a stream is a terminal; None is one that was closed before Python started."""
    return stream is not None and stream.isatty()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message, below an open progress line if there is one; without a reader it goes nowhere."""
    end_progress()
    _write(f"{text}\n", stream or sys.stdout)


def warn(text: str) -> None:
    """Print a warning on stderr, separate from a command's output."""
    say(f"warning: {text}", sys.stderr)


def print_error(text: str) -> None:
    """Print an error or a notice, prefixed with "sora_llm:", on stderr."""
    say(f"sora_llm: {text}", sys.stderr)


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 step", "2 steps", "2 processes"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def aligned(rows: Sequence[Sequence[str]], left: int, gap: str = "  ") -> list[str]:
    """Lines with columns of equal width: the first `left` of them flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return gap.join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in cells)

    return [line(row) for row in rows]


def print_result(text: str) -> bool:
    """Print a command's result, or on stderr why it cannot be printed; returns False only in the latter case, not if
    the reader has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        stop_printing(sys.stdout)
    except OSError as error:
        print_error(f"the result cannot be printed: {error.strerror}")
        stop_printing(sys.stdout)
        return False
    return True


def show_progress(text: str, stream: TextIO) -> None:
    """Replace the progress line, no wider than the terminal: of a line that wraps, only the last row would be
    overwritten."""
    global _open_on
    width = shutil.get_terminal_size().columns - 1
    _write(f"\r\033[K{text[:width]}", stream)
    _open_on = stream


def is_progress_open() -> bool:
    """Whether there is an open progress line, to which further output would be appended."""
    return _open_on is not None


def end_progress() -> None:
    """Leave the progress line as it is; further output goes below it."""
    global _open_on
    stream, _open_on = _open_on, None
    if stream is not None:
        _write("\n", stream)


def stop_printing(stream: TextIO) -> None:
    """Discard further output to `stream`; otherwise the interpreter reports the error again at exit."""
    with contextlib.suppress(OSError):  # a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(text: str, stream: TextIO | None) -> None:
    """Write and flush; a closed terminal or pipe, or a full disk, must not end the run."""
    if stream is None or stream.closed:
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        stop_printing(stream)
