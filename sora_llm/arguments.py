"""The argument parser: its errors are UserErrors like any other bad input."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sora_llm.errors import RunFailed, UserError
from sora_llm.terminal import print_result

OVERRIDES = "section.key=value"


class Parser(argparse.ArgumentParser):
    """One that raises UserError where others print how they are used and exit."""

    def print_help(self, file: Any = None) -> None:
        """On standard output, as what was asked for."""
        if not print_result(self.format_help().rstrip("\n")):
            self.exit(RunFailed.exit_code)

    def error(self, message: str) -> NoReturn:
        # argparse calls arguments required that may be left out, where options stand between them
        raise UserError(f"{message.replace(f', {OVERRIDES}', '')}; see {self.prog} --help")
