"""What is said on a terminal: messages on lines of their own, and one line of progress that is overwritten."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from importlib import import_module
from typing import TextIO, TypeGuard

_open_on: TextIO | None = None
"""Where a line of progress waits to be overwritten: of the process, as its terminal is."""


def take_any_text() -> None:
    """Show what the encoding of the terminal lacks (λ, →) as an escape: it is no reason for a command to end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    """Whether a person looks at a stream; None is one that was closed before Python began."""
    return stream is not None and stream.isatty()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message, below a line of progress that is there; without a reader it goes nowhere."""
    end_progress()
    _write(f"{text}\n", stream or sys.stdout)


def show_progress(text: str, stream: TextIO) -> None:
    """Put a line of progress in the place of the last one, no wider than the terminal: of a line that wraps only the
    last row would be overwritten."""
    global _open_on
    width = shutil.get_terminal_size().columns - 1
    _write(f"\r\033[K{text[:width]}", stream)
    _open_on = stream


def is_progress_open() -> bool:
    """Whether a line of progress is there that what comes next would be glued to."""
    return _open_on is not None


def end_progress() -> None:
    """Leave the line of progress as it is; what comes next is below it."""
    global _open_on
    stream, _open_on = _open_on, None
    if stream is not None:
        _write("\n", stream)


def stop_printing(stream: TextIO) -> None:
    """Let what is still printed on `stream` go nowhere: the interpreter would complain once more when it ends."""
    with contextlib.suppress(OSError):  # a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Announcements for the authors of the libraries that we call, not for who runs this one.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|deepspeed|accelerate|peft)\b")
    # DDP's reducer tells (O, 1) with strides (1, O) from the same with (1, 1): the same bytes in the same order.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    of_transformers = import_module("transformers.utils").logging  # here: seconds, which most commands do not need
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def _write(text: str, stream: TextIO | None) -> None:
    """A terminal that is gone, a `head` that has read enough or a full disk is no reason for a run to end."""
    if stream is None or stream.closed:
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        stop_printing(stream)
