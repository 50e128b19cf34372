"""The argument parser: its errors are UserErrors like any other bad input."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sora_llm.errors import RunFailed, UserError
from sora_llm.terminal import print_result

OVERRIDES = "section.key=value"


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print the usage and exit."""

    def print_help(self, file: Any = None) -> None:
        """Print the help on standard output, as the requested result."""
        if not print_result(self.format_help().rstrip("\n")):
            self.exit(RunFailed.exit_code)

    def error(self, message: str) -> NoReturn:
        # argparse reports optional positionals as required if options come between them
        raise UserError(f"{message.replace(f', {OVERRIDES}', '')}; see {self.prog} --help")
