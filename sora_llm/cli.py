"""`sora-llm <command>`: finds a command and runs it.  Each is imported on use, so that --help is instant."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from sora_llm.commands import COMMAND_GROUPS, COMMANDS
from sora_llm.errors import RunFailed, UserError
from sora_llm.terminal import escape_unencodable, print_error, print_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2 for a command that does not exist)."""
    escape_unencodable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        is_shown = print_result(usage())
        return RunFailed.exit_code if not is_shown else 0 if arguments else UserError.exit_code
    if arguments[0] == "--version":
        from sora_llm import __version__

        return 0 if print_result(f"sora-llm {__version__}") else RunFailed.exit_code
    name, *rest = arguments
    if name not in COMMANDS:
        meant = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"commands: {', '.join(COMMANDS)}"
        print_error(f"unknown command {name!r}; {hint}")
        return UserError.exit_code
    try:
        command: int = import_module(COMMANDS[name][0]).main(rest, prog=f"sora-llm {name}")
    except UserError as error:  # in its command line
        print_error(str(error))
        return error.exit_code
    return command


def usage() -> str:
    """The help page: all the way from a config to a served adapter."""
    stages = "\n\n".join(
        "\n".join([f"{heading}:", *(f"  {name:<16} {what}" for name, (_, what) in commands.items())])
        for heading, commands in COMMAND_GROUPS.items()
    )
    return f"""usage: sora-llm <command> [...]        (sora-llm <command> --help)

SoRA adapters for large language models: a gate per rank, pruned while training, exported as a plain LoRA.

{stages}

Over several processes:  accelerate launch -m sora_llm.train configs/llama7b.yaml
Served:                  vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules mine=RUN/adapter"""
