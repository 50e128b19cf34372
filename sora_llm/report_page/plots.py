"""The same charts as PNGs, for slides and papers: plots/*.png in the run directory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sora_llm.report_page.charts import (
    COLOURS,
    Chart,
    Picture,
    Series,
    charts,
    colour_of,
    is_dark,
    panel_range,
    rank_picture,
    tick_labels,
    ticks,
)
from sora_llm.report_page.grids import Grid, short_names
from sora_llm.report_page.record import Record

_BANDS = {"dense": "#eef2f7", "sparsify": "#fdf3e3", "finetune": "#eaf5ea"}
_NOTHING, _PRUNED = (1.0, 1.0, 1.0), (0.7, 0.7, 0.7)
_GRID, _QUIET = "#d8d8d8", "#5c6672"


def write_plots(record: Record, folder: Path) -> list[Path]:
    """Draw everything there is data for; files appear complete or not at all; OSError if one cannot be written."""
    folder.mkdir(exist_ok=True)
    written = []
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a $ in a module's name is a $
        warnings.simplefilter("ignore")  # about letters that the font lacks
        for name, figure in _figures(record):
            path = folder / f"{name}.png"
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                FigureCanvasAgg(figure).print_png(str(temporary))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            written.append(path)
    return written


def _figures(record: Record) -> Iterator[tuple[str, Figure]]:
    for name, chart in charts(record).items():
        yield name, _chart(chart)
    grids, _ = record.grids
    for index, grid in enumerate(grids):
        yield f"heat_map{index + 1 if len(grids) > 1 else ''}", heat_map(grid, record.ranks)
    picture = rank_picture(record)
    if picture is not None:
        yield picture.name, _picture(picture)


def _chart(chart: Chart) -> Figure:
    heights = [panel.height / 60 for panel in chart.panels]
    figure = Figure(figsize=(9, sum(heights) + 0.9), dpi=120, layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, panel in zip(grid[:, 0], chart.panels, strict=True):
        for span in chart.spans:
            axes.axvspan(span.first, span.last, color=_BANDS[span.phase], zorder=0, linewidth=0)
            if span.stage is None and panel is chart.panels[0]:
                axes.text(span.first, 1.02, span.phase, transform=axes.get_xaxis_transform(), fontsize=7, color=_QUIET)
        for series in panel.series:
            xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
            axes.plot(xs, ys, label=series.label, **_look(series))
            for x, y, note in zip(xs, ys, series.notes, strict=False):
                axes.annotate(note, (x, y), (0, 13), textcoords="offset points", ha="center", fontsize=7)
        low, high = panel_range(panel)
        places = ticks(low, high, most=panel.height / 32)
        axes.set(ylabel=panel.y_label, ylim=(low, high), yticks=places, yticklabels=tick_labels(places))
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.05), ncols=4, frameon=False, fontsize=8)
    low, high = chart.x_range if chart.from_zero else axes.get_xlim()
    places = ticks(low, high, 8, least=1.0)
    axes.set(xlabel=chart.x_label, xlim=(low, high), xticks=places, xticklabels=tick_labels(places))
    return figure


def _look(series: Series) -> dict[str, Any]:
    """A series' style as arguments of `plot`."""
    colour, style = COLOURS[series.colour], series.style if series.has_dots else "thin"
    looks: Mapping[str, dict[str, Any]] = {
        "line": {"linewidth": 1.8},
        "thin": {"linewidth": 1.1},
        "faint": {"linewidth": 0.8, "alpha": 0.35},
        "dashed": {"linewidth": 1.5, "linestyle": "--"},
        "linked": {"linewidth": 1.2, "marker": "o", "markersize": 3.5},
        "dots": {"linestyle": "none", "marker": "o", "markersize": 5},
        "ring": {"linestyle": "none", "marker": "o", "markersize": 13, "fillstyle": "none", "markeredgewidth": 2},
        "diamond": {"linestyle": "none", "marker": "D", "markersize": 14, "fillstyle": "none", "markeredgewidth": 2},
    }
    return {"color": colour, **looks[style]}


def heat_map(grid: Grid, ranks: Mapping[str, int]) -> Figure:
    """Layer × projection with the rank in each cell, as tall as its layers need."""
    names = short_names(grid.projections)
    top = max((ranks[name] for name in grid.cells.values()), default=1)
    width = 1.2 + 0.75 * len(grid.projections)
    figure = Figure(figsize=(max(width, 4), 0.9 + 0.2 * len(grid.layers)), dpi=120, layout="constrained")
    axes = figure.subplots()
    found = [[grid.cells.get((layer, projection)) for projection in grid.projections] for layer in grid.layers]
    cells = [[None if name is None else ranks[name] for name in row] for row in found]
    axes.imshow([[_rgb(rank, top) for rank in row] for row in cells], aspect="auto", interpolation="nearest")
    for y, row in enumerate(cells):
        for x, rank in enumerate(row):
            if rank is not None:
                colour = "white" if rank > 0 and is_dark(colour_of(rank, top)) else "black"
                axes.text(x, y, str(rank), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=8)
    axes.set_yticks(range(len(grid.layers)), [str(layer) for layer in grid.layers], fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    axes.set_title(f"rank of each module{f' of {grid.stack}' if grid.stack else ''} (grey: 0)", fontsize=9)
    axes.spines[:].set_visible(False)
    return figure


def _picture(picture: Picture) -> Figure:
    figure = Figure(figsize=(9, max(2.5, min(8.0, 0.03 * len(picture.rows) + 1))), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = [[_rgb(rank, picture.top) for rank in row] for row in picture.rows]
    low, high = picture.x_range
    num_rows = len(picture.rows)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(low, high, num_rows - 0.5, -0.5))
    starts = [sum(count for _, count in picture.groups[:i]) for i in range(len(picture.groups))]
    middles = [start + (count - 1) / 2 for start, (_, count) in zip(starts, picture.groups, strict=True)]
    axes.set_yticks(middles, [name for name, _ in picture.groups], fontsize=8)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1)
    places = ticks(low, high, 8, least=1.0)
    axes.set(xlabel="step", xlim=(low, high), xticks=places, xticklabels=tick_labels(places))
    axes.set_title(f"rank of every module over time (1 to {picture.top}; grey: 0)", fontsize=9)
    return figure


def _rgb(rank: int | None, top: int) -> tuple[float, float, float]:
    if rank is None:
        return _NOTHING
    if rank <= 0:
        return _PRUNED
    red, green, blue = colour_of(rank, top)
    return red / 255, green / 255, blue / 255
