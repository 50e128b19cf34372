"""Chat templates: the built-in ones, the tokenizer's own, or a jinja file; and conversations rendered by one.

The built-in templates only ever append: what a conversation is rendered as begins what the conversation and one more
message is rendered as.  (Many published ones do not: they move the system message or the tools into the last question,
or drop what came before.)  So a turn is what its message adds, and a model that is trained on whole conversations
sees in training what it will see when it answers turn by turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sora_llm.data.formats import REASONING, Conversation, Message
from sora_llm.data.readers import BadRow
from sora_llm.errors import UserError
from sora_llm.files import user_path

# ----- the built-in templates -----------------------------------------------------------------------------------------

# Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py): answers end with eos, no text is trimmed.  Ours: a
# system message stands in place of the preamble, further turns are further sections.
_ALPACA = r"""
{%- if messages[0].role == 'system' -%}
  {{- messages[0].content -}}
{%- elif messages[0].input -%}
  {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
  {{- 'Write a response that appropriately completes the request.' -}}
{%- else -%}
  {{- 'Below is an instruction that describes a task. ' -}}
  {{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '\n\n### Instruction:\n' + (message.instruction or message.content) -}}
    {{- '\n\n### Input:\n' + message.input if message.input else '' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '\n\n### Response:\n' + message.content + eos_token -}}
  {%- elif message.role != 'system' or not loop.first -%}
    {{- raise_exception('the alpaca template has no place for this ' + message.role + ' message') -}}
  {%- endif -%}
{%- endfor -%}
{{- '\n\n### Response:\n' if add_generation_prompt else '' -}}
"""

# OpenAI's ChatML (github.com/openai/openai-python/blob/release-v0.28.0/chatml.md): no text is trimmed.  Tools as
# Hermes 2 Pro has them (github.com/NousResearch/Hermes-Function-Calling), in Qwen 2.5's wording.  Ours: every tool's
# response is a turn of its own (theirs share one, which a second response would have to reopen).
_CHATML = r"""
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if has_system else '') -}}
  {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' -}}
  {%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
  {{- '</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {{- '<|im_start|>tool\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
  {%- elif not (loop.first and has_system and tools) -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content -}}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set call = tool_call.function -%}
      {{- '\n' if message.content or not loop.first else '' -}}
      {{- '<tool_call>\n' + {'name': call.name, 'arguments': call.arguments} | tojson + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}
"""

# Google's Gemma 2 and 3 (ai.google.dev/gemma/docs/core/prompt-structure): all text but the system message is trimmed,
# which stands before the first question, as Gemma 3's own template has it.  Nothing differs.
_GEMMA = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '<start_of_turn>user\n' + message.content + '\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '<start_of_turn>user\n') + message.content | trim + '<end_of_turn>\n' -}}
  {%- elif message.role == 'assistant' and previous == 'user' -%}
    {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' -}}
  {%- else -%}
    {{- raise_exception('the gemma template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}
"""

# Meta's Llama 2 chat (github.com/meta-llama/llama, generation.py): all text is trimmed.  Ours: Meta writes <s> before
# every question, we only at the start, so that a sequence has exactly one.  (A chat model that expects the others
# brings its own template.)
_LLAMA_2 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '[INST] <<SYS>>\n' + message.content | trim + '\n<</SYS>>\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '[INST] ') + message.content | trim + ' [/INST]' -}}
  {%- elif message.role == 'assistant' and previous == 'user' -%}
    {{- ' ' + message.content | trim + ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('the llama-2 template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
"""

# Meta's Llama 3 (llama.com/docs/model-cards-and-prompt-formats/meta-llama-3): all text is trimmed.  Tools as in
# Llama 3.1 (…/llama3_1): JSON calls, the tools themselves in the first question, results quoted.  Ours: without the
# dates that 3.1 puts into every system turn, and text beside a call is refused, which theirs drops.
_LLAMA_3 = r"""
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- bos_token -}}
{%- if tools -%}
  {{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython' -}}
  {{- ('\n\n' + messages[0].content | trim if has_system else '') + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in (messages[1:] if tools and has_system else messages) -%}
  {%- if tools and loop.first and message.role != 'user' -%}
    {{- raise_exception('the llama-3 template writes the tools into the first question, and this conversation begins '
        'with the ' + message.role) -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
    {%- if tools and loop.first -%}
      {{- 'Given the following functions, please respond with a JSON for a function call ' -}}
      {{- 'with its proper arguments that best answers the given prompt.\n\n' -}}
      {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
      {{- 'Do not use variables.\n\n' -}}
      {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}
    {%- endif -%}
    {%- if message.tool_calls -%}
      {%- if message.tool_calls | length > 1 or message.content | trim -%}
        {{- raise_exception('the llama-3 template has one tool call per message, and no place for text beside it') -}}
      {%- endif -%}
      {%- set call = message.tool_calls[0].function -%}
      {{- {'name': call.name, 'parameters': call.arguments} | tojson -}}
    {%- else -%}
      {{- message.content | trim -}}
    {%- endif -%}
    {{- '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' -}}
"""

# Mistral 7B Instruct v0.3 (docs.mistral.ai/guides/tokenization, the v3 tokenizer): answers are trimmed, questions are
# not.  Ours: system message and tools stand before the first question (theirs before the last, so that they move on
# with every turn), calls may have ids of any form or none, and text beside calls is written, which theirs drops.
_MISTRAL = r"""
{{- bos_token -}}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools else '' -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '[INST] ' + message.content + '\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '[INST] ') + message.content + '[/INST]' -}}
  {%- elif message.role == 'assistant' and previous in ('user', 'tool') -%}
    {{- ' ' + message.content | trim if message.content | trim or not message.tool_calls else '' -}}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set call = dict(name=tool_call.function.name, arguments=tool_call.function.arguments) -%}
      {{- '[TOOL_CALLS] [' if loop.first else ', ' -}}
      {{- (dict(call, id=tool_call.id) if tool_call.id else call) | tojson + (']' if loop.last else '') -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message.role == 'tool' and previous in ('assistant', 'tool') -%}
    {#- a result that is an object or a list is JSON already -#}
    {{- '[TOOL_RESULTS] {"content": ' -}}
    {{- message.content if message.content[:1] in ('{', '[') else message.content | tojson -}}
    {{- ', "call_id": ' + message.tool_call_id | tojson if message.tool_call_id else '' -}}
    {{- '}[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- raise_exception('the mistral template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message and with tool results after the calls') -}}
  {%- endif -%}
{%- endfor -%}
"""

# Vicuna v1.1 (github.com/lm-sys/FastChat, conversation.py): no text is trimmed.  Nothing differs.
_VICUNA = r"""
{%- set default = 'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- messages[0].content if has_system else default -}}
{%- for message in (messages[1:] if has_system else messages) -%}
  {%- if message.role == 'user' and loop.index0 is even -%}
    {{- (' USER: ' if loop.first else 'USER: ') + message.content -}}
  {%- elif message.role == 'assistant' and loop.index0 is odd -%}
    {{- ' ASSISTANT: ' + message.content + eos_token -}}
  {%- else -%}
    {{- raise_exception('the vicuna template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{{- ' ASSISTANT:' if add_generation_prompt else '' -}}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "vicuna": _VICUNA,
}
"""The built-in chat templates, jinja sources by name.  Of these chatml, llama-3 and mistral take tools."""

DEFAULT_TEMPLATE = "alpaca"
"""For tokenizers without a template, those of base models: plain text, and answers that end with eos."""


# ----- which template -------------------------------------------------------------------------------------------------


def resolve_template(tokenizer: Any, name: str | None) -> str:
    """The jinja source of the chat template to use.

    Args:
        name: a built-in (`TEMPLATES`), the path of a jinja file, or None for the tokenizer's own template and, where
            it has none, `DEFAULT_TEMPLATE`.

    Raises `UserError` for an unknown name and for a template that is not valid jinja.
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
        pass  # a template may refuse this one message and still serve the data; rows that it refuses are counted
    return source


def _template_source(tokenizer: Any, name: str | None) -> str:
    if name is None:
        return _own_template(tokenizer) or TEMPLATES[DEFAULT_TEMPLATE]
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = user_path(name, "data.chat_template")
    if not file.is_file():
        raise UserError(
            f"data.chat_template {name!r} is neither a built-in template ({', '.join(TEMPLATES)}) nor a jinja file"
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
    """Messages as templates expect them.  Alpaca's input is part of the content, and there by itself for the one
    template that has a section for it; a content that is null is left out, as `apply_chat_template` leaves it out."""
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
        as_dict |= dict.fromkeys(REASONING, thoughts)  # templates read the one or the other
    return as_dict


def render(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
    prompt: bool = False,
) -> str:
    """The text of a conversation, the same that `tokenizer.apply_chat_template` gives, but for the date: templates that
    ask for today's get `_DATE`.

    Args:
        messages: from `as_dicts`.
        template: jinja source, from `resolve_template`.
        special_tokens: `tokenizer.special_tokens_map`, what templates call bos_token, eos_token and so on.
        prompt: end where the assistant's next turn begins.

    Raises `BadRow` if the template refuses the conversation.
    """
    return _render(messages, template, special_tokens, tools, add_generation_prompt=prompt)[0]


def render_marked(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """As `render`, and the stretches of characters that the template's generation markers enclose."""
    return _render(messages, template, special_tokens, tools, return_assistant_tokens_mask=True)


def _render(
    messages: list[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    tools: Sequence[dict[str, Any]],
    **options: bool,
) -> tuple[str, list[tuple[int, int]]]:
    if any("content" not in message for message in messages) and _needs_content(template):
        messages = [{"content": "", **message} for message in messages]
    try:
        # What apply_chat_template calls, which costs a fifth more.  It compiles each template once.
        rendered: Any = render_jinja_template(
            [messages], tools=list(tools) or None, chat_template=_on_one_day(template), **{**special_tokens, **options}
        )
    except jinja2.TemplateSyntaxError:
        raise
    except Exception as error:  # a template is a program: it may divide by zero, or recurse without an end
        if not messages:
            raise BadRow("the conversation begins with the assistant, which the chat template cannot render") from None
        raise BadRow(f"the chat template refuses the conversation: {error}") from None
    (text,), spans = rendered
    return text, spans[0] if spans else []


# Llama 3.2's template writes today's date, so that a row would have other tokens every day: a cache, a stream that is
# resumed and other processes after midnight would differ.  This is the date that Llama's templates fall back to.
_DATE = datetime(2024, 7, 26)
_DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdejmyYFDHIMSpTRxX"))


@functools.lru_cache(maxsize=8)
def _on_one_day(template: str) -> str:
    """The template with `strftime_now` as a macro that knows one date.  (Passed as a variable, transformers 5.23 would
    replace the function by its name.)"""
    if "strftime_now" not in template:
        return template
    dates = "".join(f" | replace('{code}', '{_DATE.strftime(code)}')" for code in _DATE_CODES)
    # The line break after a block is not rendered, and what begins a line in the template goes on doing so.
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{dates} -}}}}{{%- endmacro %}}\n{template}"


def _num_lines_before(template: str) -> int:
    return _on_one_day(template).count("\n") - template.count("\n")


@functools.lru_cache(maxsize=8)
def _needs_content(template: str) -> bool:
    """Whether the template fails at a call without content.  Many do, that write an empty one as it should be."""
    call = _sample(_Kind("assistant", False, False, 1, False, False, True))
    dialogue = as_dicts([Message("user", "?"), call])
    try:
        render_jinja_template([dialogue], chat_template=_on_one_day(template), **_NAMES_OF_TOKENS)
    except Exception:  # as in _render
        return True
    return False


@functools.lru_cache(maxsize=8)
def has_markers(template: str) -> bool:
    """Whether the template marks by itself what the assistant writes, with {% generation %}."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


@functools.lru_cache(maxsize=8)
def ends_answers_visibly(template: str) -> bool:
    """Whether the template writes more than blanks after an answer.  Where it does not, they are all that a model can
    learn to stop with; elsewhere they lie between two turns and belong to none."""
    try:
        dialogue = as_dicts([Message("user", "?"), Message("assistant", "!")])
        return not render(dialogue, template, _NAMES_OF_TOKENS).rstrip().endswith("!")
    except BadRow:
        return True


_NAMES_OF_TOKENS: dict[str, Any] = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}


# ----- what a template passes over in silence -------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a message uses of what a template may have no place for."""

    role: str
    has_content: bool
    has_text: bool
    num_calls: int
    """2 stands for several."""
    has_reasoning: bool
    has_thoughts: bool
    """Inside the text, closed by </think>."""
    has_id: bool


def check_has_place(conversation: Conversation, template: str) -> None:
    """Templates pass over in silence what they do not know, and the model would learn answers without their reason.
    (Phi-3-mini's drops the system message, Llama 3.1's the text beside a call, R1's distillates' the thoughts.)

    Raises `BadRow` where a template writes the same whatever a part of the conversation says.  An answer's parts are
    asked about as in the last answer: what templates drop of earlier ones, thoughts for the most part, they drop on
    purpose, and where such an answer is trained on, its turn is not found.
    """
    kinds = tuple([_kind(message) for message in conversation.messages])
    if reason := _left_out_of_any(template, bool(conversation.tools), kinds):
        raise BadRow(reason)


def _kind(message: Message) -> _Kind:
    content, extra = message.content, message.extra
    calls = extra.get("tool_calls") or ()
    return _Kind(
        message.role,
        message.has_content,
        bool(content) and not content.isspace(),
        min(len(calls), 2),
        any(map(extra.get, REASONING)),
        message.role == "assistant" and "</think>" in content,
        bool(extra.get("tool_call_id") or any(call.get("id") for call in calls)),
    )


@functools.lru_cache(maxsize=4096)
def _left_out_of_any(template: str, has_tools: bool, kinds: tuple[_Kind, ...]) -> str | None:
    reasons = (_left_out(template, has_tools, exchange, is_last) for exchange, is_last in _exchanges(kinds))
    return next(filter(None, reasons), None)


def _exchanges(kinds: Sequence[_Kind]) -> list[tuple[tuple[_Kind, ...], bool]]:
    """A question and all up to the next one, after the system messages at the start, and whether it is the last: few
    different ones, however long the conversations are, so that each needs to be tried once."""
    first = next((i for i, kind in enumerate(kinds) if kind.role != "system"), len(kinds))
    exchanges: list[list[_Kind]] = [[]]
    for kind in kinds[first:]:
        exchange = exchanges[-1]
        if kind.role == "user" and exchange and exchange[-1].role != "user":
            exchange = []
            exchanges.append(exchange)
        exchange.append(kind)
        for period in (1, 2):  # a third tool result is as the second, a third round of call and result as well
            last = exchange[-period:]
            if last * 3 == exchange[-3 * period :]:
                del exchange[-period:]
    start = tuple(kinds[:first])
    return [((*start, *exchange), i + 1 == len(exchanges)) for i, exchange in enumerate(exchanges)]


@functools.lru_cache(maxsize=4096)
def _left_out(template: str, has_tools: bool, kinds: tuple[_Kind, ...], is_last: bool) -> str | None:
    """Why conversations with such messages cannot be used, None if they can.  What the template refuses here it may
    refuse for the example's sake: the conversation itself will tell."""
    messages = [_sample(kind) for kind in kinds]
    after = [] if is_last else [Message("user", "And?"), Message("assistant", "Well.")]

    def text(of: Sequence[Message], tool: str = "first") -> str:
        tools = [{"type": "function", "function": {"name": tool, "description": tool, "parameters": {}}}]
        return render(as_dicts(of), template, _NAMES_OF_TOKENS, tools=tools if has_tools else ())

    def writes_the_same(one: Sequence[Message], other: Sequence[Message], tool: str = "first") -> bool:
        try:
            return text(one) == text(other, tool)
        except BadRow:
            return False

    whole = [*messages, *after]
    if has_tools and writes_the_same(whole, whole, "second"):
        return _NO_PLACE.format("tools")
    for i, kind in enumerate(kinds):
        around = messages[: i + 1] if kind.role == "assistant" else whole
        for part, reason in _parts(kind):
            if writes_the_same(around, [*around[:i], _sample(kind, part), *around[i + 1 :]]):
                return reason
    return None


def _parts(kind: _Kind) -> Iterator[tuple[str, str]]:
    """What such a message says, each with the reason why a template that does not write it cannot be used.  (An
    answer's own text is not among it: a turn that is not there is found missing where it is looked for.)"""
    if kind.num_calls:
        yield "calls", _NO_PLACE.format("tool calls")
    if kind.has_reasoning:
        yield (
            "reasoning",
            "the chat template has no place for reasoning_content: choose one that has, or drop the field",
        )
    if kind.has_thoughts:
        yield "thoughts", _LEAVES_OUT.format("the thoughts before </think>", "a part of an answer")
    if kind.has_text and kind.role != "assistant":
        yield "text", _LEAVES_OUT.format(f"the text of {kind.role} messages", "what answers refer to")
    elif kind.has_text and kind.num_calls:
        yield "text", _LEAVES_OUT.format("the text beside tool calls", "a part of an answer")


def _sample(kind: _Kind, changed: str = "") -> Message:
    """A message of a kind, of which one part may say something else."""

    def says(part: str) -> str:
        return "Dolor." if part == changed else "Lorem."

    text = says("text") if kind.has_text else ""
    if kind.has_thoughts:
        text = f"<think>\n{says('thoughts')}\n</think>\n\n{text}"
    extra: dict[str, Any] = {}
    call_id = {"id": "call00001"} if kind.has_id else {}  # nine characters, as Mistral's templates want them
    if kind.num_calls:
        function = {"name": says("calls"), "arguments": {"text": says("calls")}}
        extra["tool_calls"] = [{"type": "function", "function": function, **call_id}] * kind.num_calls
    elif kind.has_id:
        extra["tool_call_id"] = call_id["id"]
    if kind.has_reasoning:
        extra["reasoning_content"] = says("reasoning")
    return Message(kind.role, text, extra=extra, has_content=kind.has_content)


_NO_PLACE = "the chat template has no place for {}: choose one that has, such as chatml"
_LEAVES_OUT = "the chat template leaves out {}, {}: choose one that writes it, such as chatml, or leave it out"
