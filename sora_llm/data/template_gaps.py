"""Parts of a conversation that a chat template silently drops, found by rendering probes once per kind of row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from sora_llm.data.formats import REASONING, Conversation, Message
from sora_llm.data.readers import BadRow
from sora_llm.data.templates import NAMES_OF_TOKENS, as_dicts, has_markers, render


class _Kind(NamedTuple):
    """The features of a message that a template may have no place for."""

    role: str
    has_content: bool
    has_text: bool
    num_calls: int
    """2 means several."""
    has_reasoning: bool
    has_thoughts: bool
    """Inside the text, closed by </think>."""
    has_id: bool
    must_stay: bool
    """Whether it is an answer whose parts must also be written where others follow."""


def check_has_place(conversation: Conversation, template: str, is_trained: Sequence[bool] = ()) -> None:
    """Refuse a conversation if the template renders it the same whatever one of its parts says.

    Templates silently skip parts they do not know, and the model would learn answers without their reason.
    (Phi-3-mini's drops the system message, Llama 3.1's the text alongside a call, those of R1's distillates the
    thoughts.)  An answer's parts are checked as in the last answer: templates drop parts of earlier ones, mostly
    thoughts, on purpose, and if such an answer is trained on, its turn is not found.  Generation markers do find it, so
    with them answers that are trained on are checked where they are.

    Args:
        is_trained: for every message, whether it is trained on; empty: none is.

    Raises:
        BadRow: it does; the message names the part.
    """
    is_marked = has_markers(template)
    kinds = tuple(
        _kind(message, is_marked and trained)
        for message, trained in zip(conversation.messages, is_trained or repeat(False), strict=False)
    )
    if reason := _left_out_of_any(template, bool(conversation.tools), kinds):
        raise BadRow(reason)


def _kind(message: Message, must_stay: bool) -> _Kind:
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
        must_stay and message.role == "assistant",
    )


@functools.lru_cache(maxsize=4096)
def _left_out_of_any(template: str, has_tools: bool, kinds: tuple[_Kind, ...]) -> str | None:
    reasons = (_left_out(template, has_tools, exchange, is_last) for exchange, is_last in _exchanges(kinds))
    return next(filter(None, reasons), None)


def _exchanges(kinds: Sequence[_Kind]) -> list[tuple[tuple[_Kind, ...], bool]]:
    """Each question with everything up to the next one, preceded by the initial system messages, and whether it is the
    last: few distinct ones, however long the conversations are, so that each is tried only once."""
    first = next((i for i, kind in enumerate(kinds) if kind.role != "system"), len(kinds))
    exchanges: list[list[_Kind]] = [[]]
    for kind in kinds[first:]:
        exchange = exchanges[-1]
        if kind.role == "user" and exchange and exchange[-1].role != "user":
            exchange = []
            exchanges.append(exchange)
        exchange.append(kind)
        for period in (1, 2):  # a third tool result is like the second, and so is a third round of call and result
            last = exchange[-period:]
            if last * 3 == exchange[-3 * period :]:
                del exchange[-period:]
    start = tuple(kinds[:first])
    return [((*start, *exchange), i + 1 == len(exchanges)) for i, exchange in enumerate(exchanges)]


@functools.lru_cache(maxsize=4096)
def _left_out(template: str, has_tools: bool, kinds: tuple[_Kind, ...], is_last: bool) -> str | None:
    """Why conversations with such messages cannot be used, None if they can.  If the template refuses a probe, the
    probe itself may be the cause: rendering the real conversation will show."""
    messages = [_sample(kind) for kind in kinds]
    after = [] if is_last else [Message("user", "And?"), Message("assistant", "Well.")]

    def text(of: Sequence[Message], tool: str = "first") -> str:
        tools = [{"type": "function", "function": {"name": tool, "description": tool, "parameters": {}}}]
        return render(as_dicts(of), template, NAMES_OF_TOKENS, tools=tools if has_tools else ())

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
            changed = _sample(kind, part)
            if writes_the_same(around, [*around[:i], changed, *around[i + 1 :]]):
                return reason
            if kind.must_stay and writes_the_same(whole, [*whole[:i], changed, *whole[i + 1 :]]):
                return _LEAVES_OUT_OF_EARLIER.format(_NAMES_OF_PARTS[part])
    return None


def _parts(kind: _Kind) -> Iterator[tuple[str, str]]:
    """The parts of such a message, each with the reason why a template that does not write it cannot be used.  (An
    answer's own text is not included: a missing turn is noticed when it is located.)"""
    if kind.num_calls:
        yield "calls", _NO_PLACE.format("tool calls")
    if kind.num_calls > 1:
        yield "later calls", _NO_PLACE.format("several tool calls in one answer")
    if kind.has_reasoning:
        yield (
            "reasoning",
            "the chat template cannot render reasoning_content: choose one that can, or drop the field",
        )
    if kind.has_thoughts:
        yield "thoughts", _LEAVES_OUT.format("the thoughts before </think>", "a part of an answer")
    if kind.has_text and kind.role != "assistant":
        yield "text", _LEAVES_OUT.format(f"the text of {kind.role} messages", "what answers refer to")
    elif kind.has_text and kind.num_calls:
        yield "text", _LEAVES_OUT.format("the text that accompanies tool calls", "a part of an answer")


def _sample(kind: _Kind, changed: str = "") -> Message:
    """A message of a kind, with different words in the part `changed`."""

    def says(part: str) -> str:
        return "Dolor." if part == changed else "Lorem."

    text = says("text") if kind.has_text else ""
    if kind.has_thoughts:
        text = f"<think>\n{says('thoughts')}\n</think>\n\n{text}"
    extra: dict[str, Any] = {}
    call_id = {"id": "call00001"} if kind.has_id else {}  # nine characters, as Mistral's templates require
    if kind.num_calls:
        words = [says("calls"), says("later calls")][: kind.num_calls]
        functions = [{"name": word, "arguments": {"text": word}} for word in words]
        extra["tool_calls"] = [{"type": "function", "function": function, **call_id} for function in functions]
    elif kind.has_id:
        extra["tool_call_id"] = call_id["id"]
    if kind.has_reasoning:
        extra["reasoning_content"] = says("reasoning")
    return Message(kind.role, text, extra=extra, has_content=kind.has_content)


_NO_PLACE = "the chat template cannot render {}: choose one that can, such as chatml"
_LEAVES_OUT = "the chat template leaves out {}, {}: choose one that writes it, such as chatml, or leave it out"
_LEAVES_OUT_OF_EARLIER = (
    "the chat template leaves out {} of an answer that others follow, which would be learned without: use "
    "train_on_last_turn_only, or choose a template that writes it"
)
_NAMES_OF_PARTS = {
    "calls": "the tool calls",
    "later calls": "all but the first tool call",
    "reasoning": "the reasoning",
    "thoughts": "the thoughts before </think>",
    "text": "the text that accompanies the tool calls",
}
