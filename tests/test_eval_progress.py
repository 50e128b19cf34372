"""A long evaluation says on stderr how far it is, a short one nothing."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from sora_llm.commands import eval_progress
from sora_llm.commands.eval_progress import EvalProgress
from sora_llm.data.dataset import TokenDataset


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, seconds_per_token: float) -> str:
    """What is written while rows of 10, 30, 20, 20 and 20 tokens are measured two at a time, the longest first."""
    now = 100.0
    monkeypatch.setattr(eval_progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", stderr)
    rows = TokenDataset.of((np.ones(n, np.int32), np.ones(n, np.float32)) for n in (10, 30, 20, 20, 20))
    progress = EvalProgress("adapter", rows, batch_size=2)
    for tokens in (50, 40, 10):
        progress()
        now += tokens * seconds_per_token
    progress.end()
    return stderr.getvalue()


def test_lines_are_written_now_and_then_with_the_time_that_is_left(monkeypatch):
    slow = "adapter: 2 of 5 rows, 0:50 left\nadapter: 4 of 5 rows, 0:10 left\n"
    assert said(monkeypatch, io.StringIO(), 1.0) == slow
    assert said(monkeypatch, io.StringIO(), 0.5) == "adapter: 4 of 5 rows, 0:05 left\n"


def test_a_short_evaluation_says_nothing(monkeypatch):
    assert said(monkeypatch, io.StringIO(), 0.3) == ""
    assert said(monkeypatch, Terminal(), 0.02) == ""


def test_a_terminal_has_one_line_that_is_overwritten(monkeypatch):
    written = said(monkeypatch, Terminal(), 0.1)
    assert written == "\r\033[Kadapter: 2 of 5 rows, 0:05 left\r\033[Kadapter: 4 of 5 rows, 0:01 left\n"
