"""Ranks as a table, layer × projection, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sora_llm.report_page.grids import Grid, grids_of, short_names
from sora_llm.terminal import aligned

_TALL = 24  # layers; a taller table is split into blocks side by side if the terminal is wide enough


def rank_table(ranks: Mapping[str, int], width: int) -> list[str]:
    """The table of layer × projection in plain text."""
    grids, others = grids_of(ranks)
    lines: list[str] = []
    for grid in grids:
        if len(grids) > 1:
            lines += ["", grid.stack]
        lines += _beside(_grid_lines(grid, ranks), width)
    lines += [f"{name}  {rank or '-'}" for name, rank in others.items()]
    return lines


def _grid_lines(grid: Grid, ranks: Mapping[str, int]) -> list[str]:
    """A line of names, then a line per layer, all of the same length."""
    names = [short.removesuffix("_proj") for short in short_names(grid.projections).values()]
    rows = [["layer", *names]]
    for layer in grid.layers:
        found = [grid.cells.get((layer, projection)) for projection in grid.projections]
        rows.append([str(layer), *("" if name is None else str(ranks[name] or "-") for name in found)])
    return aligned(rows, left=0, gap=" ")


def _beside(lines: Sequence[str], width: int) -> list[str]:
    """A tall table as blocks side by side, as many as there is room for, each under the line of names."""
    head, *rows = lines
    gap = "   |  "
    room = max(1, (width + len(gap)) // (len(head) + len(gap)))
    num_blocks = min(room, -(-len(rows) // _TALL))
    size = -(-len(rows) // num_blocks)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [gap.join([head] * len(blocks))]
    for i in range(size):
        found.append(gap.join(block[i] if i < len(block) else " " * len(head) for block in blocks).rstrip())
    return [line.rstrip(" |") if line.endswith("|") else line for line in found]
