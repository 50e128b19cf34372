"""Text, numbers and tables as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sora_llm.report_page.untrusted import (
    as_number,
)


def text(value: Any) -> str:
    """Any value as escaped text."""
    return escape(str(value))


def code(value: Any) -> str:
    return f"<code>{text(value)}</code>"


def count(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:,.0f}"


def decimal(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:,.4f}"


def short(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.3g}"


def percent(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.1%}"


def size(num_bytes: int) -> str:
    """A number of bytes as text."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def missing(sentence: str) -> str:
    return f'<p class="missing">{sentence}</p>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1, marked: Sequence[int] = ()) -> str:
    """A table; cells are HTML, the first `num_text` columns are words, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="text">{cell}</{tag}>' if i < num_text else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(
        f'<tr class="{"marked" if index in marked else "row"}">{cells("td", row)}</tr>\n'
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values."""
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs)}</dl>'
