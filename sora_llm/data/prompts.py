"""Encoding prompts, and finding where answers end, with the chat template used in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sora_llm.data.dataset import TokenRow
from sora_llm.data.formats import Conversation, Message, whole_characters
from sora_llm.data.readers import BadRow
from sora_llm.data.templates import as_dicts, render
from sora_llm.data.tokenize import tokenize_examples
from sora_llm.data.tokens import common_prefix_length, names_of_special_tokens, opening, special_tokens, tokens_of


def encode_prompt(tokenizer: Any, prompt: str, template: str | None) -> list[int]:
    """Ids for a model to continue: `prompt` as a user's turn with the assistant's opened, or, without a template, as it
    is; its tokens are those that it has when an answer follows.

    Raises:
        BadRow: the template refuses it, or it contains something that is not text.
    """
    if template is not None:
        return encode_chat(tokenizer, [Message("user", prompt)], template)
    return _ids_before_an_answer(whole_characters(prompt, "the prompt"), tokenizer)


def encode_chat(tokenizer: Any, messages: Sequence[Message], template: str) -> list[int]:
    """Ids for a model to continue: the messages so far with the assistant's turn opened; the tokens are those that they
    have when an answer follows.

    Raises:
        BadRow: the template refuses them, or they contain something that is not text.
    """
    for message in messages:
        whole_characters(message.content, f"the {message.role}'s message")
    text = render(as_dicts(messages), template, tokenizer.special_tokens_map, prompt=True)
    return _ids_before_an_answer(text, tokenizer)


def _ids_before_an_answer(text: str, tokenizer: Any) -> list[int]:
    """The leading ids of a text that do not depend on what follows it.  Blanks at its end do in most vocabularies:
    "Answer: four" has the token "▁four", and GPT-2's pattern does not join two line breaks before a word; alone they
    would be tokens that no training row had there.  A final blank is left for the model to write."""
    if text == text.rstrip():
        return tokens_of([text], tokenizer)[0].ids
    one, *others = tokens_of([text + beginning for beginning in "aA1"], tokenizer)
    num_shared = min(common_prefix_length(one.ids, other.ids) for other in others)
    ids = one.ids[: min(num_shared, one.num_before(len(text.removesuffix(" "))))]
    return ids or tokens_of([text], tokenizer)[0].ids  # a blank alone, with no BOS before it


def served_template(tokenizer: Any, template: str) -> str:
    """The template to save with a model that was trained with this one.

    Clients tokenise its output and add nothing (`apply_chat_template`), so it has to write the BOS that the tokenizer
    put before every sequence here, and the blank that sentencepiece puts before a text that does not begin with an
    added token.  If no such template is found (`is_served_as_trained`), it at least writes the BOS.
    """
    candidates = _served_candidates(tokenizer, template)
    return _first_served_alike(candidates, tokenizer, template) or candidates[1]


def is_served_as_trained(tokenizer: Any, template: str) -> bool:
    """Whether clients that render prompts with `served_template` send the same tokens as in training."""
    return _first_served_alike(_served_candidates(tokenizer, template), tokenizer, template) is not None


def _served_candidates(tokenizer: Any, template: str) -> list[str]:
    opened = opening(tokenizer)
    written = "bos_token"
    if opened and opened != [tokenizer.bos_token_id]:
        written = json.dumps("".join(tokenizer.convert_ids_to_tokens(opened)), ensure_ascii=False)
    # Blanks before a block that begins the template are not rendered, but would be after a BOS.
    bodies, starts = (template, template.lstrip(" \t")), (f"{{{{- {written} }}}}", f"{{{{- {written} + ' ' }}}}")
    return [template, *(start + body for body in bodies for start in starts)]


def _first_served_alike(candidates: Sequence[str], tokenizer: Any, template: str) -> str | None:
    """The first candidate whose prompts, tokenised with nothing added, match those trained with `template`."""
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

    trained = [tokens.ids for tokens in tokens_of(renderings(template), tokenizer)]
    return next((source for source in candidates if served(source) == trained), None)


def has_visible_end(tokenizer: Any, template: str) -> bool:
    """Whether an answer ends with one token that is eos or special in the tokenizer's vocabulary, so that generation
    knows where to stop.  Otherwise (chatml on a base model) the end is ordinary text that a client must look for.  True
    also if the template refuses a question and an answer, since nothing can be inferred then."""
    row = _answered(tokenizer, template)
    return isinstance(row, BadRow) or _last_learned(row, tokenizer) in _ending_tokens(tokenizer)


def answer_end(tokenizer: Any, template: str) -> tuple[int | None, str]:
    """How a model trained with the template ends an answer: a token that is eos or special in the tokenizer's
    vocabulary, and "", or None and a text.  If a turn ends only with blanks, which answers are full of, the text is
    what the template writes before the next question.  None and "" if there is nothing to look for, or the template
    refuses a question and an answer."""
    row = _answered(tokenizer, template)
    if isinstance(row, BadRow):
        return None, ""
    last = _last_learned(row, tokenizer)
    if last in _ending_tokens(tokenizer):
        return last, ""
    closing = _behind_an_answer(template, tokenizer)
    # An answer is decoded without special tokens: their names would not be found in it.
    special = names_of_special_tokens(tokenizer).search(closing)
    text = closing[: special.start()] if special is not None else closing
    if special is not None and not text.strip():
        return int(tokenizer.convert_tokens_to_ids(special.group())), ""
    return None, text.rstrip()


def _behind_an_answer(template: str, tokenizer: Any) -> str:
    """The text a template writes after an answer: the end of the turn, or, if that is blank, everything up to the text
    of the next question.  "" if it cannot be determined."""
    dialogue = (Message("user", "Hi"), Message("assistant", _ANSWER), Message("user", _QUESTION))

    def behind(text: str) -> str:
        _, found, closing = text.rpartition(_ANSWER)
        return closing if found else ""

    with suppress(BadRow):
        if (closing := behind(render(as_dicts(dialogue[:2]), template, tokenizer.special_tokens_map))).strip():
            return closing
        return behind(render(as_dicts(dialogue), template, tokenizer.special_tokens_map).rpartition(_QUESTION)[0])
    return ""


def _last_learned(row: TokenRow, tokenizer: Any) -> int:
    """The last token of a row that is trained on, before the blanks after it that some templates' markers include."""
    ids, weights = row
    learned = [int(token) for token in ids[weights > 0]]
    return next((token for token in reversed(learned) if tokenizer.decode([token]).strip()), learned[-1])


