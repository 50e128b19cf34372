"""Deliberate ways for a run to end early."""

from typing import Any

EXIT_INTERRUPTED = 130
"""Of a command that Ctrl-C ended before it could clean up."""


def first_line(error: BaseException) -> str:
    """The first line of a library error's message, and the next if it only announces that; its type if the message is
    empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]


class UserError(ValueError):
    """Bad input: a config, a file, a combination.  The message is one or two sentences for the person who
    started the command: what was given, what is allowed, what to do.  The commands print it and exit with 2."""

    exit_code = 2


class NotFinite(ValueError):
    """Values that are inf or nan where finite numbers are needed; the message says what holds them."""


class RunFailed(RuntimeError):
    """A run that started well cannot continue (processes disagree, losses stay non-finite).  The message says what
    happened and what to do next.  The commands print it, record it in status.json and exit with 1."""

    exit_code = 1


class Preempted(BaseException):
    """The run was asked to stop, by a signal or a STOP file.  Not an `Exception`: no code between noticing the request
    and saving may catch it as an error.  The commands exit with 75.  `status` is the content written to status.json,
    None if the run did not get that far."""

    exit_code = 75
    status: dict[str, Any] | None = None
