"""Examples → token ids and the weight of each as a target.

A weight above 0 means that the token is trained on, predicted from the tokens before it: the model shifts, we do not.
The tokens of an answer are found by position: an answer is the text that the template's own markers enclose, or that
its message adds to the rendered conversation before it, and its tokens are those that overlap these characters.
Searching the text for role names would also find them in users' messages.

Texts are tokenised by the unmodified tokenizer, and its vocabulary is never changed: on a base model, the markers of
chatml or llama-3 are several ordinary tokens each, which the model learns like any text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from sora_llm.data.dataset import TokenRow
from sora_llm.data.formats import Conversation, Example, Message, PromptCompletion
from sora_llm.data.readers import BadRow
from sora_llm.data.template_gaps import check_has_place
from sora_llm.data.templates import as_dicts, ends_answers_visibly, has_markers, render, render_marked
from sora_llm.data.tokens import common_prefix_length, names_of_special_tokens, special_tokens, tokens_of


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    *,
    train_on_inputs: bool = False,
    train_on_last_turn_only: bool = False,
    separator: str = "",
) -> list[TokenRow | BadRow]:
    """Token ids and weights of some examples, all tokenised in one call; for an unusable example, the reason.

    Conversations: `template` renders them; the assistant's turns are supervised with their end-of-turn token, but not
    the line break after it.  A message's own weight takes precedence over `train_on_inputs`; under
    `train_on_last_turn_only` it counts only for the last answer, and earlier turns have weight 0 regardless.  If a
    template writes an answer differently once others follow, without the (empty) thoughts of the last one, the earlier
    answer is supervised as it appears in the whole conversation.  Prompt and completion: joined as text with
    `separator` and tokenised together, supervised from the end of the longest common prefix with the tokenised prompt.
    Texts: everything.  The latter two end with eos.  There is exactly one BOS at the start if the tokenizer uses one,
    whether it or the template writes it; its weight is 0, as is that of any token at position 0, which has nothing
    before it.

    A token that straddles the start or the end of a turn belongs to the turn.  Such tokens are rare: they take a
    template that writes a line break before answers and does not trim them, an answer that begins with another, and a
    tokenizer that has a token for both.  Splitting them would train on tokens that the tokenizer never produces.

    Args:
        template: Jinja source, from `resolve_template`.
        train_on_inputs: supervise prompts as well.
        train_on_last_turn_only: supervise only the last assistant turn.
        separator: between prompt and completion.

    Bad rows: the template refuses the conversation, has no place for a part of it, or renders it so that the tokens of
    a turn cannot be located.
    """
    drafting = _Drafting(
        template,
        tokenizer.special_tokens_map,
        tokenizer.all_special_tokens,
        special_tokens(tokenizer),
        train_on_inputs,
        train_on_last_turn_only,
        separator,
    )
    drafts = [drafting.draft(example) for example in examples]
    rows = iter(_rows([draft for draft in drafts if isinstance(draft, _Draft)], tokenizer))
    return [draft if isinstance(draft, BadRow) else next(rows) for draft in drafts]


def special_tokens_written(examples: Sequence[Example], tokenizer: Any) -> list[str | None]:
    """The first special token written out in a message of each example (the <s> of old HTML, a chat transcript), None
    if there is none.  Tokenizers take the name for the token, here as in serving: the row has a second BOS, or an end
    of turn within an answer, and the model learns to stop there.  Prompts, completions and texts are not checked:
    there, a format's tokens are written out on purpose."""
    if getattr(tokenizer, "split_special_tokens", False):
        return [None] * len(examples)
    names = names_of_special_tokens(tokenizer)

    def written(example: Example) -> str | None:
        messages = example.messages if isinstance(example, Conversation) else ()
        found = next(filter(None, map(names.search, chain.from_iterable(map(_texts_of, messages)))), None)
        return found and found.group()

    return [written(example) for example in examples]


def _texts_of(message: Message) -> Iterator[str]:
    yield message.content
    yield message.input
    yield from (value for value in message.extra.values() if isinstance(value, str))


# ----- example → text and the weights of its characters ---------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A text to tokenise, with the weights of its characters."""

    text: str
    weight: float
    """For every character that no span covers."""
    spans: Sequence[tuple[int, int, float]] = ()
    """(first character, one past the last, weight)."""
    prompt: str | None = None
    """The beginning of the text; its leading tokens that are the same when it is tokenised alone have weight 0."""
    ends_with_eos: bool = False


