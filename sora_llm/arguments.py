"""The argument parser: its errors are UserErrors like any other bad input."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from sora_llm.errors import RunFailed, UserError
from sora_llm.terminal import print_result

OVERRIDES = "section.key=value"


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print the usage and exit; options are written out."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def print_help(self, file: Any = None) -> None:
        """Print the help on standard output, as the requested result."""
        if not print_result(self.format_help().rstrip("\n")):
            self.exit(RunFailed.exit_code)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        close = [option for option in known if option.startswith(unknown)] or difflib.get_close_matches(unknown, known)
        if unknown.startswith("--") and close:
            message += f"; did you mean {close[0]}?"
        # argparse reports optional positionals as required if options come between them
        raise UserError(f"{message.replace(f', {OVERRIDES}', '')}; see {self.prog} --help")
