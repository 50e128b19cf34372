"""Shared by `generate` and `chat`: arguments, encoding messages, decoding answers."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sora_llm import backbone, terminal
from sora_llm.arguments import OVERRIDES, Parser
from sora_llm.commands.common import printable
from sora_llm.commands.model_ref import (
    LoadedModel,
    ModelRef,
    adapter_template,
    add_base_arguments,
    load,
    resolve_model,
    tokenizer_source,
    with_base_options,
)
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import REASONING, Conversation, Message
from sora_llm.data.prompts import encode_chat, encode_prompt
from sora_llm.data.readers import BadRow
from sora_llm.data.template_gaps import check_has_place
from sora_llm.data.templates import resolve_template
from sora_llm.errors import UserError
from sora_llm.generation import Answer, Sampling, answer
from sora_llm.prompt_format import PromptFormat, format_of_template, prompt_format
from sora_llm.run_files import ADAPTER_CONFIG

MIN_TEMPERATURE = 1e-4
"""Of sampling: logits divided by much less overflow, and already this draws the likeliest token but for near ties."""


def generation_parser(prog: str, description: str, sampling: Sampling) -> Parser:
    """A parser for the model and how it should answer; `sampling` holds the defaults."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument(
        "place", metavar="RUN|ADAPTER|CONFIG|MODEL", help="run, checkpoint, LoRA, config or a whole model"
    )
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help="of the run's config, as for train")
    add_base_arguments(parser)
    parser.add_argument("--no-adapter", action="store_true", help="ask the base alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    form.add_argument("--chat-template", metavar="NAME", help=f"{', '.join(TEMPLATES)} or a jinja file")
    parser.add_argument("--system", metavar="TEXT", help="system message before the first question")
    number = parser.add_argument_group("how the next token is chosen")
    number.add_argument(
        "--max-new-tokens", type=int, default=sampling.max_new_tokens, metavar="N", help="default %(default)s"
    )
    number.add_argument(
        "--temperature",
        type=float,
        default=sampling.temperature,
        metavar="T",
        help="0 picks the most likely token; default %(default)s",
    )
    number.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"sample from the most likely tokens with this total probability; default {sampling.top_p:g}",
    )
    number.add_argument("--seed", type=int, metavar="N", help="sampling seed; default 0")
    return parser


def sampling_of(arguments: argparse.Namespace, default: Sampling) -> Sampling:
    """The requested sampling; UserError for invalid numbers, or for sampling options without sampling."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    if arguments.temperature != 0 and not MIN_TEMPERATURE <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature is {arguments.temperature:g}; it is 0, or {MIN_TEMPERATURE:g} or more")
    if arguments.seed is not None and not -(2**63) <= arguments.seed < 2**64:
        raise UserError(f"--seed is {arguments.seed}; it is a whole number from −2⁶³ to 2⁶⁴ − 1")
    for name, value in (("--top-p", arguments.top_p), ("--seed", arguments.seed)):
        if value is not None and arguments.temperature == 0:
            raise UserError(f"{name} applies to sampling, and --temperature 0 does not sample; set it above 0 as well")
    top_p = default.top_p if arguments.top_p is None else arguments.top_p
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p:g}; it is above 0 and at most 1")
    return Sampling(arguments.max_new_tokens, arguments.temperature, top_p)


@dataclass(frozen=True)
class Prompter:
    """Everything but the weights: the model, its tokenizer, its prompt format in training, its maximum length."""

    ref: ModelRef
    tokenizer: Any
    form: PromptFormat
    max_positions: int | None

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens to continue from; without a template those of the last message alone.

        Raises:
            UserError: the template refuses the messages or omits some of their content, or they fill all positions of
                the model.
        """
        try:
            if self.form.template is None:
                ids = encode_prompt(self.tokenizer, messages[-1].content + self.form.separator, None)
            else:
                check_has_place(Conversation(tuple(map(_without_thoughts, messages))), self.form.template)
                ids = encode_chat(self.tokenizer, messages, self.form.template)
        except BadRow as refused:
            raise UserError(str(refused)) from None
        if not ids:
            raise UserError("it is empty, and this tokenizer adds no token at the start")
        if self.max_positions is not None and len(ids) >= self.max_positions:
            raise UserError(f"its {len(ids):,} tokens leave no room in the model's {self.max_positions:,} positions")
        return ids


def _without_thoughts(message: Message) -> Message:
    """An answer as templates write it in earlier turns of a dialogue: many drop its thoughts there on purpose."""
    if message.role != "assistant":
        return message
    extra = {key: value for key, value in message.extra.items() if key not in REASONING}
    return replace(message, content=message.content.rpartition("</think>")[2], extra=extra)