@dataclass(frozen=True)
class _Drafting:
    """The conversion of examples to texts; one object for a chunk of examples."""

    template: str
    special_tokens: Mapping[str, Any]
    closing_tokens: Sequence[str]
    """Tokens that templates may write after the last turn of any conversation."""
    special_texts: Sequence[str]
    """All special tokens, the longest first."""
    train_on_inputs: bool
    last_turn_only: bool
    separator: str

    def draft(self, example: Example) -> _Draft | BadRow:
        if isinstance(example, Conversation):
            try:
                return self._conversation(example)
            except BadRow as bad:
                return bad
        if isinstance(example, PromptCompletion):
            prompt = example.prompt + self.separator
            context = None if self.train_on_inputs else prompt
            return _Draft(prompt + example.completion, 1.0, prompt=context, ends_with_eos=True)
        return _Draft(example.text, 1.0, ends_with_eos=True)

    def _conversation(self, conversation: Conversation) -> _Draft:
        weights = self._weights(conversation.messages)
        check_has_place(conversation, self.template, [weight > 0 for weight in weights])
        dicts, usual = as_dicts(conversation.messages), float(self.train_on_inputs)

        def rendered(num_messages: int, prompt: bool = False, of: Any = None) -> str:
            part = dicts[:num_messages] if of is None else of
            return render(part, self.template, self.special_tokens, tools=conversation.tools, prompt=prompt)

        turns = {i: weight for i, weight in enumerate(weights) if weight != usual}
        spans: list[tuple[int, int, float]] = []
        if has_markers(self.template):
            text, marked = render_marked(dicts, self.template, self.special_tokens, tools=conversation.tools)
            answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
            of_answers = _weights_of_marked(marked, [weights[i] for i in answers])
            spans += [(*span, weight) for span, weight in zip(marked, of_answers, strict=True)]
            turns = {i: weight for i, weight in turns.items() if i not in answers}
        else:
            text = rendered(len(dicts))
        spans += [(*self._turn(i, dicts, text, rendered), weight) for i, weight in turns.items()]
        return _Draft(text, usual, spans)

    def _weights(self, messages: Sequence[Message]) -> list[float]:
        """The weight of each turn: the message's own, else the one that follows from the options."""
        last_answer = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)

        def weight(i: int, message: Message) -> float:
            if self.last_turn_only and i != last_answer:
                return 0.0
            if message.weight is not None:
                return message.weight
            return float(self.train_on_inputs or (message.role == "assistant" and not message.is_context))

        return [weight(i, message) for i, message in enumerate(messages)]

    def _turn(
        self, i: int, messages: Sequence[Mapping[str, Any]], text: str, rendered: Callable[..., str]
    ) -> tuple[int, int]:
        """Where turn i begins and ends in the rendered text, by the text it adds to the conversation before it."""
        is_answer, content_at = messages[i]["role"] == "assistant", len(text)
        if i + 1 == len(messages):
            end = len(text)
        else:
            alone = rendered(i + 1)
            try:
                end = self._length_in(text, alone)
            except BadRow:
                if not is_answer:
                    raise
                content_at, end = self._rewritten(i, messages, text, alone, rendered)
            else:
                end += len(self._end_token(i, text, end, alone, rendered)) if is_answer else 0
        if not is_answer:
            start = self._length_in(text, rendered(i)) if i else 0
        elif text.startswith(prompt := rendered(i, prompt=True)):
            start = len(prompt)
        else:  # the prompt opens more than this answer has, such as thoughts
            start = max(self._length_in(text, rendered(i)), common_prefix_length(text, prompt))
        start = min(start, content_at)
        if ends_answers_visibly(self.template):
            end = start + len(text[start:end].rstrip())
        if end <= start and (messages[i].get("content", "").strip() or messages[i].get("tool_calls")):
            raise BadRow(f"the chat template renders nothing for messages[{i}] ({messages[i]['role']})")
        return start, max(start, end)

    def _end_token(self, i: int, text: str, end: int, alone: str, rendered: Callable[..., str]) -> str:
        """The token that ends answer i, if a different one ends it at the end of a conversation (gpt-oss writes
        <|return|> there and <|end|> elsewhere): it follows the answer in the text and in the prompt for the next one,
        but does not open an answer."""
        if alone.rstrip() == text[:end].rstrip():
            return ""
        token = next((token for token in self.special_texts if token and text.startswith(token, end)), "")
        if not token or not rendered(i + 1, prompt=True).startswith(text[:end] + token):
            return ""
        opened, before = rendered(i, prompt=True), rendered(i)
        return "" if opened.startswith(token, self._length_in(opened, before)) else token

    def _rewritten(
        self, i: int, messages: Sequence[Mapping[str, Any]], text: str, alone: str, rendered: Callable[..., str]
    ) -> tuple[int, int]:
        """Where an answer's own text begins and its turn ends in the whole conversation, for an answer that is written
        differently when it is last (`alone`: the conversation up to it): its text is where renderings with replaced
        texts differ, and the text after it is the same as in `alone`.

        Raises:
            BadRow: the two do not match, or the answer has thoughts, which templates drop from earlier answers: it
                would be learned without them.
        """
        message = messages[i]
        if message.get("reasoning_content") or "</think>" in message.get("content", ""):
            raise BadRow(_WRITTEN_DIFFERENTLY)
        first, last = self._place_of(i, messages, text, rendered)
        first_alone, last_alone = self._place_of(i, messages[: i + 1], alone, rendered)
        if text[first:last] != alone[first_alone:last_alone]:
            raise BadRow(_WRITTEN_DIFFERENTLY)
        length = self._length_in(text[last:], alone[last_alone:])
        if not text[last : last + length].strip():
            raise BadRow(_WRITTEN_DIFFERENTLY)
        return first, last + length

    def _place_of(
        self, i: int, messages: Sequence[Mapping[str, Any]], text: str, rendered: Callable[..., str]
    ) -> tuple[int, int]:
        """The span of message i's content in a rendered conversation (its text; the names of its calls and everything
        between them), found by rendering two replacements that differ in their first and last characters."""
        one, other = (
            rendered(0, of=[*messages[:i], _saying(words, messages[i]), *messages[i + 1 :]]) for words in _REPLACEMENTS
        )
        first, after = common_prefix_length(one, other), common_prefix_length(one[::-1], other[::-1])
        last = len(text) - after
        is_bounded = first < len(one) - after and first < last
        if not is_bounded or text[:first] != one[:first] or text[last:] != one[len(one) - after :]:
            raise BadRow(_WRITTEN_DIFFERENTLY)
        return first, last

    def _length_in(self, text: str, part: str) -> int:
        """How much of the text a rendered part of its conversation covers: all of the part except what closes every
        text (some templates end with eos whatever comes last).  Templates that move the system message or drop old
        thoughts write a turn differently once others follow; the common prefix then ends too early, and the loss would
        miss the answer or cover the question."""
        while not text.startswith(part):
            closing = next((token for token in self.closing_tokens if token and part.endswith(token)), "")
            shorter = part.removesuffix(closing).rstrip() if closing else part.rstrip()
            if shorter == part:
                raise BadRow(_WRITTEN_DIFFERENTLY)
            part = shorter
        return len(part)


