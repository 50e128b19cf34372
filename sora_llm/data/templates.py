"""Choosing a chat template (built-in, the tokenizer's own, or a Jinja file) and rendering conversations with it."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sora_llm.data.builtin_templates import DEFAULT_TEMPLATE, TEMPLATES
from sora_llm.data.formats import REASONING, Message
from sora_llm.data.readers import BadRow
from sora_llm.errors import UserError
from sora_llm.files import user_path

# ----- which template -------------------------------------------------------------------------------------------------


def resolve_template(tokenizer: Any, name: str | None) -> str:
    """The Jinja source of the chat template to use.

    Args:
        name: a built-in (`TEMPLATES`), the path of a Jinja file, or None for the tokenizer's own template or, if it has
            none, `DEFAULT_TEMPLATE`.

    Raises:
        UserError: an unknown name, or a template that is not valid Jinja.
    """
    source = _template_source(tokenizer, name)
    try:
        render(as_dicts([Message("user", "?")]), source, tokenizer.special_tokens_map)
    except jinja2.TemplateSyntaxError as error:
        line = error.lineno - _num_lines_before(source)
        raise UserError(
            f"chat template {name or 'of the tokenizer'}:{line} is not valid jinja: {error.message}"
        ) from None
    except BadRow:
        pass  # a template may refuse this one message and still work for the data; rows that it refuses are counted
    return source


def _template_source(tokenizer: Any, name: str | None) -> str:
    if name is None:
        return _own_template(tokenizer) or TEMPLATES[DEFAULT_TEMPLATE]
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = user_path(name, "data.chat_template")
    if not file.is_file():
        nearest = difflib.get_close_matches(name, TEMPLATES, n=1)
        raise UserError(
            f"data.chat_template {name!r} is neither a built-in template ({', '.join(TEMPLATES)}) nor a jinja file"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template {name} cannot be read: {error}") from None


def _own_template(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # several named templates and none called "default"
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(tokenizer.chat_template)}) and no default: save the "
            "one you want as a .jinja file and name it in data.chat_template"
        ) from None


# ----- rendering ------------------------------------------------------------------------------------------------------


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them.  Alpaca's input is part of the content, and also given separately for the one
    template that has a section for it; null content is left out, as `apply_chat_template` does."""
    return [_as_dict(message) for message in messages]


def _as_dict(message: Message) -> dict[str, Any]:
    as_dict: dict[str, Any] = {"role": message.role}
    if message.has_content:
        as_dict["content"] = message.content
    if message.input:
        as_dict["content"] = f"{message.content}\n\n{message.input}"
        as_dict |= {"instruction": message.content, "input": message.input}
    as_dict.update((key, value) for key, value in message.extra.items() if value is not None)
    if thoughts := next(filter(None, map(as_dict.get, REASONING)), None):
        as_dict |= dict.fromkeys(REASONING, thoughts)  # templates read one or the other
    return as_dict


def render(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
    prompt: bool = False,
) -> str:
    """The text of a conversation, identical to that from `tokenizer.apply_chat_template` except for the date: templates
    that ask for today's get `_DATE`.

    Args:
        messages: from `as_dicts`.
        template: Jinja source, from `resolve_template`.
        special_tokens: `tokenizer.special_tokens_map`, read by templates as bos_token, eos_token and so on.
        prompt: end where the assistant's next turn begins.

    Raises:
        BadRow: the template refuses the conversation.
    """
    return _render(messages, template, special_tokens, tools, add_generation_prompt=prompt)[0]


def render_marked(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """Like `render`, plus the character spans that the template's generation markers enclose."""
    return _render(messages, template, special_tokens, tools, return_assistant_tokens_mask=True)


def _render(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    tools: Sequence[dict[str, Any]],
    **options: bool,
) -> tuple[str, list[tuple[int, int]]]:
    if any("tool_calls" in message for message in messages) and _needs_text_arguments(template):
        messages = [_with_text_arguments(message) for message in messages]
    if any("content" not in message for message in messages) and _needs_content(template):
        messages = [{"content": "", **message} for message in messages]
    try:
        # The function behind apply_chat_template, which costs a fifth more.  It compiles each template once.
        rendered: Any = render_jinja_template(
            [messages], tools=list(tools) or None, chat_template=_on_one_day(template), **{**special_tokens, **options}
        )
    except jinja2.TemplateSyntaxError:
        raise
    except Exception as error:  # a template is a program: it may divide by zero, or recurse endlessly
        if not messages:
            raise BadRow("the conversation begins with the assistant, which the chat template cannot render") from None
        raise BadRow(f"the chat template refuses the conversation: {error}") from None
    (text,), spans = rendered
    return text, spans[0] if spans else []


# Llama 3.2's template writes today's date, so a row would have different tokens every day: caches, resumed streams and
# other processes after midnight would differ.  This is the date that Llama's templates fall back to.
_DATE = datetime(2024, 7, 26)
_DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdejmyYFDHIMSpTRxX"))


@functools.lru_cache(maxsize=8)
def _on_one_day(template: str) -> str:
    """The template with `strftime_now` as a macro with a fixed date.  (If the function were passed as a variable,
    transformers 5.23 would replace it by its name.)"""
    if "strftime_now" not in template:
        return template
    dates = "".join(f" | replace('{code}', '{_DATE.strftime(code)}')" for code in _DATE_CODES)
    # The line break after a block is not rendered, and text that begins a line in the template still does.
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{dates} -}}}}{{%- endmacro %}}\n{template}"


def _num_lines_before(template: str) -> int:
    return _on_one_day(template).count("\n") - template.count("\n")


@functools.lru_cache(maxsize=8)
def _needs_content(template: str) -> bool:
    """Whether the template fails on a call without content.  Many that do handle empty content correctly."""
    return not _renders_call(template, has_content=False, as_text=_needs_text_arguments(template))


@functools.lru_cache(maxsize=8)
def _needs_text_arguments(template: str) -> bool:
    """Whether the template takes the arguments of calls only as JSON text, as they are in OpenAI's files, and not as
    objects (DeepSeek-V3's)."""
    return not _renders_call(template) and _renders_call(template, as_text=True)


def _renders_call(template: str, *, has_content: bool = True, as_text: bool = False) -> bool:
    """Whether the template renders a question and a call, with its arguments as JSON text or as an object."""
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"text": "?"}}}
    answer = Message("assistant", "", extra={"tool_calls": [call]}, has_content=has_content)
    dialogue = as_dicts([Message("user", "?"), answer])
    if as_text:
        dialogue = [_with_text_arguments(message) for message in dialogue]
    try:
        render_jinja_template([dialogue], chat_template=_on_one_day(template), **NAMES_OF_TOKENS)
    except Exception:  # as in _render
        return False
    return True


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message

    def as_text(function: dict[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}

    return {
        **message,
        "tool_calls": [{**call, "function": as_text(call["function"])} for call in message["tool_calls"]],
    }


@functools.lru_cache(maxsize=8)
def has_markers(template: str) -> bool:
    """Whether the template itself marks the assistant's text with {% generation %}."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


@functools.lru_cache(maxsize=8)
def ends_answers_visibly(template: str) -> bool:
    """Whether the template writes more than blanks after an answer.  If it does not, they are all that a model can
    learn to stop with; otherwise they separate two turns and belong to neither."""
    try:
        dialogue = as_dicts([Message("user", "?"), Message("assistant", "!")])
        return not render(dialogue, template, NAMES_OF_TOKENS).rstrip().endswith("!")
    except BadRow:
        return True


NAMES_OF_TOKENS: dict[str, Any] = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
