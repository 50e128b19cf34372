"""Formatting prompts at inference as in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sora_llm.artifacts.certificate import Certificate
from sora_llm.config import Config, Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.prompts import answer_end, encode_prompt, served_template
from sora_llm.data.templates import resolve_template
from sora_llm.generation import Stop
from sora_llm.row_types import WITHOUT_TEMPLATE

LATEX_AFTER_N = "abla|e|earrow|eg|eq|ewline|exists|i|mid|ot|otin|u|warrow"
r"""Commands that begin with \n, without it."""


def has_conversations(datasets: Sequence[Dataset]) -> bool:
    """Whether the rows of any data set are rendered with a chat template."""
    return any(dataset.type not in WITHOUT_TEMPLATE for dataset in datasets)


def template_is_named(config: Config, tokenizer: Any) -> bool:
    """Whether the config or the tokenizer specifies the chat template for rows."""
    return config.data.chat_template is not None or bool(tokenizer.chat_template)


def names_template_file(config: Config) -> bool:
    """Whether rows are rendered with a Jinja file named in the config, which may change later."""
    return config.data.chat_template not in (None, *TEMPLATES) and has_conversations(config.data.datasets)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt was written in training: with the chat template (None: as it is), or followed by a separator; and
    what ends the answer."""

    template: str | None
    separator: str = ""
    stop: Stop = field(default_factory=Stop)


def prompt_format(config: Config, tokenizer: Any, chat_template: str) -> PromptFormat:
    """The format of the first data set's prompts."""
    separator = plain_separator(config)
    return format_of_template(tokenizer, chat_template) if separator is None else PromptFormat(None, separator)


def plain_separator(config: Config) -> str | None:
    """The separator after plain text prompts, from the first data set; None if they were conversations."""
    first = config.data.datasets[0]
    return first.separator if first.type in WITHOUT_TEMPLATE else None


def has_unread_line_break(separator: str) -> bool:
    r"""Whether a line break was left in two characters, \ and n, by a shell or YAML; LaTeX's \nu and \neq are none."""
    return re.search(rf"\\n(?!({LATEX_AFTER_N})\b)", separator) is not None


def recorded_separator(config: Config | None, certificate: Certificate) -> str | None:
    """`plain_separator` of the run that an adapter comes from, or the one in its certificate."""
    return certificate.separator if config is None else plain_separator(config)


def format_of_template(tokenizer: Any, chat_template: str) -> PromptFormat:
    """The format of prompts written with a chat template."""
    token, text = answer_end(tokenizer, chat_template)
    return PromptFormat(chat_template, stop=Stop(() if token is None else (token,), text))


def exported_template(config: Config, tokenizer: Any) -> str | None:
    """The chat template to save with the adapter: the one that was used, completed with the BOS that training put
    before it, unless the tokenizer already has it."""
    if not has_conversations(config.data.datasets):
        return None
    template = served_template(tokenizer, resolve_template(tokenizer, config.data.chat_template))
    return None if template == tokenizer.chat_template else template


def prompt_ids(config: Config, tokenizer: Any, chat_template: str, prompt: str) -> list[int]:
    """A sample prompt as tokens: with the chat template if the first data set consists of conversations."""
    form = prompt_format(config, tokenizer, chat_template)
    return encode_prompt(tokenizer, prompt + form.separator, form.template)
