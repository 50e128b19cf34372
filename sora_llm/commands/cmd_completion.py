"""`sora-llm completion SHELL`: a script that completes commands, options and paths, made from their own parsers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sora_llm.commands import COMMANDS
from sora_llm.commands.common import exit_code

SHELLS = ("bash", "zsh", "fish")
PATHS = ("config", "place", "source", "sources")


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm completion") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print a completion script.  bash: save it as ~/.local/share/bash-completion/completions/sora-llm; "
        "zsh: as _sora-llm in a folder of $fpath; fish: as ~/.config/fish/completions/sora-llm.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)
    arguments = parser.parse_args(argv)

    def command() -> dict[str, Any]:
        return {"script": script(COMMANDS, arguments.shell)}

    return exit_code(command, False, lambda result: str(result["script"]).rstrip())


def script(commands: Mapping[str, tuple[str, str]], shell: str) -> str:
    """The completion script of `commands` {name: (module, what it does)}."""
    import shtab

    root = argparse.ArgumentParser(prog="sora-llm")
    root.add_argument("--version", action="store_true", help="print the version")
    subparsers = root.add_subparsers(dest="command")
    for name, (module, what) in commands.items():
        own = parser_of(module, f"sora-llm {name}")
        added = subparsers.add_parser(name, help=what, description=what, parents=[own], add_help=False)
        for action in added._actions:
            if action.type is Path or action.dest in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    written: str = shtab.complete(root, shell)
    return written


def parser_of(module: str, prog: str) -> argparse.ArgumentParser:
    """The parser of a command, which makes it where it parses: caught there, before anything else happens."""

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Caught(parser)

    own = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = catch  # type: ignore[assignment,method-assign]
    try:
        import_module(module).main([], prog=prog)
    except _Caught as caught:
        parser: argparse.ArgumentParser = caught.args[0]
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = own  # type: ignore[method-assign]
    raise AssertionError(f"{module}.main parses no arguments")


class _Caught(BaseException):
    """Carries a parser out of the command that made it."""
