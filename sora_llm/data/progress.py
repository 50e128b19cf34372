"""Progress of data preparation: `RowProgress`."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from sora_llm.terminal import is_terminal, say

_SILENT_SECONDS = 2.0  # anything shorter needs no bar
_SECONDS_PER_LINE = 10.0


class RowProgress:
    """Rows so far and rows per second on stderr: a bar on a terminal, elsewhere an occasional line."""

    def __init__(self) -> None:
        self._rows, self._started = 0, time.monotonic()
        self._next_line = self._started + _SECONDS_PER_LINE
        self._bar = tqdm(
            desc="preparing data",
            unit=" rows",
            unit_scale=True,
            file=sys.stderr,
            delay=_SILENT_SECONDS,
            disable=not is_terminal(sys.stderr),
            nrows=20,  # else tqdm asks the terminal, and shows nothing if that reports 0, as in many containers
        )

    def add(self, num_rows: int) -> None:
        """Record that `num_rows` more rows are done."""
        self._rows += num_rows
        self._bar.update(num_rows)
        now = time.monotonic()
        if self._bar.disable and now >= self._next_line:
            self._next_line = now + _SECONDS_PER_LINE
            rate = self._rows / (now - self._started)
            say(f"preparing data: {self._rows:,} rows so far, {rate:,.0f} rows/s", sys.stderr)

    def close(self) -> None:
        """Close the bar; if it was shown, it stays as it is."""
        self._bar.close()
