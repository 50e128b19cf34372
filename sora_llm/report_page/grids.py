"""Modules by layer and projection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Grid:
    """The modules of one stack of layers: cells[layer, projection] is a module's name."""

    stack: str
    layers: Sequence[int]
    projections: Sequence[str]
    cells: Mapping[tuple[int, str], str]


_LAYER = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")


def split_name(name: str) -> tuple[str, int, str] | None:
    """(stack, layer, projection) of "model.layers.3.self_attn.q_proj"; None for a module outside the layers."""
    found = _LAYER.fullmatch(name)
    return (found[1] or "", int(found[2]), found[3]) if found else None


def grids_of(ranks: Mapping[str, int]) -> tuple[list[Grid], dict[str, int]]:
    """The modules of `ranks` by stack, layer and projection, and those that are in no layer."""
    stacks: dict[str, dict[tuple[int, str], str]] = {}
    others = {}
    for name, rank in ranks.items():
        place = split_name(name)
        if place is None:
            others[name] = rank
        else:
            stacks.setdefault(place[0], {})[place[1], place[2]] = name
    grids = [
        Grid(stack, sorted({layer for layer, _ in cells}), _in_order(dict.fromkeys(name for _, name in cells)), cells)
        for stack, cells in stacks.items()
    ]
    return grids, others


IN_A_BLOCK = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""In the order of data flow; adapter files list them alphabetically."""


def _in_order(projections: Iterable[str]) -> list[str]:
    """Projections in the order of a block if they are the usual ones, else in the given order."""
    found = list(projections)
    places = {name: name.rpartition(".")[2] for name in found}
    if not set(places.values()) <= set(IN_A_BLOCK):
        return found
    return sorted(found, key=lambda name: IN_A_BLOCK.index(places[name]))


def short_names(projections: Iterable[str]) -> dict[str, str]:
    """Each projection's last part, or its full name if two would be the same."""
    names = list(projections)
    ends = [name.rpartition(".")[2] for name in names]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)}


def projection_means(ranks: Mapping[str, int]) -> dict[str, float]:
    """The mean rank of each projection over all layers and stacks."""
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        place = split_name(name)
        found.setdefault(place[2] if place else name, []).append(rank)
    return {name: fmean(values) for name, values in found.items()}
