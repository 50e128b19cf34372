"""How prompts are formatted at inference: as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_llm.artifacts.lora_files import certificate_in
from sora_llm.config import Config, Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.prompts import answer_end, encode_prompt, served_template
from sora_llm.data.templates import resolve_template
from sora_llm.generation import Stop
from sora_llm.row_types import WITHOUT_TEMPLATE


def has_conversations(datasets: Sequence[Dataset]) -> bool:
    """Whether rows of one of them are rendered with a chat template."""
    return any(dataset.type not in WITHOUT_TEMPLATE for dataset in datasets)


def template_is_named(config: Config, tokenizer: Any) -> bool:
    """Whether the config or the tokenizer says which chat template rows are rendered with."""
    return config.data.chat_template is not None or bool(tokenizer.chat_template)


def names_template_file(config: Config) -> bool:
    """Whether rows are rendered with a jinja file that the config names, which may change later."""
    return config.data.chat_template not in (None, *TEMPLATES) and has_conversations(config.data.datasets)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt was written in training: through the chat template (None: as it is), or with a separator behind it;
    and what ends the answer."""

    template: str | None
    separator: str = ""
    stop: Stop = field(default_factory=Stop)


def prompt_format(config: Config, tokenizer: Any, chat_template: str) -> PromptFormat:
    """How prompts of the first data set were written."""
    separator = plain_separator(config)
    return format_of_template(tokenizer, chat_template) if separator is None else PromptFormat(None, separator)


def plain_separator(config: Config) -> str | None:
    """What stood behind prompts that were plain text, by the first data set; None where they were conversations."""
    first = config.data.datasets[0]
    return first.separator if first.type in WITHOUT_TEMPLATE else None


def recorded_separator(config: Config | None, folder: Path | None) -> str | None:
    """`plain_separator` of the run that an adapter comes from, or what the certificate in its folder says of it."""
    if config is not None:
        return plain_separator(config)
    separator = None if folder is None else certificate_in(folder).get("separator")
    return separator if isinstance(separator, str) else None


def format_of_template(tokenizer: Any, chat_template: str) -> PromptFormat:
    """Through a chat template."""
    token, text = answer_end(tokenizer, chat_template)
    return PromptFormat(chat_template, stop=Stop(() if token is None else (token,), text))


def exported_template(config: Config, tokenizer: Any) -> str | None:
    """The chat template to put beside the adapter: the one that was used, completed with the BOS that training put
    before it, unless the tokenizer has it already."""
    if not has_conversations(config.data.datasets):
        return None
    template = served_template(tokenizer, resolve_template(tokenizer, config.data.chat_template))
    return None if template == tokenizer.chat_template else template


def prompt_ids(config: Config, tokenizer: Any, chat_template: str, prompt: str) -> list[int]:
    """A sample prompt as tokens: through the chat template where the first data set is made of conversations."""
    form = prompt_format(config, tokenizer, chat_template)
    return encode_prompt(tokenizer, prompt + form.separator, form.template)
