"""`sora-llm convert FILE`: a config for axolotl or LLaMA-Factory as one of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.commands.common import run_command
from sora_llm.config import from_dict, read_mapping, translate, write_yaml
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.terminal import warn


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="A config for LoRA with axolotl or LLaMA-Factory as one of ours, on standard output, with comments "
        "about what has no equivalent here.  Keys that it does not state have our defaults, but for the base's "
        "precision and packing.",
    )
    parser.add_argument("file", metavar="FILE", help="the other trainer's YAML")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm convert") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    return run_command(lambda: converted(arguments.file), arguments.json, as_text)


def converted(file: str) -> dict[str, Any]:
    """Our config, notes by the other's keys, and `problem`, the first reason why it cannot be trained yet.

    Raises:
        UserError: the file cannot be read, or is no config for LoRA.
    """
    found = translate(read_mapping(user_path(file, "FILE")), file)
    template = found.get("data.chat_template")
    if isinstance(template, str) and template not in TEMPLATES and not user_path(template, "chat_template").is_file():
        del found.config["data"]["chat_template"]
        found.notes["data.chat_template"] = (
            f"left to the tokenizer; {template} is neither built in ({', '.join(TEMPLATES)}) nor a file here"
        )
    problem = None
    try:
        from_dict(found.config, f"converted from {file}")
    except UserError as error:
        problem = str(error)
        warn(f"the config cannot be trained as it is: {problem}")
    return {"source": file, "config": found.config, "notes": found.notes, "problem": problem}


def as_text(result: Mapping[str, Any]) -> str:
    """The config as YAML, below comments."""
    lines = [f"# converted from {result['source']}" + ("; see to:" if result["notes"] else "")]
    lines += [f"#   {key}: {' '.join(note.split())}" for key, note in result["notes"].items()]
    return "\n".join([*lines, "", write_yaml(result["config"]).rstrip("\n")])