_WRITTEN_DIFFERENTLY = (
    "the chat template renders a turn differently when others follow, so its tokens cannot be located: use "
    "train_on_last_turn_only, or a template with {% generation %} markers"
)
_REPLACEMENTS = ("Lorem ipsum", "Dolor sit.")


def _saying(words: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text and the names of its calls replaced by other words."""
    other = dict(message)
    if message.get("content", "").strip():
        other["content"] = words
    if calls := message.get("tool_calls"):
        other["tool_calls"] = [{**call, "function": {**call["function"], "name": words}} for call in calls]
    return other


def _weights_of_marked(marked: Sequence[tuple[int, int]], of_answers: Sequence[float]) -> Sequence[float]:
    """The weight of each marked span: its answer's, or, if answers have several spans, the weight of all answers."""
    if len(marked) == len(of_answers):
        return of_answers
    # Spans that touch belong to one answer (Phi-3's last one and its eos).
    touching = [0, *accumulate(int(start > end) for (_, end), (start, _) in pairwise(marked))] if marked else []
    if len(set(touching)) == len(of_answers):
        return [of_answers[i] for i in touching]
    if len(marked) < len(of_answers) or len(set(of_answers)) != 1:
        raise BadRow(
            f"the template's generation markers give {len(marked)} spans for {len(of_answers)} assistant turns"
        )
    return [of_answers[0]] * len(marked)


# ----- tokens → rows --------------------------------------------------------------------------------------------------


def _rows(drafts: Sequence[_Draft], tokenizer: Any) -> list[TokenRow]:
    tokenized = tokens_of([draft.text for draft in drafts], tokenizer)
    # If no token straddles a prompt's end, nothing has joined the two sides, and the prompt has the same tokens on its
    # own, unless it ends with several blanks, which tokenizers split according to what follows.
    uncertain = {
        i: draft.prompt
        for i, (draft, tokens) in enumerate(zip(drafts, tokenized, strict=True))
        if draft.prompt is not None
        and (not tokens.begin_at(len(draft.prompt)) or (draft.prompt[-2:].isspace() and len(draft.prompt) > 1))
    }
    prompts = dict(zip(uncertain, tokens_of(list(uncertain.values()), tokenizer), strict=True))
    rows = []
    for i, (draft, tokens) in enumerate(zip(drafts, tokenized, strict=True)):
        ids = tokens.ids
        if draft.ends_with_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        weights = np.full(len(ids), draft.weight, dtype=np.float32)
        for start, end, weight in draft.spans:
            weights[tokens.of(start, end)] = weight
        if i in prompts:
            weights[: common_prefix_length(ids, prompts[i].ids)] = 0
        elif draft.prompt is not None:
            weights[: tokens.of(0, len(draft.prompt)).stop] = 0
        weights[: max(1, tokens.num_added)] = 0
        rows.append((np.array(ids, dtype=np.int32), weights))
    return rows
