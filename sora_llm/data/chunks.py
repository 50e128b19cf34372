"""A chunk of rows → a few arrays of tokens: `Tokenizing.tokenize`, run by the processes of the pool."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from sora_llm.data.dataset import TokenRow
from sora_llm.data.formats import Conversation, Example, to_examples
from sora_llm.data.readers import BadRow, RowOrBad
from sora_llm.data.sources import DatasetSpec
from sora_llm.data.tokenize import special_tokens_written, tokenize_examples
from sora_llm.errors import UserError

ExcessLength = Literal["drop", "truncate", "split", "error"]

CHUNK_ROWS = 200
"""Rows that are tokenised together ..."""
CHUNK_CHARACTERS = 2_000_000
"""... or fewer, if they are long: a process needs about 45 bytes per character of its chunk."""

RawChunk = tuple[int, Sequence[tuple[str, RowOrBad]]]
"""The index of a data set and some of its rows with their locations."""


def in_chunks(rows: Iterable[tuple[str, RowOrBad]]) -> Iterator[list[tuple[str, RowOrBad]]]:
    """Rows with their locations, cut into chunks."""
    chunk: list[tuple[str, RowOrBad]] = []
    characters = 0
    for place, row in rows:
        chunk.append((place, row))
        characters += _characters(row)
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    """The number of characters in all texts of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_characters, value))


