"""`sora-llm generate RUN|ADAPTER|CONFIG|MODEL --prompt "…"`: answers, also compared with the base's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.commands.common import options_for_keys, printable, run_command
from sora_llm.commands.inference import (
    Prompter,
    Responder,
    generation_parser,
    load_responder,
    notice,
    prepare_prompter,
    sampling_of,
    show,
)
from sora_llm.data.formats import Conversation, Message, to_examples
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec
from sora_llm.errors import UserError
from sora_llm.generation import Sampling

DEFAULT = Sampling()


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = generation_parser(
        prog,
        "Answer prompts with an adapter on its base, loaded and prompted as in training.  A prompt comes from "
        "--prompt, a file, or standard input.",
        DEFAULT,
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='.txt: a prompt per line; .jsonl: {"prompt": …}, {"messages": […]} or {"instruction": …, "input": …} per '
        "line, as in a file of training rows, each with its system message or without",
    )
    parser.add_argument("--compare", action="store_true", help="also print the base's answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm generate") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    return run_command(lambda: answered(arguments), arguments.json, lambda _: "", options_for_keys(arguments))


def answered(arguments: argparse.Namespace) -> dict[str, Any]:
    """The answers to all prompts; without --json they are printed as they are generated.

    Raises:
        UserError: no prompts, or no model to ask.
    """
    if arguments.compare and arguments.no_adapter:
        raise UserError("--compare needs the adapter that --no-adapter leaves out; give one of the two")
    sampling = sampling_of(arguments, DEFAULT)
    prompts = [with_system(prompt, arguments.system) for prompt in read_prompts(arguments)]
    prompter = prepare_prompter(arguments)
    if arguments.compare and prompter.ref.is_whole_model:
        raise UserError(f"--compare needs an adapter, and {arguments.place} is a whole model; leave it out")
    ids = [ids_of(prompter, prompt) for prompt in prompts]
    responder = load_responder(prompter, sampling, arguments.seed or 0)
    answers = [
        answers_to(responder, prompt, tokens, arguments, is_alone=len(prompts) == 1)
        for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    adapter = prompter.ref.adapter
    return {
        "base_model": prompter.ref.spec.name_or_path,
        "adapter": None if adapter is None else str(adapter),
        "answers": answers,
    }


# --------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered; `said` is the input as given, for the result."""

    messages: tuple[Message, ...]
    said: dict[str, Any]
    place: str


def of_text(text: str, place: str) -> Prompt:
    """A prompt of one user's turn."""
    return Prompt((Message("user", text),), {"prompt": text}, place)


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt after a system message.

    Raises:
        UserError: it already has one.
    """
    if system is None:
        return prompt
    if prompt.messages[0].role == "system":
        raise UserError(f"{prompt.place} has a system message already; leave --system out")
    return Prompt((Message("system", system), *prompt.messages), prompt.said, prompt.place)


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts from --prompt and --prompts-file, or else from standard input, which is one prompt.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    prompts = [of_text(text, "--prompt") for text in arguments.prompt or ()]
    if arguments.prompts_file is not None:
        prompts += read_file(arguments.prompts_file)
    elif not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError('there is nothing to answer: give --prompt "…", --prompts-file FILE, or standard input')
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error.reason})") from None
        prompts = [of_text(text.strip("\r\n"), "standard input")]
    for prompt in prompts:
        if not prompt.messages[-1].content.strip():
            raise UserError(f"the prompt of {prompt.place} is empty")
    return prompts


def read_file(file: Path) -> list[Prompt]:
    """A prompt for every line that is not empty."""
    kind = file.suffix.lower()
    if kind not in ("", ".txt", ".jsonl"):  # "": a pipe
        raise UserError(f"--prompts-file {file} is neither .txt (a prompt per line) nor .jsonl (an object per line)")
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # as in data files: U+2028 does not end a line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {file} cannot be read: {error}") from None
    filled = [(f"{file}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise UserError(f"--prompts-file {file} has no prompt in it")
    if kind == ".jsonl":
        return [_of_row(line, place) for place, line in filled]
    return [of_text(line, place) for place, line in filled]


def _of_row(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        asked = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        asked["messages"] = [{"role": "user", "content": row["prompt"]}]
        messages = _conversation(asked, "messages", place).messages
        said = {"system": row["system"]} if messages[0].role == "system" else {}
        return Prompt(messages, {**said, "prompt": row["prompt"]}, place)
    if not isinstance(row, dict) or not {"messages", "instruction"} & row.keys() or "instances" in row:
        raise UserError(f'{place} must be {{"prompt": "…"}}, {{"messages": […]}} or {{"instruction": "…"}}')
    if row.get("messages") is None:  # an alpaca row; its answer is ignored
        said = {name: row[name] for name in ("system", "history", "instruction", "input") if row.get(name)}
        return Prompt(_conversation(row | {"output": "?"}, "alpaca", place).messages[:-1], said, place)
    conversation = _conversation(row, "messages", place)
    if conversation.messages[-1].role not in ("user", "tool"):
        raise UserError(f"{place} ends with the {conversation.messages[-1].role}; a prompt ends with a user's message")
    return Prompt(conversation.messages, {"messages": row["messages"]}, place)


def _conversation(row: dict[str, Any], type_: str, place: str) -> Conversation:
    """A data set's row as a conversation."""
    try:
        (conversation,) = to_examples(row, DatasetSpec(place, type_))
    except BadRow as bad:
        raise UserError(f"{place}: {bad}") from None
    assert isinstance(conversation, Conversation)
    if conversation.tools:
        raise UserError(f"{place} has tools, which cannot be called here; remove them")
    return conversation


# --------------------------------------------------------------------------------------------------------- answers


def ids_of(prompter: Prompter, prompt: Prompt) -> list[int]:
    """The prompt's tokens.

    Raises:
        UserError: it cannot be used.
    """
    if prompter.form.template is None and (len(prompt.messages) > 1 or prompt.messages[-1].input):
        kind = "is a dialogue" if len(prompt.messages) > 1 else "has an input as well as an instruction"
        raise UserError(f"{prompt.place} {kind}, which needs a chat template; see --chat-template")
    try:
        return prompter.ids(prompt.messages)
    except UserError as error:
        raise UserError(f"{prompt.place} cannot be used: {error}") from None


def answers_to(
    responder: Responder, prompt: Prompt, ids: Sequence[int], arguments: argparse.Namespace, is_alone: bool
) -> dict[str, Any]:
    """The prompt and its answers, printed as they are generated unless JSON is requested, and what ended them: "stop"
    (the model) or "length"."""
    is_shown = not arguments.json
    if is_shown and not is_alone:
        print(printable(f"> {prompt.messages[-1].content}"), flush=True)
    result, reasons = dict(prompt.said), {}
    for name in ("base", "adapted") if arguments.compare else ("answer",):
        if is_shown and arguments.compare:
            print(f"{name}: ", end="", flush=True)
        said = responder.answer(ids, with_adapter=name != "base", on_text=show if is_shown else None)
        result[name], reasons[name] = said.text, "stop" if said.is_whole else "length"
        if is_shown:
            print(flush=True)
            if not said.is_whole:
                notice(responder.truncation_message(ids))
    if is_shown and not is_alone:
        print()
    result["finish_reason"] = reasons if arguments.compare else reasons["answer"]
    return result
