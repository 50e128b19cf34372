"""Example → token ids and, per token, whether it is trained on.

`supervised[i]` says that token i is a target, predicted from the tokens before it: the model shifts, we do not.
Which tokens belong to an answer is found by comparing tokens: those of the whole sequence with those of the
conversation up to the answer, as the model will see it when it has to answer.  Searching the text for role names
would find them in what users write.

Texts are tokenised as the tokenizer does it and its vocabulary is never changed: under a base model the markers of
chatml or llama-3 are then several ordinary tokens each, which the model learns like any text.
"""

from __future__ import annotations

import functools
import re
from itertools import groupby, takewhile
from operator import eq
from pathlib import Path
from typing import Any

import jinja2

from sora_llm.data.formats import BadRow, Conversation, Example, Message, PromptCompletion
from sora_llm.errors import UserError

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), a system message in place of its preamble,
# further turns as further sections.  Every answer ends with eos, whose token every base model has.
_ALPACA = """
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
    {{- '\\n\\n### Instruction:\\n' + (message.instruction or message.content) -}}
    {{- '\\n\\n### Input:\\n' + message.input if message.input else '' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '\\n\\n### Response:\\n' + message.content + eos_token -}}
  {%- elif message.role != 'system' or not loop.first -%}
    {{- raise_exception('the alpaca template has no place for this ' + message.role + ' message') -}}
  {%- endif -%}
{%- endfor -%}
{{- '\\n\\n### Response:\\n' if add_generation_prompt else '' -}}
"""

_CHATML = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""

# Meta's format but for one thing: Meta writes <s> before every question, we only at the start, so that a sequence
# has exactly one.  (A chat model that expects the others brings its own template.)
_LLAMA_2 = """
{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\\n' + messages[0].content | trim + '\\n<</SYS>>\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('the llama-2 template needs user and assistant in turn, after at most one system message') -}}
  {%- elif message.role == 'user' -%}
    {{- '[INST] ' + (system if loop.first else '') + message.content | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message.content | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

_LLAMA_3 = """
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}
"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "llama-2": _LLAMA_2, "llama-3": _LLAMA_3}
"""The built-in chat templates, jinja sources by name."""

DEFAULT_TEMPLATE = "alpaca"
"""For tokenizers without a template, those of base models: plain text, and answers that end with eos."""


def resolve_template(tokenizer: Any, name: str | None) -> str:
    """The jinja source of the chat template to use.

    Args:
        name: a built-in (`TEMPLATES`), the path of a jinja file, or None for the tokenizer's own template and, where
            it has none, `DEFAULT_TEMPLATE`.

    Raises `UserError` for an unknown name and for a template that is not valid jinja.
    """
    source = _template_source(tokenizer, name)
    try:
        _render(tokenizer, source, (Message("user", "?"),))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat template {name or 'of the tokenizer'}:{error.lineno} is not valid jinja: {error.message}"
        ) from None
    except BadRow:
        pass  # a template may refuse this one message and still serve the data; rows that it refuses are counted
    return source


def _template_source(tokenizer: Any, name: str | None) -> str:
    if name is None:
        return _own_template(tokenizer) or TEMPLATES[DEFAULT_TEMPLATE]
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = Path(name).expanduser()
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


def tokenize_example(
    example: Example,
    tokenizer: Any,
    template: str,
    *,
    train_on_inputs: bool = False,
    train_on_last_turn_only: bool = False,
    separator: str = "",
) -> tuple[list[int], list[bool]]:
    """Token ids of an example and which of them are supervised.

    Conversations: `template` renders them; supervised are the assistant's turns with their end-of-turn token, all
    but what their messages exclude.  Prompt and completion: joined as text with `separator` and tokenised together,
    supervised from the end of the longest common prefix with the tokenised prompt.  Texts: everything.  The latter
    two end with eos.  There is exactly one BOS at the start where the tokenizer uses one, whether it or the template
    writes it; position 0 has nothing before it and is never supervised.

    Args:
        template: jinja source, from `resolve_template`.
        train_on_inputs: supervise prompts as well.
        train_on_last_turn_only: supervise the last assistant turn alone.

    Raises `BadRow` where the template refuses the conversation or hides which tokens belong to a turn.
    """
    if isinstance(example, Conversation):
        ids, supervised = _tokenize_conversation(
            example.messages, tokenizer, template, train_on_inputs, train_on_last_turn_only
        )
    elif isinstance(example, PromptCompletion):
        prompt = example.prompt + separator
        ids = _with_eos(tokenizer, prompt + example.completion)
        answer_start = 0 if train_on_inputs else _common_prefix(ids, _encode(tokenizer, prompt))
        supervised = [i >= answer_start for i in range(len(ids))]
    else:
        ids = _with_eos(tokenizer, example.text)
        supervised = [True] * len(ids)
    supervised[:1] = [False] * len(supervised[:1])
    return ids, supervised


# ----- text → ids -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _automatic_bos(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer puts one before a text.  Asked by doing: in transformers 5 `add_bos_token` is
    False on LLaMA's tokenizers, which add it all the same."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, after one BOS where the tokenizer uses one; never an EOS (a prefix of a text has none)."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = _automatic_bos(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _with_eos(tokenizer: Any, text: str) -> list[int]:
    ids = _encode(tokenizer, text)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))


# ----- conversations --------------------------------------------------------------------------------------------------


