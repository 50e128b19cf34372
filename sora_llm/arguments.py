"""Command lines: their complaints are bad input like any other."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sora_llm.errors import UserError

OVERRIDES = "section.key=value"


class Parser(argparse.ArgumentParser):
    """One that raises UserError where others print how they are used and exit."""

    def error(self, message: str) -> NoReturn:
        # argparse calls arguments required that may be left out, where options stand between them
        raise UserError(f"{message.replace(f', {OVERRIDES}', '')}; {self.prog} --help shows what there is")
