"""Noticing requests to stop: signals, and a STOP file."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from sora_llm import run_files, terminal
from sora_llm.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""The signals sent by schedulers, batch scripts, Ctrl-C and a closing terminal."""

LOOK_SECONDS = 0.2
STOP_GRACE_SECONDS = 5.0
"""Less than the 30 s that launchers leave between TERM and KILL."""


class StopRequest:
    """A request to stop: one of `SIGNALS`, or a STOP file in the run directory.

    Used as a context manager in the main thread (in others Python handles no signals, and only the file counts, if it
    is asked for).  From `start` on, while `at_once` is true, a request raises `Preempted` wherever the main thread is:
    there is nothing to save yet, and no other process waits.  A main thread that does not get to it within
    `STOP_GRACE_SECONDS`, such as one that waits inside torch for processes that have already left, is not waited for.
    Afterwards a request is only noted, so that all processes can stop together at the same step.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_main: bool,
        others_wait: Callable[[], bool],
        look_for_file: bool,
        leave: Callable[[Preempted], Any],
    ) -> None:
        """Args:
        is_main: the main process removes the file.  Others must not be the first to leave because of it: their
            launcher would kill the main one before it has obeyed.
        others_wait: whether this process is already in a group, where it must not leave alone.
        look_for_file: whether a STOP file counts; a dry run leaves it to the run that it is meant for.
        leave: called before a process ends whose main thread does not get to it.
        """
        self.file = run_dir / run_files.STOP
        self.at_once = False
        self._is_main, self._others_wait, self._looks, self._leave = is_main, others_wait, look_for_file, leave
        self._asked_by: str | None = None
        self._arrived: str | None = None
        self._raised = False
        self._before: dict[int, Any] = {}
        self._arrivals: int | None = None
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stop request", daemon=True)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._arrivals, self._wakeup = os.pipe()
            for end in (self._arrivals, self._wakeup):
                os.set_blocking(end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup: the run should outlive its terminal
                self._before[number] = signal.signal(number, self._noted)
        return self

    def start(self) -> None:
        """Raise `Preempted` from here on, also for a signal that has already arrived."""
        self.at_once = True
        if self._asked_by is not None:
            self._raise_once()
        if self._before:
            self._watcher.start()

    def __exit__(self, *_error: object) -> None:
        self.at_once = False
        self._left.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._arrivals is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            arrivals, self._arrivals = self._arrivals, None
            os.close(arrivals)
            os.close(self._wakeup)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        is_first, self._asked_by = self._asked_by is None, self._asked_by or signal.Signals(number).name
        if self.at_once and not self._others_wait():
            self._raise_once()
        elif is_first and self._is_main:  # not print, whose buffer this may have interrupted
            with contextlib.suppress(OSError):
                end = "\n" if terminal.is_progress_open() else ""
                os.write(2, f"{end}sora_llm: {self._asked_by}: stopping as soon as everything is saved\n".encode())

    def _raise_once(self) -> None:
        """Raise `Preempted` only once: a second request must not interrupt the clean-up that the first one began."""
        if not self._raised:
            self._raised = True
            raise Preempted(self._asked_by)

    def _watch(self) -> None:
        """Turn a STOP file into a signal, as long as nobody asks for `reason`; repeat a signal that is not heeded, and
        leave if that does not help."""
        seen, asked_at = False, None
        while self.at_once and not self._raised:
            if self._looks and self._asked_by is None:
                seen_before, seen = seen, self._file_is_there()
                is_removed = seen_before and not seen  # by the main process, once it has obeyed
                if seen if self._is_main else is_removed:
                    self._asked_by = f"the file {self.file}"
            if self.is_asked() and not self._others_wait():
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > STOP_GRACE_SECONDS:
                    self._leave_alone()
                # Again each time: a signal that comes just before a blocking call does not interrupt it.  Under its own
                # number, since handlers run in the order of these, and the first one names the request.
                number = signal.Signals[self._arrived] if self._arrived and not self._asked_by else signal.SIGUSR1
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            if self._left.wait(LOOK_SECONDS):
                return

    def _leave_alone(self) -> None:
        """End this process from outside its main thread."""
        try:
            self._leave(Preempted(self._asked_by or self._arrived))
        finally:
            os._exit(Preempted.exit_code)

    def reason(self, look_for_file: bool) -> str | None:
        """The signal or file that asked for the stop, or None."""
        if self._asked_by is None and look_for_file and self._looks and self._file_is_there():
            return f"the file {self.file}"
        return self._asked_by

    def _file_is_there(self) -> bool:
        """Whether the file exists; also False if that cannot be checked, as below a folder that may not be entered."""
        return os.path.exists(self.file)  # noqa: PTH110 - Path.exists raises there

    def is_asked(self) -> bool:
        """Whether a stop was requested, for other threads: also by a signal that the main thread, which may wait for a
        device for a minute, has not been able to note yet."""
        if self._asked_by is None and self._arrivals is not None:
            with contextlib.suppress(OSError):  # no signal has arrived
                numbers = [number for number in os.read(self._arrivals, 64) if number in SIGNALS]
                self._arrived = self._arrived or (signal.Signals(numbers[0]).name if numbers else None)
        return self._asked_by is not None or self._arrived is not None

    def remove_file(self) -> None:
        """Remove the file after obeying it, once other processes that look for it themselves must have seen it."""
        if self._file_is_there():
            time.sleep(2 * LOOK_SECONDS)
            try:
                if self.file.is_dir():  # `mkdir STOP` is a request too
                    self.file.rmdir()
                else:
                    self.file.unlink(missing_ok=True)
            except OSError as error:
                terminal.say(f"warning: {self.file}, which stops every start, cannot be removed: {error.strerror}")


def ignore_signals() -> None:
    """For a process that has stopped and is about to end: another signal must not change its exit code."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
