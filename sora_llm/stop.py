"""Noticing that this process was asked to stop."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from sora_llm.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers, batch scripts and Ctrl-C send."""

STOP_FILE = "STOP"


class StopRequest:
    """A request to stop: one of `SIGNALS`, or a STOP file in the run directory.

    Used as a context in the main thread (elsewhere Python takes no signals, and only the file counts).  While
    `at_once` is true a signal raises `Preempted` where it meets the program: there is nothing to save yet, and no
    other process waits.  Afterwards it is only noted, so that all processes can stop together at the same step.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP_FILE
        self.at_once = True
        self._signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._noted)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        first = self._signal is None
        self._signal = self._signal or signal.Signals(number).name
        if self.at_once and first:  # a second one must not end what the first one has begun to put in order
            raise Preempted(self._signal)

    def reason(self, look_for_file: bool) -> str | None:
        """What asked for it, or None."""
        if self._signal is None and look_for_file and self.file.exists():
            return f"the file {self.file}"
        return self._signal
