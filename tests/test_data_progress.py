"""The progress of a preparation: a bar on a terminal, lines elsewhere."""

import io
import os
import pty
import re
import select
import sys
from types import SimpleNamespace
from typing import Any

from sora_llm.data import progress


class Stderr(io.StringIO):
    """A terminal, or none, that keeps what is written."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def progress_of(monkeypatch, *, is_terminal: bool, silent_seconds: float, seconds_per_line: float) -> str:
    """What is written by a preparation of 50 rows in five chunks, each of 50 ms by a clock of our own."""
    stderr = Stderr(is_terminal)
    show_progress(monkeypatch, stderr, silent_seconds, seconds_per_line)
    return stderr.getvalue()


def show_progress(monkeypatch, stderr: Any, silent_seconds: float = 0.0, seconds_per_line: float = 100.0) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "_SILENT_SECONDS", silent_seconds)
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", seconds_per_line)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    shown = progress.RowProgress()
    for _ in range(5):
        clock.now += 0.05
        shown.add(10)
    shown.close()


def test_progress_is_a_bar_on_a_terminal_lines_elsewhere_and_silent_where_it_is_quick(monkeypatch):
    assert progress_of(monkeypatch, is_terminal=False, silent_seconds=0.0, seconds_per_line=100.0) == ""
    assert progress_of(monkeypatch, is_terminal=True, silent_seconds=100.0, seconds_per_line=0.0) == ""
    lines = progress_of(monkeypatch, is_terminal=False, silent_seconds=100.0, seconds_per_line=0.12).splitlines()
    assert lines == ["preparing data: 30 rows so far, 200 rows/s"], "not one for every chunk"
    bar = progress_of(monkeypatch, is_terminal=True, silent_seconds=0.0, seconds_per_line=100.0)
    assert re.search(r"preparing data: 50\.0 rows \[00:00, .* rows/s\]", bar)


def test_the_bar_is_seen_on_a_terminal_that_does_not_know_its_size(monkeypatch):
    """As a new pseudo terminal does not, until somebody tells it."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb") as screen:
        show_progress(monkeypatch, terminal)
        seen = b""
        while b"preparing data: 50.0 rows" not in seen:  # it comes in pieces
            assert select.select([screen], [], [], 5)[0], seen
            seen += screen.read1()
