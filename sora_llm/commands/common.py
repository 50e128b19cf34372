"""Shared by the commands: config arguments, and errors as a message and an exit code."""

from __future__ import annotations

import json
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from sora_llm.arguments import OVERRIDES, Parser
from sora_llm.errors import EXIT_INTERRUPTED, RunFailed, UserError
from sora_llm.files import path_errors_as_user_errors
from sora_llm.terminal import print_error, print_result, stop_printing

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that set the direction of all text after them."""


def config_parser(prog: str, description: str, *, metavar: str = "CONFIG", what: str = "YAML file of a run") -> Parser:
    """A parser for a config (or what `metavar` names instead), overrides and --json."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("config", metavar=metavar, help=what)
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help="as for train")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def options_for_keys(arguments: Namespace, base: str = "base") -> dict[str, str]:
    """{config key: the option that was given for it}, for messages about the key; `base` is the argument that names the
    base model."""
    options = {"model.name_or_path": base, "data.chat_template": "chat_template"}
    return {
        key: f"--{name.replace('_', '-')}"
        for key, name in options.items()
        if getattr(arguments, name, None) is not None
    }


def run_command(
    command: Callable[[], dict[str, Any]],
    as_json: bool,
    as_text: Callable[[dict[str, Any]], str],
    options: Mapping[str, str] | None = None,
) -> int:
    """Run a command and print its result; returns the exit code: 0, 1 (failed), 2 (bad input; a sentence) or 130
    (Ctrl-C).  A sentence about a config key names the option that took its place: `options` {key: option}."""
    try:
        with path_errors_as_user_errors():
            result = command()
    except (UserError, RunFailed) as error:
        sentence = str(error)
        for key, option in (options or {}).items():
            sentence = sentence.replace(key, option)
        print_error(sentence)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        stop_printing(sys.stdout)
        return 0
    text = json.dumps(result, indent=1) if as_json else as_text(result)
    return 0 if not text or print_result(text) else RunFailed.exit_code


def printable(text: str) -> str:
    """Text from files or a model without characters that control the terminal, reverse its text or cannot be encoded.
    Others may be invisible and still part of it: blanks of all widths, and the joiners of Persian, Hindi and emoji."""
    return "".join("�" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character not in "\n\t" and (
        unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS  # control, half a surrogate pair
    )
