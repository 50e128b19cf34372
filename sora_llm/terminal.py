"""What is said on a terminal: messages on lines of their own, and one line of progress that is overwritten."""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import TextIO

_open_on: TextIO | None = None
"""Where a line of progress waits to be overwritten: of the process, as its terminal is."""


def take_any_text() -> None:
    """Show what the encoding of the terminal lacks (λ, →) as an escape: it is no reason for a command to end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message, below a line of progress that is there."""
    end_progress()
    print(text, file=stream or sys.stdout, flush=True)


def show_progress(text: str, stream: TextIO) -> None:
    """Put a line of progress in the place of the last one, no wider than the terminal: of a line that wraps only the
    last row would be overwritten."""
    global _open_on
    width = shutil.get_terminal_size().columns - 1
    stream.write(f"\r\033[K{text[:width]}")
    stream.flush()
    _open_on = stream


def is_progress_open() -> bool:
    """Whether a line of progress is there that what comes next would be glued to."""
    return _open_on is not None


def end_progress() -> None:
    """Leave the line of progress as it is; what comes next is below it."""
    global _open_on
    stream, _open_on = _open_on, None
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone; the message may go elsewhere
            stream.write("\n")
            stream.flush()
