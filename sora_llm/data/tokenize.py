"""Examples → token ids and the weight of each as a target.

A weight above 0 says that the token is trained on, predicted from the tokens before it: the model shifts, we do not.
Which tokens belong to an answer is found by position: an answer is what the template's own markers enclose, or what
the answer's message adds to the rendered conversation before it, and its tokens are those that reach into these
characters.  Searching the text for role names would find them in what users write.

Texts are tokenised as the tokenizer does it and its vocabulary is never changed: under a base model the markers of
chatml or llama-3 are then several ordinary tokens each, which the model learns like any text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, takewhile
from operator import eq, itemgetter
from typing import Any

import numpy as np

from sora_llm.data.dataset import TokenRow
from sora_llm.data.formats import Conversation, Example, Message, PromptCompletion, whole_characters
from sora_llm.data.readers import BadRow
from sora_llm.data.templates import as_dicts, check_has_place, ends_answers_visibly, has_markers, render, render_marked


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    *,
    train_on_inputs: bool = False,
    train_on_last_turn_only: bool = False,
    separator: str = "",
) -> list[TokenRow | BadRow]:
    """Token ids and weights of some examples, all tokenised in one call; of an example that has none, the reason.

    Conversations: `template` renders them; supervised are the assistant's turns with their end-of-turn token, but not
    the line break after it.  A message's own weight comes before `train_on_inputs`; under `train_on_last_turn_only` it
    counts for the last answer and for nothing else, so that an earlier one has 0 whatever it says.  Where a template
    writes an answer differently once others follow, without the (empty) thoughts of the last one, the earlier answer
    is supervised as it stands in the whole conversation.  Prompt and completion: joined as text
    with `separator` and tokenised together, supervised from the end of the longest common prefix with the tokenised
    prompt.  Texts: everything.  The latter two end with eos.  There is exactly one BOS at the start where the
    tokenizer uses one, whether it or the template writes it; position 0 has nothing before it and has weight 0.

    A token that lies across the start or the end of a turn belongs to the turn.  Such a token is rare: it takes a
    template that writes a line break before answers and does not trim them, an answer that begins with another, and a
    tokenizer that has a token for both.  To split it would train on tokens that the tokenizer never gives.

    Args:
        template: jinja source, from `resolve_template`.
        train_on_inputs: supervise prompts as well.
        train_on_last_turn_only: supervise the last assistant turn alone.
        separator: between prompt and completion.

    Bad rows: the template refuses the conversation, has no place for a part of it, or hides which tokens belong to a
    turn.
    """
    drafting = _Drafting(
        template,
        tokenizer.special_tokens_map,
        tokenizer.all_special_tokens,
        _special_tokens(tokenizer),
        train_on_inputs,
        train_on_last_turn_only,
        separator,
    )
    drafts = [drafting.draft(example) for example in examples]
    rows = iter(_rows([draft for draft in drafts if isinstance(draft, _Draft)], tokenizer))
    return [draft if isinstance(draft, BadRow) else next(rows) for draft in drafts]


def encode_prompt(tokenizer: Any, prompt: str, template: str | None) -> list[int]:
    """Ids that a model goes on from: `prompt` as a user's turn with the assistant's opened, or, without a template,
    as it is; its tokens are those that it has where an answer follows.

    Raises:
        BadRow: the template refuses it, or it holds what is no text.
    """
    if template is not None:
        return encode_dialogue(tokenizer, [Message("user", prompt)], template)
    return _ids_before_an_answer(whole_characters(prompt, "the prompt"), tokenizer)


def encode_dialogue(tokenizer: Any, messages: Sequence[Message], template: str) -> list[int]:
    """Ids that a model goes on from: the messages so far with the assistant's turn opened; its tokens are those that it
    has where an answer follows.

    Raises:
        BadRow: the template refuses them, or they hold what is no text.
    """
    for message in messages:
        whole_characters(message.content, f"the {message.role}'s message")
    text = render(as_dicts(messages), template, tokenizer.special_tokens_map, prompt=True)
    return _ids_before_an_answer(text, tokenizer)


def _ids_before_an_answer(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text as far as they do not depend on what comes behind it.  Blanks at its end do in most
    vocabularies: "Answer: four" has the token "▁four", and of two line breaks GPT-2's pattern joins none before a word;
    alone they would be tokens that no row of the training had there.  A last blank is left for the model to write."""
    if text == text.rstrip():
        return _tokenize([text], tokenizer)[0].ids
    one, *others = _tokenize([text + beginning for beginning in "aA1"], tokenizer)
    num_shared = min(common_prefix_length(one.ids, other.ids) for other in others)
    ids = one.ids[: min(num_shared, one.num_before(len(text.removesuffix(" "))))]
    return ids or _tokenize([text], tokenizer)[0].ids  # a blank alone, and no BOS before it


