"""The argument parser: its errors are UserErrors like any other bad input."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from sora_llm.errors import RunFailed, UserError
from sora_llm.terminal import print_result

OVERRIDES = "section.key=value"
UNKNOWN = "unrecognized arguments: "
"""How argparse begins its message about them."""


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print the usage and exit; options are written out.

    `unknown_hint` is said of arguments that are none, unless they look like an option.
    """

    def __init__(self, *args: Any, unknown_hint: str | None = None, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._unknown_hint = unknown_hint

    def print_help(self, file: Any = None) -> None:
        """Print the help on standard output, as the requested result."""
        if not print_result(self.format_help().rstrip("\n")):
            self.exit(RunFailed.exit_code)

    def error(self, message: str) -> NoReturn:
        if message.startswith(UNKNOWN):
            meant = self._meant_by(message.removeprefix(UNKNOWN).split())
            hint = f"did you mean {' or '.join(meant)}?" if meant else self._unknown_hint
            message += f"; {hint}" if hint else ""
        # argparse reports optional positionals as required if options come between them
        raise UserError(f"{message.replace(f', {OVERRIDES}', '')}; see {self.prog} --help")

    def _meant_by(self, words: Sequence[str]) -> list[str]:
        """The options that the first of `words` that is like one may stand for."""
        known = [option for action in self._actions for option in action.option_strings]
        for name in (word.partition("=")[0] for word in words if word.startswith("--")):
            begins_so = [option for option in known if option.startswith(name)]
            if close := begins_so or difflib.get_close_matches(name, known, n=1):
                return close
        return []
