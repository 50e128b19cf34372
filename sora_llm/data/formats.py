"""Parsing rows: `to_examples` (row → examples), independent of the file format.

Nothing here knows about files or tokenizers.  An unusable row is a `BadRow`, counted by the caller.  Tables fill the
keys that a row does not have with null, so null means absent everywhere.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sora_llm.data.readers import TOO_DEEP, BadRow, Row, nested_too_deeply, type_in_words
from sora_llm.data.sources import DatasetSpec, is_in_parts, load_function
from sora_llm.row_types import IN_PARTS

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_OPENAI_ROLES = _ROLES | {"developer": "system", "function": "tool"}
_CALLING_ROLES = ("function_call", "tool_call")  # in ShareGPT: the turn's text is a call
_SHAREGPT_ROLES = (
    _ROLES
    | {"human": "user", "observation": "tool", "function": "tool"}
    | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", *_CALLING_ROLES), "assistant")
)
_OPENAI_KEYS = (("role", "content"),)
_SHAREGPT_KEYS = (("from", "value"), *_OPENAI_KEYS)
_WEIGHT_KEYS = ("loss_weight", "weight", "train", "training")  # for one idea: LLaMA-Factory, OpenAI, axolotl
_LARGEST_WEIGHT = 3e38  # weights are kept in float32
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names of an answer's thoughts in files, transformers' aliases for one field."""
_EXTRA_TEXTS = ("name", "tool_call_id", *REASONING)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    """Empty if an assistant only calls tools."""
    has_content: bool = field(default=True, kw_only=True)
    """False if a row with calls has no content, or null: templates can tell that from empty content."""
    weight: float | None = None
    """The row's own weight for training on this turn: 0 never, 1 as usual, any number >= 0 scales its loss; None leaves
    it to the options."""
    is_context: bool = False
    """Whether an assistant's turn belongs to the prompt: without a weight of its own it is treated like a user's."""
    input: str = ""
    """Alpaca's input: the alpaca template gives it its own section, others see it appended to the content."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of a turn that templates read: tool_calls (arguments as objects), tool_call_id, name, and thoughts
    under one of the names in `REASONING`."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the assistant may call, each {"type": "function", "function": {"name", ...}}."""


@dataclass(frozen=True)
class PromptCompletion:
    """A text in two parts, the second of which is the answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text to learn as it is."""

    text: str


Example = Conversation | PromptCompletion | Text


def to_examples(row: Row, spec: DatasetSpec) -> list[Example]:
    """The content of a row, independent of its format: one example, or several if the type holds several per row.

    Raises:
        BadRow: the row is unusable; with the reason.
    """
    return _BUILDERS[spec.type](row, spec)


def _alpaca(row: Row, spec: DatasetSpec) -> list[Example]:
    instruction = _filled_text(row, spec.column("instruction"))
    answer = _filled_text(row, spec.column("output"))
    asked = _question_and_answer(instruction, _text(row, spec.column("input"), optional=True), answer)
    return [Conversation(_with_system(row, (*_history(row), *asked.messages), "the instruction"), _tools(row))]