def untrained_eos(tokenizer: Any, template: str) -> str | None:
    """The token with which a template ends answers, if its markers exclude it from training: the model is never taught
    to stop.  None if it is trained on, or there is no such token."""
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


def merges_trailing_whitespace(tokenizer: Any, template: str) -> bool:
    """Whether the template ends prompts with blanks that are tokenised differently when an answer follows."""
    with suppress(BadRow):
        prompt = render(as_dicts(_ASKED[:1]), template, tokenizer.special_tokens_map, prompt=True)
        return tokens_of([prompt], tokenizer)[0].ids != _ids_before_an_answer(prompt, tokenizer)
    return False


def generation_prefix(tokenizer: Any, template: str) -> str:
    """The text with which the template opens an answer in a prompt (thoughts, in DeepSeek-R1's), but which it does not
    write before an answer without it; "" if both are the same.  If only blanks differ (Nemotron-3 closes empty thoughts
    without the line break that it opens them with), all that opens an answer."""
    with suppress(BadRow):
        asked = render(as_dicts(_ASKED[:1]), template, tokenizer.special_tokens_map, prompt=True)
        answered = render(as_dicts(_ASKED), template, tokenizer.special_tokens_map)
        differing = asked[common_prefix_length(asked, answered) :]
        question = render(as_dicts(_ASKED[:1]), template, tokenizer.special_tokens_map)
        return differing.strip() or (differing and asked[common_prefix_length(asked, question) :])
    return ""


_ASKED = (Message("user", "Hi"), Message("assistant", "Ho"))
_ANSWER, _QUESTION = "8049217356", "6172940385"
"""Contents that no template writes itself ("Hum" is in "### Human:") or changes, as it might the case of words."""


def _answered(tokenizer: Any, template: str) -> TokenRow | BadRow:
    """A question and an answer as they are trained on."""
    (row,) = tokenize_examples([Conversation(_ASKED)], tokenizer, template)
    return row


def _ending_tokens(tokenizer: Any) -> set[int]:
    """Ids of tokens that can end an answer: eos and the special tokens of the vocabulary."""
    return {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(special_tokens(tokenizer))}