def served_template(tokenizer: Any, template: str) -> str:
    """The template to put beside a model that was trained with this one.

    Clients tokenise what it renders and add nothing (`apply_chat_template`), so it has to write the BOS that the
    tokenizer put before every sequence here, and the blank that sentencepiece puts before a text that does not begin
    with a token of its own.
    """
    prompts = [
        [Message("user", "Hi")],
        [Message("system", "Be brief."), Message("user", "Hi")],
        [Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Hi")],
    ]

    def renderings(source: str) -> list[str]:
        texts = []
        for messages in prompts:
            with suppress(BadRow):  # a template may refuse a system message
                texts.append(render(as_dicts(messages), source, tokenizer.special_tokens_map, prompt=True))
        return texts

    def served(source: str) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in renderings(source)]

    trained = [tokens.ids for tokens in _tokenize(renderings(template), tokenizer)]
    # Blanks before a block that begins the template are none of it, but would be behind a BOS.
    bodies, starts = (template, template.lstrip(" \t")), ("{{- bos_token }}", "{{- bos_token + ' ' }}")
    candidates = [template, *(start + body for body in bodies for start in starts)]
    return next((source for source in candidates if served(source) == trained), candidates[1])


def ends_visibly(tokenizer: Any, template: str) -> bool:
    """Whether an answer ends with one token that is eos or special in the tokenizer's vocabulary, so that generation
    knows where to stop.  Elsewhere (chatml under a base model) the end is ordinary text that a client must look for.
    True where the template refuses a question and an answer, which it does not say anything about."""
    row = _answered(tokenizer, template)
    return isinstance(row, BadRow) or _last_learned(row) in _ending_tokens(tokenizer)


def answer_end(tokenizer: Any, template: str) -> tuple[int | None, str]:
    """What a model that was trained with the template ends an answer with: a token that is eos or special in the
    tokenizer's vocabulary, and "", or no such token and a text.  Where a turn ends with blanks alone, which answers are
    full of, it is what the template writes before the next question.  None and "" where there is nothing to look for,
    or the template refuses a question and an answer."""
    row = _answered(tokenizer, template)
    if isinstance(row, BadRow):
        return None, ""
    last = _last_learned(row)
    if last in _ending_tokens(tokenizer):
        return last, ""
    closing = _behind_an_answer(template, tokenizer)
    # An answer is decoded without special tokens: their names would not be found in it.
    special = _names_of_special_tokens(tokenizer).search(closing)
    text = closing[: special.start()] if special is not None else closing
    if special is not None and not text.strip():
        return int(tokenizer.convert_tokens_to_ids(special.group())), ""
    return None, text.rstrip()


def _behind_an_answer(template: str, tokenizer: Any) -> str:
    """What a template writes behind an answer: the end of the turn, or where that is blank all up to the text of the
    next question.  "" where that cannot be told."""
    dialogue = (Message("user", "Hi"), Message("assistant", _ANSWER), Message("user", _QUESTION))

    def behind(text: str) -> str:
        _, found, closing = text.rpartition(_ANSWER)
        return closing if found else ""

    with suppress(BadRow):
        if (closing := behind(render(as_dicts(dialogue[:2]), template, tokenizer.special_tokens_map))).strip():
            return closing
        return behind(render(as_dicts(dialogue), template, tokenizer.special_tokens_map).rpartition(_QUESTION)[0])
    return ""


