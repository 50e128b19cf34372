"""The two ways in which a run ends early on purpose."""


class UserError(ValueError):
    """Bad input: a config, a file, a combination.  The message is one or two sentences for the person who
    started the command: what was given, what is allowed, what to do.  The commands print it and exit with 2."""


class RunFailed(RuntimeError):
    """A run that started well cannot go on (processes disagree, losses stay non-finite).  The message says what
    was seen and what to do next.  The commands print it, record it in status.json and exit with 1."""