@dataclass(frozen=True)
class Responder:
    """The loaded model, on its device, with its prompter and sampling."""

    prompter: Prompter
    loaded: LoadedModel
    sampling: Sampling

    def answer(
        self,
        ids: Sequence[int],
        *,
        with_adapter: bool = True,
        on_text: Callable[[str], None] | None = None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """The answer to `ids`, within the model's positions."""
        sampling, limit = self.sampling, self.prompter.max_positions
        if limit is not None:
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, limit - len(ids)))
        with contextlib.nullcontext() if with_adapter else self.loaded.as_base():
            return answer(
                self.loaded.model,
                self.prompter.tokenizer,
                ids,
                sampling,
                self.prompter.form.stop,
                on_text=on_text,
                is_interrupted=is_interrupted,
            )

    def truncation_message(self, ids: Sequence[int]) -> str:
        """The message about an answer to `ids` that was cut off."""
        limit = self.prompter.max_positions
        if limit is not None and len(ids) + self.sampling.max_new_tokens >= limit:
            return f"the answer was cut off at the model's {limit:,} positions"
        return "the answer was cut off at --max-new-tokens"


def prepare_prompter(arguments: argparse.Namespace) -> Prompter:
    """Check everything that can be checked before the weights are loaded.

    Raises:
        UserError: no model to ask, or options that do not fit it.
    """
    named = ref = resolve_model(arguments.place, arguments.overrides)
    if arguments.no_adapter:
        ref = replace(ref, adapter=None)
    elif ref.adapter is None and not ref.is_whole_model:
        raise UserError(
            f"{arguments.place} has no adapter yet: let the run finish, name one of its checkpoints, or ask the base "
            "alone with --no-adapter"
        )
    ref = with_base_options(ref, arguments.base, arguments.load_in_4bit, arguments.trust_remote_code)
    model_config = backbone.load_model_config(ref.spec)
    named = replace(named, spec=ref.spec)  # the base alone is prompted as with its adapter
    tokenizer = backbone.load_tokenizer(tokenizer_source(named))
    form = _form(arguments, named, tokenizer)
    if arguments.system is not None and form.template is None:
        raise UserError("--system needs a chat template, and prompts are plain text here; see --chat-template")
    positions = backbone.max_positions(model_config)
    prompter = Prompter(ref, tokenizer, form, positions)
    if arguments.system is not None:
        try:
            prompter.ids([Message("system", arguments.system), Message("user", "?")])
        except UserError as error:
            raise UserError(f"--system cannot be used: {error}") from None
    return prompter


def load_responder(prompter: Prompter, sampling: Sampling, seed: int) -> Responder:
    """A prompter with its model loaded."""
    responder = Responder(prompter, load(prompter.ref), sampling)
    torch.manual_seed(seed)
    return responder


def _form(arguments: argparse.Namespace, ref: ModelRef, tokenizer: Any) -> PromptFormat:
    """How prompts are written: as requested, else as in training, else by the tokenizer's own template."""
    if arguments.raw:
        return PromptFormat(None)
    if arguments.chat_template is not None:
        return format_of_template(tokenizer, resolve_template(tokenizer, arguments.chat_template))
    if ref.config is not None:
        template = resolve_template(tokenizer, ref.config.data.chat_template)
        return prompt_format(ref.config, tokenizer, template)
    if (separator := ref.certificate.separator) is not None:
        return PromptFormat(None, separator)
    beside = adapter_template(ref)
    if beside is not None or tokenizer.chat_template:
        return format_of_template(tokenizer, resolve_template(tokenizer, beside))
    notice("it has no chat template, so prompts are continued as plain text; --chat-template names one")
    return PromptFormat(None)


def notice(text: str) -> None:
    """Print a line for the person at the terminal, on stderr: answers are on stdout."""
    terminal.print_error(text)


def show(text: str) -> None:
    """Print a piece of an answer."""
    print(printable(text), end="", flush=True)


def title(ref: ModelRef) -> str:
    """One line that names base and adapter."""
    spec = ref.spec
    base = f"{spec.name_or_path} ({spec.form})"
    if ref.is_whole_model:
        return base
    if ref.adapter is None:
        return f"{base} without an adapter"
    kind = "adapter" if (ref.adapter / ADAPTER_CONFIG).is_file() else "checkpoint"
    return f"{base} with the {kind} {ref.adapter}"
