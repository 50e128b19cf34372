"""Chat templates as models are published with: TRL ships some seventy of them.

The texts of a conversation are words that occur once, so where a word ends up tells whether it is trained on.
"""

from __future__ import annotations

import itertools
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared
from transformers import AutoTokenizer

from sora_llm.data.formats import Conversation, to_examples
from sora_llm.data.prompts import encode_chat, generation_prefix, merges_trailing_whitespace
from sora_llm.data.readers import BadRow
from sora_llm.data.show import decoded
from sora_llm.data.sources import DatasetSpec
from sora_llm.data.tokenize import tokenize_examples

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC is not None and SPEC.origin else None
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))} if FOLDER else {}
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL, which ships them, is not installed (Python 3.10)")
of_each = pytest.mark.parametrize("name", TEMPLATES or ["none"])

OF_IMAGES = {f"{name}{form}" for name in ("idefics3", "llava_next", "smolvlm") for form in ("", "_training")}
"""They take lists of parts alone, and refuse text."""
NAMES_OF_TOKENS = re.compile(
    r"<\|[^|<>'\" ]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]|<\|?(?:turn|channel|tool_\w+)\|?>"
)
NUM_CONVERSATIONS = 12


def tokenizer_for(template: str) -> Any:
    """A real one, in which the names of the template's tokens are tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared("models/base5m"))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(NAMES_OF_TOKENS.findall(template)))})
    return tokenizer


def conversation(choose: random.Random) -> tuple[dict[str, Any], list[list[str]]]:
    """A random row and, for each of its messages, the words in it."""
    numbers = itertools.count(100)
    messages: list[dict[str, Any]] = []
    words: list[list[str]] = []

    def word() -> str:
        words[-1].append(f"w{next(numbers)}z")
        return words[-1][-1]

    def add(role: str, **fields: Any) -> dict[str, Any]:
        words.append([])
        messages.append({"role": role, "content": word(), **fields})
        return messages[-1]

    if choose.random() < 0.4:
        add("system")
    has_tools = choose.random() < 0.5
    for _ in range(choose.choice([1, 1, 2, 3])):
        add("user")
        for _ in range(choose.choice([0, 1, 1, 2]) if has_tools else 0):
            add_calls(choose, add, word)
        answer = add("assistant")
        if choose.random() < 0.3:
            answer["reasoning_content"] = word()
    function = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
    return {"messages": messages, "tools": [{"type": "function", "function": function}] if has_tools else None}, words


def add_calls(choose: random.Random, add: Any, word: Any) -> None:
    """Up to three calls at once, and their results."""
    message = add("assistant")
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": "look", "arguments": {"at": word()}}}
        for i in range(choose.choice([1, 1, 2, 3]))
    ]
    message["tool_calls"] = calls
    if choose.random() < 0.3:
        message["reasoning_content"] = word()
    for call in calls:
        add("tool", name="look", tool_call_id=call["id"])


@of_each
@pytest.mark.parametrize("last_only", [False, True], ids=["all answers", "the last answer"])
def test_the_words_of_answers_are_trained_on_and_no_others_or_the_row_is_refused(name: str, last_only: bool) -> None:
    template, choose = TEMPLATES[name], random.Random(7)
    tokenizer = tokenizer_for(template)
    num_taken = 0
    for _ in range(NUM_CONVERSATIONS):
        row, words = conversation(choose)
        examples = to_examples(row, DatasetSpec("x.jsonl", "messages"))
        (taken,) = tokenize_examples(examples, tokenizer, template, train_on_last_turn_only=last_only)
        if isinstance(taken, BadRow):
            continue
        num_taken += 1
        answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        learned, given = (
            "\0".join(text for text, on in decoded(taken, tokenizer) if (on > 0) is want) for want in (True, False)
        )
        for i, of_message in enumerate(words):
            is_trained = i in (answers[-1:] if last_only else answers)
            assert all((word in learned) is is_trained for word in of_message), row["messages"][i]
            assert not (is_trained and any(word in given for word in of_message)), row["messages"][i]
    assert bool(num_taken) is (name not in OF_IMAGES), "or nothing was seen"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in OF_IMAGES] or ["none"])
def test_a_prompt_is_what_came_before_the_answer_in_training_or_a_warning_is_given(name: str) -> None:
    template = TEMPLATES[name]
    tokenizer = tokenizer_for(template)
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (conversation,) = to_examples({"messages": row}, DatasetSpec("x.jsonl", "messages"))
    assert isinstance(conversation, Conversation)
    (taken,) = tokenize_examples([conversation], tokenizer, template)
    assert not isinstance(taken, BadRow), taken
    ids, weights = taken
    before = ids[: np.flatnonzero(weights)[0]].tolist()
    is_warned = bool(generation_prefix(tokenizer, template)) or merges_trailing_whitespace(tokenizer, template)
    prompt = encode_chat(tokenizer, conversation.messages[:1], template)
    is_same = prompt[: len(before)] == before and ids[: len(prompt)].tolist() == prompt
    assert is_same is not is_warned
