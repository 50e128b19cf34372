"""Reading untrusted values: a value of the wrong type counts as missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sora_llm.values import is_integer, is_number

LARGEST = 1e300
"""Of a number in the files: the sums and ranges of a chart have to be finite too."""


def as_number(value: Any) -> float | None:
    """A number that is not too large to draw, else None."""
    return value if is_number(value) and abs(value) <= LARGEST else None


def as_int(value: Any) -> int | None:
    """An integer, else None."""
    return value if is_integer(value) else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> Sequence[Any]:
    """A list or tuple, else an empty one."""
    return value if isinstance(value, list | tuple) else []


def setting(tree: Any, *keys: str) -> Any:
    """tree[key][key]…, None if it does not go that deep."""
    for key in keys:
        tree = as_mapping(tree).get(key)
    return tree


def certified_ranks(certificate: Mapping[str, Any]) -> dict[str, int]:
    """The ranks in a certificate."""
    modules = as_mapping(certificate.get("modules"))
    return ranks_in({name: setting(module, "rank") for name, module in modules.items()})


def ranks_in(value: Any) -> dict[str, int]:
    return {name: rank for name, rank in as_mapping(value).items() if is_step(rank)}


def is_step(value: Any) -> bool:
    """Whether the value is an integer that can be a number of steps or a rank."""
    return is_integer(value) and 0 <= value < 1 << 53
