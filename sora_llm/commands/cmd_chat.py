"""`sora-llm chat RUN|ADAPTER|CONFIG|MODEL`: a dialogue at the terminal, with or without the adapter."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sora_llm.arguments import Parser
from sora_llm.commands.common import options_for_keys, run_command
from sora_llm.commands.inference import (
    Responder,
    generation_parser,
    load_responder,
    notice,
    prepare_prompter,
    sampling_of,
    show,
    title,
)
from sora_llm.data.formats import Message
from sora_llm.errors import UserError
from sora_llm.generation import Sampling

HELP = "/adapter off|on: use the base, or the adapter again · /reset: clear the conversation · /quit, Ctrl-D: exit"

DEFAULT = Sampling(max_new_tokens=512, temperature=0.7, top_p=0.95)


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = generation_parser(
        prog,
        f"Talk to an adapter on its base, loaded and prompted as in training.  {HELP} · Ctrl-C: stop an answer.",
        DEFAULT,
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm chat") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    return run_command(lambda: talk(arguments), False, lambda _: "", options_for_keys(arguments))


def talk(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hold a dialogue at the terminal to its end; UserError if there is nothing to ask."""
    sampling = sampling_of(arguments, DEFAULT)
    prompter = prepare_prompter(arguments)
    notice(title(prompter.ref))
    responder = load_responder(prompter, sampling, arguments.seed or 0)
    notice(HELP)
    if prompter.form.template is None:
        notice("no chat template was used in training: every line is a separate prompt")
    Chat(responder, arguments.system).run()
    return {}


class Chat:
    """A dialogue: the messages so far, and whether the adapter takes part."""

    def __init__(self, responder: Responder, system: str | None):
        self.responder, self.with_adapter = responder, True
        self._start = [] if system is None else [Message("system", system)]
        self.messages = list(self._start)

    def run(self) -> None:
        """Read lines until the end of the input or /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its history and its keys
        while (line := _read_line()) is not None:
            if line.startswith("/"):
                if line in ("/quit", "/exit"):
                    return
                self.obey(line)
            elif line.strip():
                self.say(line)

    def obey(self, line: str) -> None:
        """Carry out a line that begins with /."""
        match line.split():
            case ["/reset"]:
                self.messages = list(self._start)
                notice("conversation reset")
            case ["/adapter", ("on" | "off") as state] if self.responder.loaded.without_adapter is not None:
                self.with_adapter = state == "on"
                notice("the adapter answers" if self.with_adapter else "the base answers, without the adapter")
            case ["/adapter", "on" | "off"]:
                notice("there is no adapter to turn on or off")
            case _:
                notice(HELP)

    def say(self, line: str) -> None:
        """Answer a user's message; the answer is printed as it is generated, and remembered even if it was stopped."""
        messages = [*self.messages, Message("user", line)]
        try:
            ids = self.responder.prompter.ids(messages)
        except UserError as error:
            notice(f"not sent: {error}" + ("; /reset clears the conversation" if self.messages else ""))
            return
        with _interruptible() as is_interrupted:
            said = self.responder.answer(
                ids, with_adapter=self.with_adapter, on_text=show, is_interrupted=is_interrupted
            )
        print(flush=True)
        if is_interrupted():
            notice("stopped")
        elif not said.is_whole:
            notice(self.responder.truncation_message(ids))
        self.messages = [*messages, Message("assistant", said.text)]


def _read_line() -> str | None:
    """The next line, None at the end of the input; Ctrl-C discards the typed text."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            return input(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            if prompt:
                print()
            return None


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """A context in which Ctrl-C is only remembered; a second one interrupts as usual."""
    interrupts: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)