@dataclass(frozen=True)
class TokenChunk:
    """Rows to train on, one after the other in two arrays (one pickle instead of hundreds), and what became of the
    chunk's other rows."""

    source: int
    """Index of the data set."""
    ids: np.ndarray
    weights: np.ndarray
    """(tokens,) int32 and float32."""
    lengths: np.ndarray
    """(rows,) int64."""
    hashes: np.ndarray
    """(rows,) uint64, of a row's ids and weights."""
    origins: np.ndarray
    """(rows,) int64, which of the `rows_read` each was made from: the instances of one instruction share one origin."""
    rows_read: int
    bad_rows: Sequence[tuple[str, str]]
    """(location, reason)."""
    too_long: int
    truncated: int
    split: int
    first_too_long: tuple[str, int] | None
    """(location, tokens)."""
    unsupervised: Mapping[str, int]
    """Why rows have no supervised token → how many."""
    special_written: int
    first_special_written: tuple[str, str] | None
    """(location, token)."""

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows, keyed by the field names of `report.Counts`."""
        return {
            "rows_read": self.rows_read,
            "rows_kept": len(self.lengths),
            "num_bad_rows": len(self.bad_rows),
            "too_long": self.too_long,
            "truncated": self.truncated,
            "split": self.split,
            "no_supervised": sum(self.unsupervised.values()),
            "special_written": self.special_written,
        }

    def rows(self) -> list[TokenRow]:
        """Ids and weights of each row."""
        ends = np.cumsum(self.lengths)
        return [
            (self.ids[end - length : end], self.weights[end - length : end])
            for end, length in zip(ends, self.lengths, strict=True)
        ]

    def without(self, rows: np.ndarray) -> TokenChunk:
        """The chunk without the rows for which the mask (rows,) is true."""
        if not rows.any():
            return self
        kept = np.repeat(~rows, self.lengths)
        return replace(
            self,
            ids=self.ids[kept],
            weights=self.weights[kept],
            lengths=self.lengths[~rows],
            hashes=self.hashes[~rows],
            origins=self.origins[~rows],
        )


@dataclass(frozen=True)
class Tokenizing:
    """Everything that tokens depend on except the rows themselves."""

    specs: tuple[DatasetSpec, ...]
    tokenizer: Any
    template: str
    """Jinja source, see `resolve_template`; unused by data sets without conversations."""
    train_on_inputs: bool = False
    train_on_last_turn_only: bool = False
    sequence_len: int = 2048
    """Tokens of the longest row that is kept whole."""
    excess_length: ExcessLength = "drop"
    """Fate of longer rows; split: plain text (type completion) becomes rows of that length, others are dropped."""
    drop_duplicates: bool = False
    """Keep only the first of several rows with the same tokens and weights."""
    num_embeddings: int | None = None
    """How many ids the base has an embedding for; None: as many as the tokenizer has."""

    def __post_init__(self) -> None:
        """Raise UserError for invalid options."""
        if self.train_on_inputs and self.train_on_last_turn_only:
            raise UserError(
                "data.train_on_inputs and data.train_on_last_turn_only are mutually exclusive: set one of them"
            )
        if self.sequence_len < 2:
            raise UserError(f"data.sequence_len is {self.sequence_len}; a row needs at least 2 tokens")
        if self.excess_length not in get_args(ExcessLength):
            known = ", ".join(get_args(ExcessLength))
            raise UserError(f"data.excess_length is {self.excess_length!r}; known are {known}")
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token, with which answers end: choose a model that has one")

    def tokenize(self, chunk: RawChunk) -> TokenChunk:
        """The rows of a chunk that can be trained on, in order.  A row with an unusable example is left out."""
        source, rows = chunk
        spec = self.specs[source]
        examples, reasons = _examples_of(rows, spec)
        tokenized = tokenize_examples(
            [example for _, example in examples],
            self.tokenizer,
            self.template,
            train_on_inputs=self.train_on_inputs,
            train_on_last_turn_only=self.train_on_last_turn_only,
            separator=spec.separator,
        )
        for (i, _), result in zip(examples, tokenized, strict=True):
            reason = result if isinstance(result, BadRow) else self._without_embedding(result[0])
            if reason is not None:
                reasons.setdefault(i, reason)
        written = special_tokens_written([example for _, example in examples], self.tokenizer)
        kept: list[TokenRow] = []
        origins: list[int] = []
        counts, unsupervised = Counter[str](), Counter[str]()
        first_too_long, first_special_written = None, None
        for (i, example), result, token in zip(examples, tokenized, written, strict=True):
            if i in reasons or isinstance(result, BadRow):
                continue
            ids, weights = result
            is_cut = len(ids) > self.sequence_len
            pieces = [(ids, weights)]
            if is_cut:
                first_too_long = first_too_long or (rows[i][0], len(ids))
                outcome = self._outcome_of_excess(spec)
                counts[outcome] += 1
                pieces = _cut(ids, weights, self.sequence_len, outcome)
            found = [piece for piece in pieces if piece[1].any()]
            kept += found
            origins += [i] * len(found)
            if found and token is not None:
                first_special_written = first_special_written or (rows[i][0], token)
                counts["special_written"] += 1
            if pieces and not found:
                unsupervised[_why_unsupervised(example, is_cut and bool(result[1].any()))] += 1
        return TokenChunk(
            source,
            *_joined(kept),
            origins=np.array(origins, dtype=np.int64),
            rows_read=len(rows),
            bad_rows=[(rows[i][0], str(reason)) for i, reason in sorted(reasons.items())],
            too_long=counts["too_long"],
            truncated=counts["truncated"],
            split=counts["split"],
            first_too_long=first_too_long,
            unsupervised=unsupervised,
            special_written=counts["special_written"],
            first_special_written=first_special_written,
        )

    def _without_embedding(self, ids: np.ndarray) -> BadRow | None:
        """Why a row cannot be used, if it has a token that was added to the tokenizer alone."""
        largest = int(ids.max(initial=0))
        if self.num_embeddings is None or largest < self.num_embeddings:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return BadRow(
            f"its token {token!r} is number {largest}, and the base has only {self.num_embeddings} embeddings"
        )

    def _outcome_of_excess(self, spec: DatasetSpec) -> str:
        """The count to which a row longer than sequence_len is added."""
        if self.excess_length == "split" and spec.type == "completion":
            return "split"
        return "truncated" if self.excess_length == "truncate" else "too_long"


def _examples_of(
    rows: Sequence[tuple[str, RowOrBad]], spec: DatasetSpec
) -> tuple[list[tuple[int, Example]], dict[int, BadRow]]:
    """(row index, example) for the usable rows, and the reasons why the others are not, by row index."""
    examples: list[tuple[int, Example]] = []
    reasons: dict[int, BadRow] = {}
    for i, (_, row) in enumerate(rows):
        try:
            if isinstance(row, BadRow):
                raise row
            examples += [(i, example) for example in to_examples(row, spec)]
        except BadRow as reason:
            reasons[i] = reason
    return examples, reasons


def _cut(ids: np.ndarray, weights: np.ndarray, length: int, outcome: str) -> list[TokenRow]:
    """The pieces kept of a row longer than `length`.  A piece that was split off begins with the last token of the
    previous one, so that every token but the row's first is predicted once."""
    if outcome == "too_long":
        return []
    if outcome == "truncated":
        return [(ids[:length], weights[:length])]
    pieces = []
    for start in range(0, len(ids) - 1, length - 1):
        own = weights[start : start + length].copy()
        own[0] = 0
        pieces.append((ids[start : start + length], own))
    return pieces


def _why_unsupervised(example: Example, was_cut_off: bool) -> str:
    if was_cut_off:
        return "the answer begins after sequence_len"
    if not isinstance(example, Conversation):
        return "no supervised token has a token before it"
    if not any(message.role == "assistant" and not message.is_context for message in example.messages):
        return "no assistant turn"
    return "every token to train on has weight 0"


def _joined(rows: Sequence[TokenRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids, weights, lengths and hashes of some rows."""
    return (
        _concatenated((ids for ids, _ in rows), np.int32),
        _concatenated((weights for _, weights in rows), np.float32),
        np.array([len(ids) for ids, _ in rows], dtype=np.int64),
        np.array([_hash(ids, weights) for ids, weights in rows], dtype=np.uint64),
    )


def _concatenated(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _hash(ids: np.ndarray, weights: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + weights.tobytes(), digest_size=8).digest(), "little")
