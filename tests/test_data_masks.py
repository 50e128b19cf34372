"""Weights of random conversations: whatever users and assistants write, the tokens to train on are the answers'.

The expectations are restated here from strings that `apply_chat_template` renders: turn i is what rendering i + 1
messages adds to rendering i of them (for an answer: with the prompt opened), without the blanks at its end.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import SHARED
from conversations import ADD, TOOL_TEXTS, WithoutOffsets, call, needs_models
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import Conversation, Message, PromptCompletion
from sora_llm.data.templates import as_dicts
from sora_llm.data.tokenize import tokenize_examples

MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKERS += ("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>")

# ----- tokenizers -----------------------------------------------------------------------------------------------------

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def like_llama_3(*, special: tuple[str, ...], trim_offsets: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins punctuation with line breaks, and line breaks and blanks with their like."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    texts = ["### Response:\n\nassistant\n\n\n  x>\n</s>\n\n    .\n USER: ASSISTANT: 12 123"] * 9
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *special)])
    bos = processors.TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), bos])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@functools.cache
def tokenizer_named(name: str) -> Any:
    if name == "markers are tokens":
        return like_llama_3(special=MARKERS, trim_offsets=False)
    if name == "offsets without blanks":
        return like_llama_3(special=(), trim_offsets=True)
    return AutoTokenizer.from_pretrained(SHARED / "models" / name)


REAL = ("base5m", "stories260k")
TOKENIZERS = [
    *(pytest.param(name, marks=needs_models) for name in REAL),
    "markers are tokens",
    "offsets without blanks",
]


def bytes_of(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """What each token stands for."""
    added = tokenizer.added_tokens_decoder
    letters = byte_letters()
    found = []
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token in added:
            found.append(piece.encode())
        elif tokenizer.backend_tokenizer.pre_tokenizer.__class__.__name__ != "Metaspace":
            found.append(bytes(letters[letter] for letter in piece))
        else:
            is_byte = piece.startswith("<0x") and len(piece) == 6
            found.append(bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode())
    return found


@functools.cache
def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte, inverted: printable bytes are their own, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ----- conversations --------------------------------------------------------------------------------------------------

TRAPS = (*MARKERS, "### Response:", "### Instruction:\n", "ASSISTANT:", "USER: ", "assistant", "model\n", "</s>", "<s>")
TRAPS += ("\n", "\n\n", " ", "  ", "\t", "\r\n", "\u2028", "🙂", "数", "e\u0301", "12", "'s", "x", ":", "{{ x }}")
# Half surrogates are no characters; ▁ is what sentencepiece writes for a blank, so that the two cannot be told apart.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXT = st.lists(st.sampled_from(TRAPS) | st.text(LETTERS, max_size=4), max_size=6).map("".join)
ANSWER = st.tuples(TEXT, st.sampled_from("aZ?数"), TEXT).map("".join)  # (formats refuse an empty one)
WEIGHT = st.sampled_from([None, None, 0.0, 0.5, 1.0, 3.0])


NO_WEIGHT = st.none()


@st.composite
def conversations(draw: st.DrawFn, weights: st.SearchStrategy[float | None] = NO_WEIGHT) -> Conversation:
    """One to five exchanges, with a system message or without."""
    messages = [Message("system", draw(TEXT), draw(weights))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        messages += [Message("user", draw(TEXT), draw(weights)), Message("assistant", draw(ANSWER), draw(weights))]
    return Conversation(tuple(messages))


class Turn(NamedTuple):
    """A turn in the rendered text, (first character, one past its last)."""

    message: Message
    start: int
    end: int


def rendered(conversation: Conversation, tokenizer: Any, name: str) -> tuple[str, list[Turn]]:
    """The text and its turns; fails where the template does more than append."""
    dicts, tools = as_dicts(conversation.messages), list(conversation.tools) or None

    def up_to(number: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            [dicts[:number]],
            tools=tools,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=prompt,
        )[0]

    text, turns = up_to(len(dicts)), []
    for i, message in enumerate(conversation.messages):
        before = up_to(i, prompt=message.role == "assistant") if i else ""
        after = up_to(i + 1)
        assert after.startswith(before) and text.startswith(after)
        turns.append(Turn(message, len(before), len(after.rstrip())))
    return text, turns


def tokenized(example: Any, tokenizer: Any, name: str, **options: Any) -> tuple[list[int], np.ndarray]:
    ((ids, weights),) = tokenize_examples([example], tokenizer, TEMPLATES[name], **options)
    return ids.tolist(), weights


def places(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]]:
    """The bytes of the text that each token stands for, (first, one past the last); nothing for a BOS and for the
    blank that sentencepiece puts at the start, which are no part of it."""
    pieces = bytes_of(tokenizer, ids)
    extra = len(b"".join(pieces)) - len(text.encode())
    ends = np.cumsum([len(piece) for piece in pieces]) - extra
    assert b"".join(pieces)[extra:] == text.encode() and b"".join(pieces)[:extra] in (b"", b"<s>", b"<s> ")
    return [(max(end - len(piece), 0), max(end, 0)) for piece, end in zip(pieces, ends.tolist(), strict=True)]


def in_bytes(text: str, turns: list[Turn]) -> Iterator[Turn]:
    for message, start, end in turns:
        yield Turn(message, len(text[:start].encode()), len(text[:end].encode()))


def across(place: tuple[int, int], *borders: int) -> bool:
    return any(place[0] < border < place[1] for border in borders)


every_template = pytest.mark.parametrize("name", TEMPLATES)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)


# ----- properties -----------------------------------------------------------------------------------------------------


@every_tokenizer
@every_template
def test_decoding_the_supervised_tokens_gives_the_answers_as_the_template_renders_them(name, tokenizer):
    """With their end tokens, and nothing else.  There is one deviation: a token that lies across the border of an
    answer is supervised as a whole.  It takes a template that writes line breaks before answers and does not trim
    them (alpaca, chatml), an answer that begins with some more, and a tokenizer with a token such as ":\\n\\n"; or
    one that joins the end of an end marker which is no token of its own with the line break after it.  It cannot be
    avoided: the tokenizer gives no other tokens for this text.  Neither real tokenizer has such tokens."""
    is_real, tokenizer = tokenizer in REAL, tokenizer_named(tokenizer)

    @settings(max_examples=20)
    @given(conversations())
    def check(conversation: Conversation) -> None:
        text, turns = rendered(conversation, tokenizer, name)
        ids, weights = tokenized(conversation, tokenizer, name)
        token_places = places(tokenizer, ids, text)
        for message, start, end in in_bytes(text, turns):
            if message.role != "assistant":
                continue
            inside = [i for i, place in enumerate(token_places) if place[0] < end and place[1] > start]
            assert (weights[inside] == 1).all()
            weights[inside] = 0  # so that what is left at the end belongs to no answer
            whole = [i for i in inside if not across(token_places[i], start, end)]
            answer, found = text.encode()[start:end].decode(), decoded(tokenizer, ids, whole)
            assert found == answer or (len(whole) < len(inside) and found in answer and not is_real)
        assert not weights.any()

    check()


def decoded(tokenizer: Any, ids: list[int], tokens: list[int]) -> str:
    """Text of tokens that follow each other, in their place: alone, a first one would lose the blank that it begins
    with."""
    if not tokens:
        return ""
    return tokenizer.decode(ids[: tokens[-1] + 1])[len(tokenizer.decode(ids[: tokens[0]])) :]


@every_tokenizer
@every_template
def test_every_token_has_the_weight_of_its_turn_under_every_option(name, tokenizer):
    is_real, tokenizer = tokenizer in REAL, tokenizer_named(tokenizer)

    @settings(max_examples=15)
    @given(conversations(WEIGHT), st.sampled_from(["", "train_on_inputs", "train_on_last_turn_only"]))
    def check(conversation: Conversation, option: str) -> None:
        text, turns = rendered(conversation, tokenizer, name)
        weight_of_byte = np.full(len(text.encode()), option == "train_on_inputs", dtype=np.float32)
        for message, start, end in in_bytes(text, turns):
            usual = option == "train_on_inputs" or message.role == "assistant"
            weight_of_byte[start:end] = usual if message.weight is None else message.weight
            if option == "train_on_last_turn_only" and message is not conversation.messages[-1]:
                weight_of_byte[start:end] = 0
        ids, weights = tokenized(conversation, tokenizer, name, **({option: True} if option else {}))
        assert weights[0] == 0
        for i, (start, end) in enumerate(places(tokenizer, ids, text)[1:], start=1):
            expected = set(weight_of_byte[start : max(end, start + 1)].tolist())
            assert weights[i] in expected and (len(expected) == 1 or not is_real)

    check()


@every_tokenizer
@every_template
def test_masks_by_position_are_those_of_longest_common_token_prefixes(name, tokenizer):
    """The other way to find a turn: tokenise the conversation before it and the one up to its end, and see how far
    the whole has the same tokens.  (Where a token lies across a border the two may differ: by prefixes, tokens before
    it may count as the answer's, or the end of an answer as what follows.)"""
    if tokenizer == "offsets without blanks" and name in ("chatml", "gemma"):
        pytest.skip("in every conversation a token holds the end of an end marker and the line break after it")
    tokenizer = tokenizer_named(tokenizer)

    @settings(max_examples=15)
    @given(conversations())
    def check(conversation: Conversation) -> None:
        text, turns = rendered(conversation, tokenizer, name)
        ids, weights = tokenized(conversation, tokenizer, name)
        _, slow = tokenized(conversation, WithoutOffsets(tokenizer), name)
        token_places = places(tokenizer, ids, text)
        by_prefixes = np.zeros(len(ids))
        for (message, start, end), turn in zip(in_bytes(text, turns), turns, strict=True):
            assume(not any(across(place, start, end) for place in token_places))  # fails if too few are left
            if message.role == "assistant":
                first, last = (same_at_start(ids, encoded(tokenizer, text[:cut])) for cut in turn[1:])
                by_prefixes[first:last] = 1
        assert by_prefixes.tolist() == weights.tolist() == slow.tolist()

    check()


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def same_at_start(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@every_tokenizer
def test_completions_are_supervised_from_the_longest_common_prefix_with_the_tokenised_prompt(tokenizer):
    tokenizer = tokenizer_named(tokenizer)

    @settings(max_examples=100)
    @example("a  ", "a")  # tokenizers cut several blanks according to what follows
    @given(TEXT, ANSWER)
    def check(prompt: str, completion: str) -> None:
        for a, b in ((prompt, completion), (prompt + completion, completion), (prompt + " ", completion)):
            ids, weights = tokenized(PromptCompletion(a, b), tokenizer, "alpaca")
            whole = encoded(tokenizer, a + b)
            assert ids == (whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id])
            first = max(same_at_start(ids, encoded(tokenizer, a)), 1)
            assert weights.tolist() == [0] * first + [1] * (len(ids) - first)

    check()


@pytest.mark.parametrize("name", TOOL_TEXTS)
def test_templates_with_tools_append_and_supervise_calls_and_answers(name):
    tokenizer = tokenizer_named("markers are tokens")

    @settings(max_examples=30)
    @given(st.booleans(), TEXT, ANSWER, st.lists(st.integers(0, 1), max_size=2), TEXT)
    def check(has_system: bool, question: str, answer: str, rounds: list[int], result: str) -> None:
        messages = [*[Message("system", question)] * has_system, Message("user", question)]
        for several in rounds:
            number = 1 + (several if name != "llama-3" else 0)
            messages.append(Message("assistant", "", extra={"tool_calls": [call(i) for i in range(number)]}))
            messages += [Message("tool", result)] * number
        conversation = Conversation((*messages, Message("assistant", answer)), (ADD,))
        text, turns = rendered(conversation, tokenizer, name)
        ids, weights = tokenized(conversation, tokenizer, name)
        spans = [(start, end) for message, start, end in in_bytes(text, turns) if message.role == "assistant"]
        expected = [any(a < end and b > start for start, end in spans) for a, b in places(tokenizer, ids, text)]
        assert weights.tolist() == expected

    check()