def _last_learned(row: TokenRow) -> int:
    """The last token of a row that is trained on."""
    ids, weights = row
    return int(ids[weights > 0][-1])


def untaught_end(tokenizer: Any, template: str) -> str | None:
    """The token with which a template ends answers, where its markers leave it out of what is trained on: the model
    is never taught to stop.  None where it is taught, or there is no such token."""
    row = _answered(tokenizer, template)
    if isinstance(row, BadRow):
        return None
    ids, weights = row
    last, ending = int(np.flatnonzero(weights)[-1]), _ending_tokens(tokenizer)
    if int(ids[last]) in ending:
        return None
    for token in map(int, ids[last + 1 :]):
        if token in ending:
            return str(tokenizer.convert_ids_to_tokens(token))
        if tokenizer.decode([token]).strip():
            return None
    return None


def joins_a_prompt_s_end(tokenizer: Any, template: str) -> bool:
    """Whether the template ends prompts with blanks that have other tokens where an answer follows."""
    with suppress(BadRow):
        prompt = render(as_dicts(_ASKED[:1]), template, tokenizer.special_tokens_map, prompt=True)
        return _tokenize([prompt], tokenizer)[0].ids != _ids_before_an_answer(prompt, tokenizer)
    return False


def opened_for_asking(tokenizer: Any, template: str) -> str:
    """What the template opens an answer with where the model is asked (thoughts, by DeepSeek-R1's), and does not write
    before an answer that has none of it; "" where it writes the same."""
    with suppress(BadRow):
        asked = render(as_dicts(_ASKED[:1]), template, tokenizer.special_tokens_map, prompt=True)
        answered = render(as_dicts(_ASKED), template, tokenizer.special_tokens_map)
        return asked[common_prefix_length(asked, answered) :].strip()
    return ""


_ASKED = (Message("user", "Hi"), Message("assistant", "Ho"))
_ANSWER, _QUESTION = "8049217356", "6172940385"
"""Contents that no template writes itself ("Hum" is in "### Human:") and none changes, as one may the case of words."""


def _answered(tokenizer: Any, template: str) -> TokenRow | BadRow:
    """A question and an answer as they are trained on."""
    (row,) = tokenize_examples([Conversation(_ASKED)], tokenizer, template)
    return row


def _ending_tokens(tokenizer: Any) -> set[int]:
    """Ids of tokens that can end an answer: eos, and what is special in the vocabulary."""
    return {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(_special_tokens(tokenizer))}


def special_tokens_written(examples: Sequence[Example], tokenizer: Any) -> list[str | None]:
    """Of each example, a special token that somebody has written into a message (the <s> of old HTML, a transcript of
    a chat), None where there is none.  Tokenizers take the name for the token, here as where the model is served: the
    row has a second BOS, or an end of turn within an answer, and the model learns to stop there.  Prompts, completions
    and texts are not looked at: in them a format's tokens are written out on purpose."""
    if getattr(tokenizer, "split_special_tokens", False):
        return [None] * len(examples)
    names = _names_of_special_tokens(tokenizer)

    def written(example: Example) -> str | None:
        messages = example.messages if isinstance(example, Conversation) else ()
        found = next(filter(None, map(names.search, chain.from_iterable(map(_texts_of, messages)))), None)
        return found and found.group()

    return [written(example) for example in examples]


def _texts_of(message: Message) -> Iterator[str]:
    yield message.content
    yield message.input
    yield from (value for value in message.extra.values() if isinstance(value, str))


def _names_of_special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds them in a text; nothing where there are none."""
    return re.compile("|".join(re.escape(token) for token in _special_tokens(tokenizer) if token) or "(?!)")


def _special_tokens(tokenizer: Any) -> list[str]:
    """Those with a name (eos and so on) and those that the vocabulary calls special, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


