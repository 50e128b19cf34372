"""The part of the page about the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sora_llm.report_page import markup
from sora_llm.report_page.record import Record
from sora_llm.report_page.untrusted import (
    as_int,
    as_list,
    as_mapping,
    as_number,
    setting,
)
from sora_llm.row_types import ROW_OUTCOMES


def data_section(record: Record) -> str:
    """Counts of kept and left-out rows by data set; without a data report, the data sets that the config names."""
    parts = [_part(name, as_mapping(record.data.get(name))) for name in ("train", "dev")]
    held_out = as_int(record.data.get("held_out"))
    if held_out:
        parts.append(f"<p>Dev rows: {held_out:,} of the train rows (data.val_set_size).</p>")
    if any(parts):
        return "".join(parts)
    datasets = [as_mapping(one) for one in as_list(setting(record.config, "data", "datasets"))]
    rows = [(markup.code(one.get("path")), markup.text(one.get("type"))) for one in datasets]
    table = markup.table(("data set", "type"), rows, num_text=2) if rows else ""
    return table + markup.missing("Rows, lengths and masks: <code>sora-llm preprocess CONFIG</code> counts them.")


def _part(name: str, section: Mapping[str, Any]) -> str:
    datasets = [as_mapping(one) for one in as_list(section.get("datasets"))]
    if not datasets:
        return ""
    columns = [("read", "rows_read"), ("kept", "rows_kept")]
    columns += [(title, key) for title, key in ROW_OUTCOMES if any(as_number(one.get(key)) for one in datasets)]
    columns.append(("tokens", "tokens"))
    rows = [_row(markup.code(one.get("path")), one, columns) for one in datasets]
    if len(rows) > 1:
        rows.append(_row("all", section, columns))
    heads = ["data set", "type", *(title for title, _ in columns), "supervised"]
    parts = [f"<h3>{name.capitalize()} rows</h3>", markup.table(heads, rows, num_text=2)]

    def number(key: str) -> str:
        return markup.count(section.get(key))

    if as_number(section.get("mean_length")) is not None:
        parts.append(
            f"<p>Tokens per row: mean {number('mean_length')}, median {number('median_length')}, longest "
            f"{number('max_length')}. Packed into sequences of {number('sequence_len')}, all rows together fill "
            f"{markup.percent(section.get('fill_rate'))}.</p>"
        )
    return "".join([*parts, _histogram(section)])


def _row(name: str, counts: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    numbers = [markup.count(counts.get(key)) for _, key in columns]
    return [name, markup.text(counts.get("type", "")), *numbers, markup.percent(counts.get("supervised_fraction"))]


def _histogram(section: Mapping[str, Any]) -> str:
    bins = [
        (low, high, rows)
        for low, high, rows in (one for one in as_list(section.get("length_histogram")) if len(as_list(one)) == 3)
        if None not in (as_int(low), as_int(high), as_int(rows))
    ]
    most = max((rows for _, _, rows in bins), default=0)
    if most <= 0:
        return ""
    lines = "".join(
        f'<tr><td>{low:,} – {high:,}</td><td class="bar"><i style="width:{100 * max(0, rows) / most:.1f}%"></i></td>'
        f"<td>{rows:,}</td></tr>\n"
        for low, high, rows in bins
    )
    return (
        '<div class="scroll"><table class="bars"><thead><tr><th>tokens</th><th></th><th>rows</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