def _tokenize_conversation(
    messages: tuple[Message, ...], tokenizer: Any, template: str, train_on_inputs: bool, last_turn_only: bool
) -> tuple[list[int], list[bool]]:
    text = _render(tokenizer, template, messages)
    ids = _encode(tokenizer, text)
    supervised = [train_on_inputs] * len(ids)
    wanted = _wanted_turns(messages, train_on_inputs, last_turn_only)
    marked = _marked_spans(messages, tokenizer, template, ids) if _has_markers(template) and tokenizer.is_fast else {}
    for i, want in enumerate(wanted):
        if want != train_on_inputs:
            start, end = marked.get(i) or _turn_span(i, messages, tokenizer, template, text, ids)
            supervised[start:end] = [want] * (end - start)
    return ids, supervised


def _wanted_turns(messages: tuple[Message, ...], train_on_inputs: bool, last_turn_only: bool) -> list[bool]:
    """Which turns to train on: what a message says of itself, else what the options say."""
    last_answer = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return [
        (message.supervise if message.supervise is not None else train_on_inputs or message.role == "assistant")
        and (not last_turn_only or i == last_answer)
        for i, message in enumerate(messages)
    ]


def _as_dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    """Messages as templates expect them.  Alpaca's input is part of the content, and there by itself for the one
    template that has a section for it."""
    return [
        {"role": message.role, "content": message.content}
        if not message.input
        else {
            "role": message.role,
            "content": f"{message.content}\n\n{message.input}",
            "instruction": message.content,
            "input": message.input,
        }
        for message in messages
    ]


def _render(tokenizer: Any, template: str, messages: tuple[Message, ...], *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt` it ends where the assistant's next turn begins."""
    try:
        # A batch of one: on its own, a conversation without messages yet is refused by transformers.
        return tokenizer.apply_chat_template(
            [_as_dicts(messages)], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )[0]
    except jinja2.TemplateSyntaxError:
        raise
    except (jinja2.TemplateError, TypeError) as error:
        if not messages:
            raise BadRow("the conversation begins with the assistant, which the chat template cannot render") from None
        raise BadRow(f"the chat template refuses the conversation: {error}") from None


def _turn_span(
    i: int, messages: tuple[Message, ...], tokenizer: Any, template: str, text: str, ids: list[int]
) -> tuple[int, int]:
    """First token of turn i and the one after its last, by what the turn adds to the conversation before it."""
    before, is_answer = messages[:i], messages[i].role == "assistant"
    so_far = _render(tokenizer, template, messages[: i + 1]) if i + 1 < len(messages) else text
    _check_prefix(so_far, tokenizer, text, ids)
    end = _common_prefix(ids, _encode(tokenizer, so_far))
    start = 0
    if before:
        _check_prefix(_render(tokenizer, template, before), tokenizer, text, ids)
    if before or is_answer:
        start = _common_prefix(ids, _encode(tokenizer, _render(tokenizer, template, before, prompt=is_answer)))
    return start, _without_trailing_blanks(tokenizer, ids, start, end)


def _check_prefix(part: str, tokenizer: Any, text: str, ids: list[int]) -> None:
    """The rendered part must begin the rendered whole, but for closing tokens (some templates end every text with
    eos).  Templates that move the system message or drop old reasoning write a turn differently once others follow;
    a common prefix then ends too early, and the loss would miss the answer or cover the question."""
    if text.startswith(part):
        return
    part_ids = _encode(tokenizer, part)
    for token in part_ids[_common_prefix(part_ids, ids) :]:
        if token not in tokenizer.all_special_ids and not _is_blank(tokenizer, token):
            raise BadRow(
                "the chat template writes a turn differently when others follow, so that its tokens cannot be found: "
                "use train_on_last_turn_only, or a template with {% generation %} markers"
            )


def _without_trailing_blanks(tokenizer: Any, ids: list[int], start: int, end: int) -> int:
    """The end of a turn without the line break that templates write after its end-of-turn marker."""
    while end > start and _is_blank(tokenizer, ids[end - 1]):
        end -= 1
    return end


def _is_blank(tokenizer: Any, token: int) -> bool:
    return not tokenizer.decode([token]).strip()


def _has_markers(template: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def _marked_spans(
    messages: tuple[Message, ...], tokenizer: Any, template: str, ids: list[int]
) -> dict[int, tuple[int, int]]:
    """The assistant's turns and the token spans that the template's generation markers give them."""
    marked = tokenizer.apply_chat_template(
        [_as_dicts(messages)], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = marked["assistant_masks"][0]
    offset = len(ids) - len(mask)  # the BOS that the template left to us
    runs = [list(run) for inside, run in groupby(range(len(mask)), key=lambda i: mask[i]) if inside]
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if len(runs) != len(answers):
        raise BadRow(f"the template's generation markers give {len(runs)} spans for {len(answers)} assistant turns")
    return {i: (run[0] + offset, run[-1] + 1 + offset) for i, run in zip(answers, runs, strict=True)}


def encode_prompt(tokenizer: Any, prompt: str, template: str | None) -> list[int]:
    """Ids that a model goes on from: `prompt` as a user's turn with the assistant's opened, or, without a template,
    as it is."""
    if template is None:
        return _encode(tokenizer, prompt)
    return _encode(tokenizer, _render(tokenizer, template, (Message("user", prompt),), prompt=True))