# ----- example → text and the weights of its characters ---------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """What is to be tokenised."""

    text: str
    weight: float
    """Of every character that no span covers."""
    spans: Sequence[tuple[int, int, float]] = ()
    """(first character, one past the last, weight)."""
    prompt: str | None = None
    """The beginning of the text whose tokens, as far as they are the same when it stands alone, have weight 0."""
    ends_with_eos: bool = False


@dataclass(frozen=True)
class _Drafting:
    """How examples become texts; one for a chunk of examples."""

    template: str
    special_tokens: Mapping[str, Any]
    closing_tokens: Sequence[str]
    """Those that templates may write after the last turn of any conversation."""
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
        check_has_place(conversation, self.template)
        dicts, usual = as_dicts(conversation.messages), float(self.train_on_inputs)

        def rendered(num_messages: int, prompt: bool = False, of: Any = None) -> str:
            part = dicts[:num_messages] if of is None else of
            return render(part, self.template, self.special_tokens, tools=conversation.tools, prompt=prompt)

        weights = self._weights(conversation.messages)
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
        """The weight of each turn: what the message says of itself, else what the options say."""
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
        """Where turn i begins and ends in the rendered text, by what it adds to the conversation before it."""
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
            raise BadRow(f"the chat template writes nothing in the place of messages[{i}] ({messages[i]['role']})")
        return start, max(start, end)

    def _end_token(self, i: int, text: str, end: int, alone: str, rendered: Callable[..., str]) -> str:
        """The token that ends answer i where another one ends it at the end of a conversation (gpt-oss writes
        <|return|> there and <|end|> elsewhere): it stands in the text after the answer, and in the prompt for the next
        one, but does not open an answer."""
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
        """Of an answer that is written differently as the last one (`alone`: the conversation up to it) and in the
        whole, where in the whole its own text begins and the turn ends: its text stands where renderings of other
        texts differ, and what follows there is what follows in `alone`.

        Raises `BadRow` if the two do not say the same, or the answer has thoughts, which templates drop of earlier
        answers: it would be learned without them.
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
        """Where a rendered conversation has what message i says (its text; the names of its calls and what is
        between them), by what two replacements change, which differ in their first and in their last character."""
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
        """How much of the text a rendered part of its conversation is: all, but for what closes every text (some
        templates end with eos whatever comes last).  Templates that move the system message or drop old thoughts
        write a turn differently once others follow; what the two have in common then ends too early, and the loss
        would miss the answer or cover the question."""
        while not text.startswith(part):
            closing = next((token for token in self.closing_tokens if token and part.endswith(token)), "")
            shorter = part.removesuffix(closing).rstrip() if closing else part.rstrip()
            if shorter == part:
                raise BadRow(_WRITTEN_DIFFERENTLY)
            part = shorter
        return len(part)


_WRITTEN_DIFFERENTLY = (
    "the chat template writes a turn differently when others follow, so that its tokens cannot be found: use "
    "train_on_last_turn_only, or a template with {% generation %} markers"
)
_REPLACEMENTS = ("Lorem ipsum", "Dolor sit.")


def _saying(words: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with other words for its text and for the names of its calls."""
    other = dict(message)
    if message.get("content", "").strip():
        other["content"] = words
    if calls := message.get("tool_calls"):
        other["tool_calls"] = [{**call, "function": {**call["function"], "name": words}} for call in calls]
    return other


def _weights_of_marked(marked: Sequence[tuple[int, int]], of_answers: Sequence[float]) -> Sequence[float]:
    """The weight of each marked span: of the answer that it is, or, where answers have several, of all of them."""
    if len(marked) == len(of_answers):
        return of_answers
    if len(marked) < len(of_answers) or len(set(of_answers)) != 1:
        raise BadRow(
            f"the template's generation markers give {len(marked)} spans for {len(of_answers)} assistant turns"
        )
    return [of_answers[0]] * len(marked)


# ----- text → tokens --------------------------------------------------------------------------------------------------