def _history(row: Row) -> Iterator[Message]:
    """The earlier questions and answers that some alpaca files store as pairs in a column `history`."""
    history = row.get("history")
    if history in (None, "", False):
        return
    if not isinstance(history, list | tuple):
        raise BadRow(f"history is {type_in_words(history)}, not a list of pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{i}] is {type_in_words(pair)}, not a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, _filled_text({"text": text}, "text", f"history[{i}]."))


def _with_system(row: Row, messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """The messages, preceded by the system message if the row has one in a column of its own."""
    system = _text(row, "system", optional=True)
    if not system.strip():
        return messages
    if any(message.role == "system" for message in messages):
        raise BadRow(f"system is given twice: in a column of its own and in {place}")
    return (Message("system", system), *messages)


def _self_instruct(row: Row, spec: DatasetSpec) -> list[Example]:
    instruction, column = _filled_text(row, spec.column("instruction")), spec.column("instances")
    examples: list[Example] = []
    for i, instance in enumerate(_filled_list(row, column)):
        place = f"{column}[{i}]"
        _check_object(instance, place)
        answer = _filled_text(instance, "output", f"{place}.")
        asked = _question_and_answer(instruction, _text(instance, "input", f"{place}.", optional=True), answer)
        examples.append(Conversation(_with_system(row, asked.messages, "the instruction"), _tools(row)))
    return examples


def _question_and_answer(instruction: str, input_: str, answer: str) -> Conversation:
    return Conversation((Message("user", instruction, input=input_), Message("assistant", answer)))


def _prompt_completion(row: Row, spec: DatasetSpec) -> list[Example]:
    return [PromptCompletion(_text(row, spec.column("prompt")), _filled_text(row, spec.column("completion")))]


def _completion(row: Row, spec: DatasetSpec) -> list[Example]:
    return [Text(_filled_text(row, spec.column("text")))]


def _openai(row: Row, spec: DatasetSpec) -> list[Example]:
    column = spec.column("messages")
    if is_in_parts([name for name, value in row.items() if value is not None], "messages", spec):
        prompt, completion = IN_PARTS["messages"]
        before = _messages(row, prompt, _OPENAI_KEYS, _OPENAI_ROLES)
        after = _messages(row, completion, _OPENAI_KEYS, _OPENAI_ROLES)
        messages = (*(replace(message, is_context=True) for message in before), *after)
    else:
        messages = _messages(row, column, _OPENAI_KEYS, _OPENAI_ROLES)
    return [Conversation(_with_system(row, messages, column), _tools(row))]


def _sharegpt(row: Row, spec: DatasetSpec) -> list[Example]:
    column = spec.column("conversations")
    messages = _messages(row, column, _SHAREGPT_KEYS, _SHAREGPT_ROLES)
    return [Conversation(_with_system(row, messages, column), _tools(row))]


def _custom(row: Row, spec: DatasetSpec) -> list[Example]:
    """Messages, with or without tools and a system message beside them, as the data set's own function makes them from
    the row."""
    name = str(spec.function)
    function = load_function(name)
    try:
        returned = function(row)
    except (Exception, SystemExit) as error:  # whatever its code raises
        raise BadRow(f"{name} raised {type(error).__name__}: {error}") from error
    if isinstance(returned, list):
        returned = {"messages": returned}
    if not isinstance(returned, dict):
        raise BadRow(
            f"{name} returned {type_in_words(returned)}, neither a list of messages nor an object with messages and "
            "perhaps tools"
        )
    try:
        messages = _messages(returned, "messages", _OPENAI_KEYS, _OPENAI_ROLES)
        return [Conversation(_with_system(returned, messages, "messages"), _tools(returned))]
    except BadRow as bad:
        raise BadRow(f"what {name} returned cannot be used: {bad}") from None


_BUILDERS: dict[str, Callable[[Row, DatasetSpec], list[Example]]] = {
    "alpaca": _alpaca,
    "messages": _openai,
    "sharegpt": _sharegpt,
    "completion": _completion,
    "prompt_completion": _prompt_completion,
    "self_instruct": _self_instruct,
    "custom": _custom,
}


# ----- values, each named by its place in the row ---------------------------------------------------------------------


def _text(values: Mapping[str, Any], key: str, prefix: str = "", *, optional: bool = False) -> str:
    """The text under a key; `prefix` is the place of `values` in the row."""
    value, place = values.get(key), prefix + key
    if value is None and optional:
        return ""
    if key not in values:
        raise BadRow(f"{place} is missing")
    if not isinstance(value, str):
        remedy = (
            "; rows of messages are of type messages"
            if isinstance(value, list) and value and isinstance(value[0], dict)
            else ""
        )
        raise BadRow(f"{place} is {type_in_words(value)}, not text{remedy}")
    return whole_characters(value, place)


def _filled_text(values: Mapping[str, Any], key: str, prefix: str = "") -> str:
    text = _text(values, key, prefix)
    if not text.strip():
        raise BadRow(f"{prefix}{key} is empty")
    return text


def whole_characters(text: str, place: str) -> str:
    """The text, unless it has half a surrogate pair (BadRow): JSON can hold one, tokenizers fail on it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{place} holds half a surrogate pair, {text[error.start]!r}, not a character") from None
    return text


def _filled_list(values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list):
        raise BadRow(f"{key} is {type_in_words(value)}, not a list" if key in values else f"{key} is missing")
    if not value:
        raise BadRow(f"{key} is empty")
    return value


def _check_object(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {type_in_words(value)}, not an object with keys")


def _parsed(value: Any, place: str) -> Any:
    """A value given as JSON text or as it is; checked, since templates may write it as JSON again."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"{place} is not valid JSON ({error})") from None
    if nested_too_deeply(value):
        raise BadRow(f"{place} is {TOO_DEEP}")
    return value


# ----- conversations --------------------------------------------------------------------------------------------------


def _messages(
    row: Row, column: str, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str]
) -> tuple[Message, ...]:
    turns = _filled_list(row, column)
    return tuple(_message(turn, f"{column}[{i}]", keys, roles) for i, turn in enumerate(turns))


def _message(turn: Any, place: str, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str]) -> Message:
    _check_object(turn, place)
    # The first accepted pair of keys whose role is present.
    role_key, content_key = next((pair for pair in keys if turn.get(pair[0]) is not None), keys[0])
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise BadRow(f"{place}.{role_key} is {reprlib.repr(role)}; known are {', '.join(roles)}")
    extra: dict[str, Any] = {key: _text(turn, key, f"{place}.") for key in _EXTRA_TEXTS if turn.get(key) is not None}
    if role in _CALLING_ROLES:
        calls, content = _calls(content, f"{place}.{content_key}"), None
        if not calls:
            raise BadRow(f"{place}.{content_key} holds no call")
    else:
        calls = _calls_beside_content(turn, place)
    if calls and roles[role] != "assistant":
        raise BadRow(f"{place} calls a tool, but a turn of role {role} cannot")
    text = "" if calls and content is None else _content(content, f"{place}.{content_key}")
    if roles[role] == "assistant" and not calls and not text.strip():
        raise BadRow(f"{place}.{content_key}, an assistant's turn, is empty")
    if calls:
        extra["tool_calls"] = calls
    has_content = content is not None or not calls
    return Message(roles[role], text, _weight(turn, place), extra=extra, has_content=has_content)


