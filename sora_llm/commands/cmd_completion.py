"""`sora-llm completion SHELL`: a script that completes commands, options and paths, made from their own parsers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from sora_llm.arguments import Parser
from sora_llm.commands import COMMANDS
from sora_llm.commands.common import run_command

SHELLS = ("bash", "zsh", "fish")
PATHS = ("config", "file", "place", "places", "source", "sources")


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="Print a completion script.  bash: save it as ~/.local/share/bash-completion/completions/sora-llm; "
        "zsh: as _sora-llm in a folder of $fpath; fish: as ~/.config/fish/completions/sora-llm.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm completion") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    found = {"script": script(COMMANDS, arguments.shell)}
    return run_command(lambda: found, False, lambda result: str(result["script"]).rstrip())


def script(commands: Mapping[str, tuple[str, str]], shell: str) -> str:
    """The completion script for `commands` {name: (module, description)}."""
    import shtab

    root = argparse.ArgumentParser(prog="sora-llm")
    root.add_argument("--version", action="store_true", help="print the version")
    subparsers = root.add_subparsers(dest="command")
    for name, (module, what) in commands.items():
        own = import_module(module).make_parser(f"sora-llm {name}")
        added = subparsers.add_parser(name, help=what, description=what, parents=[own], add_help=False)
        for action in added._actions:
            if action.type is Path or action.dest in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    written: str = shtab.complete(root, shell)
    return written
