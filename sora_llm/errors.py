"""Deliberate ways for a run to end early."""

from typing import Any

EXIT_INTERRUPTED = 130
"""Of a command that Ctrl-C ended before it could put anything in order."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(ValueError):
    """Bad input: a config, a file, a combination.  The message is one or two sentences for the person who
    started the command: what was given, what is allowed, what to do.  The commands print it and exit with 2."""

    exit_code = 2


class NotFinite(ValueError):
    """Values that are inf or nan where numbers are needed; the message names what holds them."""


class RunFailed(RuntimeError):
    """A run that started well cannot go on (processes disagree, losses stay non-finite).  The message says what
    was seen and what to do next.  The commands print it, record it in status.json and exit with 1."""

    exit_code = 1


class Preempted(BaseException):
    """The run was asked to stop, by a signal or a STOP file.  Not an `Exception`: no code between where it is
    noticed and where it is saved may catch it as an error.  The commands exit with 75.  `status` is what was written
    to status.json, None before a run is that far."""

    exit_code = 75
    status: dict[str, Any] | None = None
