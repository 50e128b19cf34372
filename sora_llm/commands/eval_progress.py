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
        lengths = sorted(map(int, rows.lengths), reverse=True)
        self._tokens_before = [
            0,
            *accumulate(sum(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)),
        ]
        self._what, self._batch_size, self._num_rows = what, batch_size, len(lengths)
        self._batches = 0
        self._started = self._said = time.monotonic()

    def __call__(self) -> None:
        tokens, total = self._tokens_before[self._batches], self._tokens_before[-1]
        rows = min(self._batches * self._batch_size, self._num_rows)
        self._batches += 1
        now = time.monotonic()
        is_shown = is_terminal(sys.stderr)
        if not tokens or now - (self._started if is_shown else self._said) < (
            FIRST_SECONDS if is_shown else EVERY_SECONDS
        ):
            return
        self._said = now
        left = (now - self._started) * (total - tokens) / tokens
        text = f"{self._what}: {rows:,} of {self._num_rows:,} rows, {duration(left)} left"
        if is_shown:
            show_progress(text, sys.stderr)
        else:
            say(text, sys.stderr)

    def end(self) -> None:
        """Leave the line as it is."""
        if is_terminal(sys.stderr):
            end_progress()