class _Tokens:
    """A tokenised text: its ids, and which of them stand for a stretch of its characters."""

    def __init__(self, text: str, ids: list[int], num_added: int, encoding: Any, tokenizer: Any) -> None:
        """Args:
        num_added: of the ids, those at the start that are no part of the text (a BOS).
        encoding: of the tokenizers library, None where the tokenizer is not one of its.
        """
        self.text, self.ids = text, ids
        self._num_added, self._encoding, self._tokenizer = num_added, encoding, tokenizer

    def of(self, start: int, end: int) -> slice:
        """The tokens that reach into the characters from `start` to before `end`."""
        if self._encoding is None:
            return self._of_by_prefixes(start, end)
        first, last = self._token_at(start), self._token_at(end)
        if self._begins_before(start, first) and self._is_added(first):
            first += 1  # a marker that swallows the blanks after it (Phi-3's do) stays with what is before
        last += self._begins_before(end, last)
        return slice(first + self._num_added, last + self._num_added)

    def num_before(self, char: int) -> int:
        """How many tokens end before this character begins; all, where the tokenizer does not say where they come
        from."""
        return len(self.ids) if self._encoding is None else self._token_at(char) + self._num_added

    def begin_at(self, char: int) -> bool:
        """Whether a token is known to begin with this character, so that none lies across its beginning."""
        if self._encoding is None:
            return False
        before = self._encoding.char_to_token(char - 1) if char else -1
        after = self._encoding.char_to_token(char)
        return before is not None and after is not None and before != after

    def _token_at(self, char: int) -> int:
        """The first of the text's tokens that ends after a character begins."""
        if char >= len(self.text):
            return len(self._encoding)
        token = self._encoding.char_to_token(char)
        if token is None:  # a blank that the tokenizer (GPT-NeoX's) leaves out of where it says that a token is
            token = bisect_right(self._encoding.offsets, char, key=itemgetter(1))
        return token

    def _begins_before(self, char: int, token: int) -> bool:
        return token < len(self._encoding) and self._encoding.token_to_chars(token)[0] < char

    def _is_added(self, token: int) -> bool:
        return self.ids[token + self._num_added] in self._tokenizer.get_added_vocab().values()

    def _of_by_prefixes(self, start: int, end: int) -> slice:
        """For tokenizers that do not say where tokens come from: as far as the text tokenised up to a character has
        the same tokens, they are before it."""
        before, until = (tokens.ids for tokens in _tokenize([self.text[:start], self.text[:end]], self._tokenizer))
        last = common_prefix_length(self.ids, until)
        return slice(common_prefix_length(self.ids, before), last + (last < len(until)))


def _tokenize(texts: Sequence[str], tokenizer: Any) -> list[_Tokens]:
    """Tokens of texts, after one BOS where the tokenizer uses one; never an EOS (a prefix of a text has none)."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    bos = _automatic_bos(tokenizer)
    tokens = []
    for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings or [None] * len(texts), strict=True):
        missing = [] if bos is None or ids[:1] == [bos] else [bos]
        tokens.append(_Tokens(text, missing + ids, len(missing), encoding, tokenizer))
    return tokens


def _automatic_bos(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer puts one before a text.  Asked by doing: in transformers 5 `add_bos_token` is
    False on LLaMA's tokenizers, which add it all the same."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None


def _rows(drafts: Sequence[_Draft], tokenizer: Any) -> list[TokenRow]:
    tokenized = _tokenize([draft.text for draft in drafts], tokenizer)
    # Where no token lies across a prompt's end, nothing has joined the two sides, and the prompt has the same tokens
    # when it stands alone, unless it ends with several blanks, which tokenizers cut according to what follows.
    uncertain = {
        i: draft.prompt
        for i, (draft, tokens) in enumerate(zip(drafts, tokenized, strict=True))
        if draft.prompt is not None
        and (not tokens.begin_at(len(draft.prompt)) or (draft.prompt[-2:].isspace() and len(draft.prompt) > 1))
    }
    prompts = dict(zip(uncertain, _tokenize(list(uncertain.values()), tokenizer), strict=True))
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
        weights[:1] = 0
        rows.append((np.array(ids, dtype=np.int32), weights))
    return rows


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many of their first items, or characters, two sequences share."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
