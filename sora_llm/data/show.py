"""Displaying prepared data: rows decoded with their masks (`decoded`), a report as a table (`table`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sora_llm.data.dataset import TokenRow
from sora_llm.data.tokens import common_prefix_length
from sora_llm.row_types import ROW_OUTCOMES
from sora_llm.terminal import aligned

_WIDTH = 100
_PATH_WIDTH = 40
_BAR_WIDTH = 40
_SAMPLE_CHARACTERS = 2400  # of a decoded row; long segments are cut in the middle
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"

Section = Mapping[str, Any]
"""A `DataReport` as JSON, "samples" replaced by {"row", "tokens", "supervised_tokens", "segments"} each."""


def decoded(row: TokenRow, tokenizer: Any) -> list[tuple[str, float]]:
    """(text, weight) of each stretch of a row with equal weights.  A character whose bytes are in two stretches belongs
    to the second."""
    ids, weights = row
    ends = [end for _, end in _stretches(weights)]
    text = _decode(tokenizer, ids)
    # Each stretch decoded alone would lose the space before its first word, which sentencepiece drops at the start.
    cuts = [0, *(common_prefix_length(_decode(tokenizer, ids[:end]), text) for end in ends[:-1]), len(text)]
    return [(text[cuts[i] : cuts[i + 1]], float(weights[end - 1])) for i, end in enumerate(ends)]


def _stretches(weights: Iterable[float]) -> Iterator[tuple[float, int]]:
    """(weight, end) of each."""
    end = 0
    for weight, run in groupby(weights):
        end += sum(1 for _ in run)
        yield weight, end


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


# ----- the table ------------------------------------------------------------------------------------------------------


def table(name: str, section: Section, *, colour: bool = False) -> str:
    """A report in words: what was read and kept, lengths, bad rows, samples.

    Args:
        name: of the rows, "train" for example.
        colour: dim masked text instead of putting the other text between ⟦ ⟧.
    """
    parts = [
        [_heading(f"{name}  {_origin(section)}", colour)],
        _dataset_lines(section),
        _dropped_lines(section),
        _length_lines(section),
        _bad_row_lines(section),
        *(_sample_lines(sample, section, colour) for sample in section["samples"]),
    ]
    if section["samples"]:
        parts.insert(-len(section["samples"]), [_legend(colour)])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _heading(text: str, colour: bool) -> str:
    line = f"━━ {text} "
    line += "━" * (_WIDTH - len(line))
    return f"{_BOLD}{line}{_PLAIN}" if colour else line


def _origin(section: Section) -> str:
    if section.get("sample_rows"):
        return f"a sample: at most {section['sample_rows']:,} rows of each data set, nothing is prepared"
    return "from the cache" if section["from_cache"] else "prepared now"


def _dataset_lines(section: Section) -> list[str]:
    columns = [("read", "rows_read"), ("kept", "rows_kept")]
    columns += [(title, key) for title, key in ROW_OUTCOMES if section[key]]
    columns += [("tokens", "tokens")]
    rows = [["data set", "type", *(title for title, _ in columns), "supervised"]]
    for dataset in section["datasets"]:
        rows.append([_short_path(dataset["path"]), dataset["type"], *_numbers(dataset, columns)])
    if len(section["datasets"]) > 1:
        rows.append(["all", "", *_numbers(section, columns)])
    return [f"  {line}" for line in aligned(rows, left=2)]


def _numbers(counts: Section, columns: Sequence[tuple[str, str]]) -> list[str]:
    return [*(f"{counts[key]:,}" for _, key in columns), f"{counts['supervised_fraction']:.1%}"]


def _short_path(path: str) -> str:
    """The end of a path, starting at a folder name if that fits."""
    path = str(Path(path))
    if len(path) <= _PATH_WIDTH:
        return path
    end = path[-(_PATH_WIDTH - 2) :]
    return "…/" + end.partition("/")[2] if "/" in end else f"…{path[-(_PATH_WIDTH - 1) :]}"


def _dropped_lines(section: Section) -> list[str]:
    lines = []
    if section["first_too_long"] is not None:
        location, tokens = section["first_too_long"]
        excess_counts = (("dropped", "too_long"), ("cut", "truncated"), ("split", "split"))
        outcome = ", ".join(f"{section[key]:,} {word}" for word, key in excess_counts if section[key])
        lines.append(
            f"  too long    {outcome} at sequence_len = {section['sequence_len']:,}, the first {location} with "
            f"{tokens:,} tokens"
        )
    for dataset in section["datasets"]:
        for reason, count in dataset["unsupervised"].items():
            of = f" ({_short_path(dataset['path'])})" if len(section["datasets"]) > 1 else ""
            lines.append(f"  untrained   {count:,} dropped: {reason}{of}")
    if section["duplicates"]:
        outcome = "dropped" if section["drop_duplicates"] else "kept; data.drop_duplicates drops them"
        lines.append(f"  repeated    {section['duplicates']:,} the same as earlier rows ({outcome})")
    if section["first_special_written"] is not None:
        location, token = section["first_special_written"]
        lines.append(
            f"  special     {section['special_written']:,} with a special token written in a message, the first "
            f"{location} with {with_marks(token)}"
        )
    return lines


def _length_lines(section: Section) -> list[str]:
    if not section["rows_kept"]:
        return []
    lines = [
        f"  length      mean {section['mean_length']:,.0f}, median {section['median_length']:,.0f}, longest "
        f"{section['max_length']:,} tokens; packed into sequences of {section['sequence_len']:,} they fill "
        f"{section['fill_rate']:.1%}"
    ]
    bins = section["length_histogram"]
    most = max(rows for _, _, rows in bins)
    width = len(f"{bins[-1][1]:,}")
    for low, high, rows in bins:
        lines.append(
            f"  {low:>{width},} – {high:>{width},}  {_bar(rows / most):<{_BAR_WIDTH}}  {rows:>9,}  "
            f"{rows / section['rows_kept']:>6.1%}"
        )
    return lines


def _bar(share: float) -> str:
    """A bar of `_BAR_WIDTH` cells at share 1; anything above 0 is visible."""
    eighths = max(round(share * _BAR_WIDTH * 8), 1 if share > 0 else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _bad_row_lines(section: Section) -> list[str]:
    total, listed = section["num_bad_rows"], section["bad_rows"]
    if not total:
        return []
    shown = "" if total == len(listed) else f", the first {len(listed)}"
    lines = [f"  malformed   {total:,} of {section['rows_read']:,} rows{shown}:"]
    lines += [f"    {location}: {with_marks(reason, line_break=' ')}" for location, reason in listed]
    if total > len(listed):
        counts = "; ".join(f"{count:,} × {reason}" for reason, count in list(section["bad_reasons"].items())[:5])
        lines.append(f"    most often: {with_marks(counts, line_break=' ')}")
    return lines


def _legend(colour: bool) -> str:
    how = "dim is context" if colour else "between ⟦ ⟧ is trained on"
    return f"  samples     {how}, the rest is {'trained on' if colour else 'context'}; ↵ ends a line"


def _sample_lines(sample: Mapping[str, Any], section: Section, colour: bool) -> list[str]:
    title = (
        f"row {sample['row'] + 1:,} of {section['rows_kept']:,}: {sample['tokens']:,} tokens, "
        f"{sample['supervised_tokens']:,} trained on"
    )
    budget = max(200, _SAMPLE_CHARACTERS // max(1, len(sample["segments"])))
    segments = [(with_marks(_shortened(text, budget)), weight) for text, weight in sample["segments"]]
    return [f"  ┌ {title}", *(f"  │ {line}" for line in _wrapped(segments, colour)), "  └"]


def _wrapped(segments: Sequence[tuple[str, float]], colour: bool) -> list[str]:
    """Lines of the width that the frame leaves, each with its own colours: the frame has none."""
    lines, column, width = [""], 0, _WIDTH - 4
    for text, weight in segments:
        if weight and not colour:
            text = f"⟦{text}⟧"
        if weight not in (0, 1):
            text = f"×{weight:g} {text}"
        for word in re.findall(rf"\n|\S{{1,{width}}} *| +", text):
            if word == "\n" or (column and column + len(word.rstrip()) > width):
                lines.append("")
                column = 0
            if word != "\n":
                lines[-1] += f"{_DIM}{word}{_PLAIN}" if colour and not weight else word
                column += len(word)
    return [line.replace(f"{_PLAIN}{_DIM}", "") for line in lines]


def _shortened(text: str, budget: int) -> str:
    left_out = len(text) - budget
    if left_out <= budget // 4:  # leaving out so little only makes it harder to read
        return text
    return f"{text[: budget * 2 // 3]} […{left_out:,} characters…] {text[-(budget // 3) :]}"


def with_marks(text: str, line_break: str = "↵\n") -> str:
    """Text with its control and other invisible characters shown, so that it cannot command a terminal."""
    return "".join(_mark(character, line_break) for character in text)


def _mark(character: str, line_break: str) -> str:
    if character == "\n":
        return line_break
    if character == "\t":
        return "⇥"
    if character.isprintable():
        return character
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)  # the picture of the control character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
