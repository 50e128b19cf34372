"""`sora-llm <command>`: which commands there are.  Each is imported when it is called, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": ("sora_llm.train", "train a config, cut the ranks, export a verified LoRA"),
    "export": ("sora_llm.commands.cmd_export", "a run's adapter in another layout, or a stage of its sparsity path"),
    "consensus": ("sora_llm.commands.cmd_consensus", "adapters trained apart become one, of the size asked for"),
    "evaluate": ("sora_llm.commands.cmd_evaluate", "the loss of a base model, and of an adapter on it, on a data set"),
    "estimate": ("sora_llm.commands.cmd_estimate", "memory per process of a config, before anything is loaded"),
    "generate": ("sora_llm.commands.cmd_generate", "answers to prompts, of the adapter and of its base"),
    "chat": ("sora_llm.commands.cmd_chat", "a dialogue with the adapter at the terminal"),
    "inspect": ("sora_llm.commands.cmd_inspect", "what became of a run, in the terminal and in its report.html"),
    "doctor": ("sora_llm.commands.cmd_doctor", "try out whether this machine can train"),
    "recommend-ranks": ("sora_llm.commands.cmd_recommend_ranks", "an adapter's ranks as a config for PEFT or axolotl"),
    "preprocess": ("sora_llm.commands.cmd_preprocess", "tokenise the data into the cache and report what is in it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2 for a command that does not exist)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sora_llm import __version__

        print(f"sora-llm {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"sora-llm: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command: int = import_module(COMMANDS[name][0]).main(rest, prog=f"sora-llm {name}")
    return command


def usage() -> str:
    """The help page."""
    commands = "\n".join(f"  {name:<16} {what}" for name, (_, what) in COMMANDS.items())
    return f"""usage: sora-llm <command> [...]        (sora-llm <command> --help)

SoRA adapters for large language models: a gate per rank, pruned while training, exported as a plain LoRA.

{commands}

Over several processes: accelerate launch -m sora_llm.train configs/llama7b.yaml"""