def _content(content: Any, place: str) -> str:
    """Text, from a string or from a list of typed parts that are all text."""
    if isinstance(content, str):
        return whole_characters(content, place)
    if not isinstance(content, list):
        raise BadRow(f"{place} is {type_in_words(content)}, not text or a list of text parts")
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadRow(f"{place} is {reprlib.repr(kind)}, and only parts of type 'text' can be trained on")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if not isinstance(text, str):
        raise BadRow(f"{place} has no text")
    return whole_characters(text, place)


def _weight(turn: dict[str, Any], place: str) -> float | None:
    """The turn's own weight or flag, None if it has neither."""
    weights = {key: turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in weights.items():
        # A comparison with nan is false; true and false are 1 and 0.
        if not isinstance(weight, int | float) or not 0 <= weight <= _LARGEST_WEIGHT:
            raise BadRow(f"{place}.{key} is {reprlib.repr(weight)}; it must be true, false or a number >= 0")
    if len(set(weights.values())) > 1:
        raise BadRow(f"{place} contradicts itself: {weights}")
    return float(next(iter(weights.values()))) if weights else None


# ----- tools ----------------------------------------------------------------------------------------------------------


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers: a list or its JSON text; in OpenAI's old files they are called `functions`."""
    value = row.get("tools") or row.get("functions")
    if value is None or value == "":
        return ()
    tools = _parsed(value, "tools")
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise BadRow(f"tools is {type_in_words(tools)}, not a list")
    return tuple(_function(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def _calls_beside_content(turn: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls under OpenAI's tool_calls, or under its predecessor function_call."""
    given = [key for key in ("tool_calls", "function_call") if turn.get(key)]
    if len(given) > 1:
        raise BadRow(f"{place} has both tool_calls and function_call")
    return _calls(turn[given[0]], f"{place}.{given[0]}") if given else []


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them, from one call or a list of calls, or its JSON text."""
    calls = _parsed(value, place)
    if not isinstance(calls, list):
        return [_call(calls, place)]
    return [_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _call(value: Any, place: str) -> dict[str, Any]:
    call = _function(value, place)
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form
        arguments = _parsed(arguments, f"{place}: arguments")
    if arguments is not None:
        _check_object(arguments, f"{place}: arguments")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _function(value: Any, place: str) -> dict[str, Any]:
    """A tool or a call as {"type": "function", "function": {"name", ...}}, also if only the inner object is given."""
    _check_object(value, place)
    if "function" not in value:
        value = {"type": "function", "function": {key: item for key, item in value.items() if key != "type"}}
    _check_object(value["function"], f"{place}.function")
    _filled_text(value["function"], "name", f"{place}: ")
    return {**value, "type": "function"}
