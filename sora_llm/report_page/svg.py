"""Charts as inline SVG: coloured by the page's style sheet, so that they follow its light and dark scheme."""

from __future__ import annotations

import base64
import struct
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from html import escape

from sora_llm.report_page.charts import (
    Chart,
    Panel,
    Picture,
    Series,
    colour_of,
    panel_range,
    tick_labels,
    ticks,
)
from sora_llm.report_page.record import Span

WIDTH = 860
LEFT, RIGHT, TOP, GAP, BOTTOM = 74, 26, 22, 24, 42
_LETTER = 6.6  # width of a letter in labels
_TOOLTIPS = 120
_DOTTED = ("linked", "dots", "ring", "diamond")


class _Axes:
    """Maps a panel's values to positions in the drawing."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], top: float, height: float):
        self.x_range, self.y_range, self.top, self.height = x_range, y_range, top, height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (1 - (value - low) / (high - low))

    @property
    def bottom(self) -> float:
        return self.top + self.height


def chart_svg(chart: Chart, title: str) -> str:
    """The chart with its legend."""
    x_range = chart.x_range
    if not chart.from_zero:  # dots on the frame would be half outside
        room = 0.04 * (x_range[1] - x_range[0])
        x_range = (x_range[0] - room, x_range[1] + room)
    parts: list[str] = []
    top = float(TOP)
    for index, panel in enumerate(chart.panels):
        axes = _Axes(x_range, panel_range(panel), top, panel.height)
        parts += _panel(chart, panel, axes, f"clip-{chart.name}-{index}", is_first=index == 0)
        top = axes.bottom + GAP
    parts += _x_axis(axes, x_range, chart.x_label)
    return _key(chart) + _figure("".join(parts), axes.bottom + BOTTOM, title)


def _figure(content: str, height: float, title: str) -> str:
    return (
        f'<div class="scroll"><svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{content}</svg></div>'
    )


def _x_axis(axes: _Axes, x_range: tuple[float, float], name: str) -> list[str]:
    values = ticks(*x_range, most=8, least=1.0)  # of steps or parameters
    parts = [
        f'<text class="tick" x="{axes.x(value):.1f}" y="{axes.bottom + 16:.1f}" text-anchor="middle">{label}</text>'
        for value, label in zip(values, tick_labels(values), strict=True)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{axes.bottom + 34:.1f}" text-anchor="middle">{escape(name)}</text>'
    )
    return parts


def _panel(chart: Chart, panel: Panel, axes: _Axes, clip: str, *, is_first: bool) -> list[str]:
    box = f'x="{LEFT}" y="{axes.top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{axes.height:.1f}"'
    parts = [f'<clipPath id="{clip}"><rect {box}/></clipPath>']
    parts += [_band(span, axes, with_name=is_first) for span in chart.spans]
    parts += _stage_marks(chart.spans, axes, with_name=is_first)
    values = ticks(*axes.y_range, most=panel.height / 32)
    for value, label in zip(values, tick_labels(values), strict=True):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    middle = axes.top + axes.height / 2
    parts.append(
        f'<text class="y-name" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">'
        f"{escape(panel.y_label)}</text>"
    )
    parts.append(f'<g clip-path="url(#{clip})">')
    parts += [_series(series, axes) for series in panel.series if series.style not in ("ring", "diamond")]
    parts.append("</g>")
    parts += [_series(series, axes) for series in panel.series if series.style in ("ring", "diamond")]
    for series in panel.series:
        parts += _notes(series, axes)
    parts += _tooltips(chart, panel, axes)
    return parts


def _band(span: Span, axes: _Axes, *, with_name: bool) -> str:
    left, right = axes.x(span.first), axes.x(span.last)
    band = (
        f'<rect class="band {span.phase}" x="{left:.1f}" y="{axes.top:.1f}" width="{right - left:.1f}" '
        f'height="{axes.height:.1f}"/>'
    )
    if with_name and span.stage is None and right - left > _LETTER * len(span.phase):
        band += f'<text class="phase" x="{left + 1:.1f}" y="{axes.top - 6:.1f}">{span.phase}</text>'
    return band


def _stage_marks(spans: Sequence[Span], axes: _Axes, *, with_name: bool) -> list[str]:
    """A line where each stage of a path begins."""
    parts = []
    starts: dict[int, tuple[int, int]] = {}
    for span in spans:
        if span.stage is not None:
            first, last = starts.get(span.stage, (span.first, span.last))
            starts[span.stage] = (min(first, span.first), max(last, span.last))
    for stage, (first, last) in starts.items():
        x = axes.x(first)
        parts.append(f'<line class="stage" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top:.1f}" y2="{axes.bottom:.1f}"/>')
        if with_name:
            name = f"stage {stage}" if axes.x(last) - x > 8 * _LETTER else str(stage)
            if axes.x(last) - x > _LETTER * (len(name) + 1):
                parts.append(f'<text class="phase" x="{x + 1:.1f}" y="{axes.top - 6:.1f}">{name}</text>')
    return parts


def _series(series: Series, axes: _Axes) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in series.points]
    parts = []
    if series.style not in ("dots", "ring", "diamond") and len(places) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {series.style} s{series.colour}" d="M{path}"/>')
    if (series.style in _DOTTED and series.has_dots) or len(places) == 1:
        parts += [_dot(series, x, y) for x, y in places]
    return "".join(parts)


def _dot(series: Series, x: float, y: float) -> str:
    if series.style == "ring":
        return f'<circle class="ring s{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
    if series.style == "diamond":
        return f'<path class="ring s{series.colour}" d="M{x:.1f} {y - 14:.1f}l14 14l-14 14l-14 -14z"/>'
    return f'<circle class="dot s{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'


def _notes(series: Series, axes: _Axes) -> list[str]:
    """Labels above points, if they do not run into each other."""
    parts: list[str] = []
    free_from = float(LEFT)
    for (x, y), note in zip(series.points, series.notes, strict=False):
        half = _LETTER * len(note) / 2
        place = min(max(axes.x(x), LEFT + half), WIDTH - RIGHT - half)
        if note and place - half >= free_from:
            parts.append(
                f'<text class="note" x="{place:.1f}" y="{axes.y(y) - 18:.1f}" text-anchor="middle">'
                f"{escape(note)}</text>"
            )
            free_from = place + half + 4
    return parts


def _tooltips(chart: Chart, panel: Panel, axes: _Axes) -> list[str]:
    """Invisible strips that show the values under the pointer."""
    series = [one for one in panel.series if one.points and one.style not in ("faint", "ring", "diamond")]
    xs = sorted({x for one in series for x, _ in one.points})
    xs = xs[:: -(-len(xs) // _TOOLTIPS) or 1]
    parts = []
    for index, x in enumerate(xs):
        left = axes.x((x + xs[index - 1]) / 2) if index else float(LEFT)
        right = axes.x((x + xs[index + 1]) / 2) if index + 1 < len(xs) else float(WIDTH - RIGHT)
        said = [f"{chart.x_label} {x:,.0f}"]
        for one in series:
            found, value = _nearest(one, x)
            elsewhere = "" if found == x else f" (at {found:,.0f})"
            said.append(f"{one.label} {_number(value)}{elsewhere}")
        parts.append(
            f'<rect class="tip" x="{left:.1f}" y="{axes.top:.1f}" width="{max(0.0, right - left):.1f}" '
            f'height="{axes.height:.1f}"><title>{escape(chr(10).join(said))}</title></rect>'
        )
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.5g}"


def _nearest(series: Series, x: float) -> tuple[float, float]:
    """The point nearest to `x`."""
    points = series.points
    at = bisect_left(points, (x, float("-inf")))
    near = points[max(0, at - 1) : at + 1]
    return min(near, key=lambda point: abs(point[0] - x))


def _key(chart: Chart) -> str:
    """The legend; empty if there is only one line."""
    shown: dict[str, Series] = {}
    for panel in chart.panels:
        if len(panel.series) > 1:
            shown |= {series.label: series for series in panel.series if series.points}
    items = [f"<span>{_sample(series)}{escape(series.label)}</span>" for series in shown.values()]
    if any(span.stage is not None for span in chart.spans):  # their bands are not named in the chart
        phases = dict.fromkeys(span.phase for span in chart.spans)
        items += [f'<span><i class="swatch {phase}"></i>{phase}</span>' for phase in phases]
    return f'<p class="key">{"".join(items)}</p>' if items else ""


def _sample(series: Series) -> str:
    mark = ""
    if series.style not in ("dots", "ring", "diamond"):
        mark = f'<path class="line {series.style} s{series.colour}" d="M1 7L27 7"/>'
    if series.style == "ring":
        mark = f'<circle class="ring s{series.colour}" cx="14" cy="7" r="5.5"/>'
    elif series.style == "diamond":
        mark = f'<path class="ring s{series.colour}" d="M14 0.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z"/>'
    elif series.style in _DOTTED:
        mark += f'<circle class="dot s{series.colour}" cx="14" cy="7" r="3.6"/>'
    return f'<svg class="sample" viewBox="0 0 28 14" aria-hidden="true">{mark}</svg>'


# ----- a picture of ranks ---------------------------------------------------------------------------------------------


def picture_svg(picture: Picture, title: str) -> str:
    """Module × step as an image, one pixel each, enlarged."""
    row_height = max(1.0, min(10.0, 560 / len(picture.rows)))
    axes = _Axes(picture.x_range, (0.0, 1.0), 4, row_height * len(picture.rows))
    width = WIDTH - LEFT - RIGHT
    parts = [
        f'<image x="{LEFT}" y="{axes.top}" width="{width}" height="{axes.height:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{base64.b64encode(_png(picture)).decode()}"/>'
    ]
    y = axes.top
    for index, (name, num_rows) in enumerate(picture.groups):
        if index:
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        middle = y + row_height * num_rows / 2
        if row_height * num_rows >= 11:
            label = name if len(name) <= 9 else f"…{name[-8:]}"
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}'
                f"<title>{escape(name)}</title></text>"
            )
        y += row_height * num_rows
    parts += _x_axis(axes, picture.x_range, "step")
    return _figure("".join(parts), axes.bottom + BOTTOM, title)


def _png(picture: Picture) -> bytes:
    """An indexed PNG: colour 0 is transparent (rank not known), 1 is rank 0, the others are ranks 1 to the largest."""
    shades = min(picture.top, 254)
    palette = [(0, 0, 0), (140, 140, 140), *(colour_of(rank, shades) for rank in range(1, shades + 1))]

    def index(rank: int | None) -> int:
        if rank is None:
            return 0
        return 1 if rank <= 0 else 1 + max(1, round(rank * shades / picture.top))

    rows = b"".join(b"\0" + bytes(map(index, row)) for row in picture.rows)
    header = struct.pack(">IIBBBBB", len(picture.rows[0]), len(picture.rows), 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", bytes(v for colour in palette for v in colour)), (b"tRNS", b"\0")]
    chunks += [(b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
