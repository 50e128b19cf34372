"""The part of the page about ranks: a heat map of layer × projection, and ranks over time."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from sora_llm.report_page import markup
from sora_llm.report_page.charts import Chart, colour_of, is_dark, rank_picture
from sora_llm.report_page.grids import Grid, short_names, split_name
from sora_llm.report_page.record import Record
from sora_llm.report_page.svg import chart_svg, picture_svg

ROWS_PER_BLOCK = 40  # of a heat map; more layers form blocks side by side


def rank_section(record: Record) -> str:
    """The newest ranks, module by module."""
    ranks = record.ranks
    if not ranks:
        return markup.missing("No ranks yet: they are logged from the sparsify phase on.")
    top = max(ranks.values())
    num_zero = sum(rank == 0 for rank in ranks.values())
    when = f"After step {record.rank_lines[-1].step:,}" if record.rank_lines else "As exported"
    if record.state == "finished":
        when = "As exported"
    parts = [f"<p>{when}: {len(ranks):,} modules, ranks {min(ranks.values())} to {top}, {num_zero:,} at rank 0.</p>"]
    grids, others = record.grids
    if grids:
        parts.append(_scale(top))
    for grid in grids:
        if len(grids) > 1:
            parts.append(f"<h3>{markup.code(grid.stack)}</h3>")
        parts.append(heat_map(grid, ranks, top))
        parts.append(_projections(grid, ranks))
    if others:
        parts.append("<h3>Modules outside of layers</h3>" if grids else "")
        rows = [(markup.code(name), str(rank)) for name, rank in others.items()]
        parts.append(markup.table(("module", "rank"), rows))
    return "".join(parts)


def _scale(top: int, pruned: str = '<i class="zero"></i>rank 0: the module has no adapter') -> str:
    """The legend of the colours."""
    colours = f"rank 1<i class='colours'></i>{top}" if top > 1 else f"{_one_colour(top)}rank 1"
    return f'<p class="scale"><span>{colours}</span><span>{pruned}</span></p>'


def _one_colour(top: int) -> str:
    red, green, blue = colour_of(1, top)
    return f'<i style="background:rgb({red},{green},{blue})"></i>'


def heat_map(grid: Grid, ranks: Mapping[str, int], top: int) -> str:
    """Layer × projection with numbers, as tables: blocks of at most `ROWS_PER_BLOCK` layers side by side."""
    num_blocks = -(-len(grid.layers) // ROWS_PER_BLOCK)
    size = -(-len(grid.layers) // num_blocks)
    names = short_names(grid.projections)
    shown = {name: short.removesuffix("_proj") for name, short in names.items()}
    if len(set(shown.values())) < len(shown):
        shown = names
    heads = "".join(f'<th title="{markup.text(name)}">{markup.text(short)}</th>' for name, short in shown.items())
    head = f"<thead><tr><th>layer</th>{heads}<th>mean</th></tr></thead>"
    style = "heat wide" if num_blocks == 1 and len(names) <= 8 else "heat"
    blocks = []
    for start in range(0, len(grid.layers), size):
        rows = "".join(_heat_row(grid, layer, ranks, top) for layer in grid.layers[start : start + size])
        blocks.append(f'<table class="{style}">{head}<tbody>{rows}</tbody></table>')
    return f'<div class="scroll"><div class="heat-blocks">{"".join(blocks)}</div></div>'


def _heat_row(grid: Grid, layer: int, ranks: Mapping[str, int], top: int) -> str:
    names = [grid.cells.get((layer, projection)) for projection in grid.projections]
    cells = "".join(_heat_cell(name, ranks, top) for name in names)
    mean = fmean(ranks[name] for name in names if name is not None)
    return f'<tr><th scope="row">{layer}</th>{cells}<td class="mean">{mean:.1f}</td></tr>\n'


def _heat_cell(name: str | None, ranks: Mapping[str, int], top: int) -> str:
    if name is None:
        return "<td></td>"
    rank = ranks[name]
    if rank <= 0:
        return f'<td class="zero" title="{markup.text(name)}: rank 0">{rank}</td>'
    colour = colour_of(rank, top)
    tone = "dark" if is_dark(colour) else "bright"
    style = f"background:rgb{str(colour).replace(' ', '')}"
    return f'<td class="{tone}" style="{style}" title="{markup.text(name)}: rank {rank}">{rank}</td>'


def _projections(grid: Grid, ranks: Mapping[str, int]) -> str:
    """A row per projection, over all layers."""
    rows = []
    for projection, short in short_names(grid.projections).items():
        found = [ranks[name] for (_, other), name in grid.cells.items() if other == projection]
        zeros = f"{sum(rank == 0 for rank in found)} of {len(found)}"
        rows.append((markup.text(short), f"{fmean(found):.2f}", str(min(found)), str(max(found)), zeros))
    return markup.table(("projection", "mean rank", "lowest", "highest", "at rank 0"), rows)


def ranks_over_time(record: Record, chart: Chart | None) -> str:
    """Mean ranks over the steps, and the ranks of every module."""
    if chart is None:
        return markup.missing("No ranks yet.")
    parts = [chart_svg(chart, "mean rank over steps")]
    if len(chart.panels[0].series) > 2:
        parts.append('<p class="quiet">A projection\'s line is the mean over its layers.</p>')
    picture = rank_picture(record)
    if picture is not None:
        one = split_name(picture.labels[0]) is not None
        order = ", by projection and from the first layer to the last" if one else ""
        parts.append(f"<h3>Every module</h3><p>A row per module{order}; blank where no ranks are logged yet.</p>")
        parts.append(_scale(picture.top, '<i class="pruned"></i>rank 0'))
        parts.append(picture_svg(picture, "rank of every module over steps"))
    return "".join(parts)
