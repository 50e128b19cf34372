"""How far the measuring of many rows has come, on stderr."""

from __future__ import annotations

import sys
import time
from itertools import accumulate

from sora_llm.data.dataset import TokenDataset
from sora_llm.report import duration
from sora_llm.terminal import end_progress, is_terminal, say, show_progress

FIRST_SECONDS, EVERY_SECONDS = 2.0, 30.0
"""When a terminal shows progress first; how often a line is written where there is none."""


class EvalProgress:
    """Progress over `rows` in batches of `batch_size`, the longest rows first, as `evaluate` takes them: to be called
    before each batch.  `what` is being measured."""

    def __init__(self, what: str, rows: TokenDataset, batch_size: int):
        self._tokens = [0, *accumulate(sorted(map(int, rows.lengths), reverse=True))]
        """Of the first 0, 1, 2, … rows."""
        self._what, self._batch_size, self._rows = what, batch_size, 0
        self._started = self._said = time.monotonic()

    def __call__(self) -> None:
        rows, num_rows = self._rows, len(self._tokens) - 1
        self._rows = min(rows + self._batch_size, num_rows)
        now = time.monotonic()
        has_terminal = is_terminal(sys.stderr)
        is_due = now - self._started >= FIRST_SECONDS if has_terminal else now - self._said >= EVERY_SECONDS
        if not is_due or rows == 0:
            return
        self._said = now
        left = (now - self._started) * (self._tokens[-1] / self._tokens[rows] - 1)
        text = f"{self._what}: {rows:,} of {num_rows:,} rows, {duration(left)} left"
        if has_terminal:
            show_progress(text, sys.stderr)
        else:
            say(text, sys.stderr)

    def end(self) -> None:
        """Leave the line as it is."""
        if is_terminal(sys.stderr):
            end_progress()
