"""Texts → tokens, and which characters of the text each of them covers."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import takewhile
from operator import eq, itemgetter
from typing import Any


class Tokens:
    """A tokenised text: its ids, and which of them cover a span of its characters."""

    def __init__(self, text: str, ids: list[int], num_added: int, encoding: Any, tokenizer: Any) -> None:
        """Args:
        num_added: number of ids at the start that are not part of the text (its opening, usually a BOS).
        encoding: from the tokenizers library, None if the tokenizer is not one of its own.
        """
        self.text, self.ids = text, ids
        self.num_added, self._encoding, self._tokenizer = num_added, encoding, tokenizer

    def of(self, start: int, end: int) -> slice:
        """The tokens that overlap the characters from `start` to before `end`."""
        if self._encoding is None:
            return self._of_by_prefixes(start, end)
        first, last = self._token_at(start), self._token_at(end)
        if self._begins_before(start, first) and self._is_added(first):
            first += 1  # a marker that swallows the blanks after it (Phi-3's do) stays with the text before
        last += self._begins_before(end, last)
        return slice(first + self.num_added, last + self.num_added)

    def num_before(self, char: int) -> int:
        """How many tokens end before this character begins; all of them if the tokenizer does not report offsets."""
        return len(self.ids) if self._encoding is None else self._token_at(char) + self.num_added

    def begin_at(self, char: int) -> bool:
        """Whether a token is known to begin at this character, so that none straddles its beginning."""
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
        if token is None:  # a blank that the tokenizer (GPT-NeoX's) leaves out of its offsets
            token = bisect_right(self._encoding.offsets, char, key=itemgetter(1))
        return token

    def _begins_before(self, char: int, token: int) -> bool:
        return token < len(self._encoding) and self._encoding.token_to_chars(token)[0] < char

    def _is_added(self, token: int) -> bool:
        return self.ids[token + self.num_added] in self._tokenizer.get_added_vocab().values()

    def _of_by_prefixes(self, start: int, end: int) -> slice:
        """`of` for tokenizers without offsets: the leading tokens shared with the text tokenised only up to a character
        are before it."""
        before, until = (tokens.ids for tokens in tokens_of([self.text[:start], self.text[:end]], self._tokenizer))
        last = common_prefix_length(self.ids, until)
        return slice(common_prefix_length(self.ids, before), last + (last < len(until)))


def tokens_of(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Tokens of texts, each preceded by one `opening` of the tokenizer; never an EOS (a prefix of a text has none)."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    begun = opening(tokenizer)
    tokens = []
    for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings or [None] * len(texts), strict=True):
        missing = [] if ids[: len(begun)] == begun else begun
        tokens.append(Tokens(text, missing + ids, len(missing), encoding, tokenizer))
    return tokens


def opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text: a BOS, nothing, or several tokens as GLM's does.  Determined
    by trial: in transformers 5 `add_bos_token` is False on LLaMA's tokenizers, which add it nevertheless."""
    whole, bare = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((place for place in places if whole[place : place + len(bare)] == bare), 0)]


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the longest common prefix of two sequences or texts."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))


def names_of_special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that matches any special token in a text; never matches if there are none."""
    return re.compile("|".join(re.escape(token) for token in special_tokens(tokenizer) if token) or "(?!)")


def special_tokens(tokenizer: Any) -> list[str]:
    """The named special tokens (eos and so on) and those marked special in the vocabulary, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
