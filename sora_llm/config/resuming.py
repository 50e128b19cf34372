"""The settings that a resumed run may change: where and how it runs and is logged, never what it computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sora_llm.config.origin import show
from sora_llm.config.schema import Config, Dataset
from sora_llm.config.writing import plain, to_dict

CHANGES_NO_ROW = ("sample_packing", "max_bad_row_fraction", "num_proc", "cache_dir")
"""Keys of data that change neither the rows nor which are held out (a data set's weight does not either)."""
FREE_ON_RESUME = (
    "output.",
    "evaluation.",
    "distributed.",
    "data.num_proc",
    "data.cache_dir",
    "quantization.bnb_4bit_quant_storage",
    "train.torch_compile",
)
FIXED_ON_RESUME = (
    "evaluation.early_stopping_patience",
    "distributed.sync_every",
    "distributed.replica",
    "distributed.outer_",
)
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
MOST_NAMED = 8
"""Conflicts that are written out."""


def resume_conflicts(
    old: dict[str, Any], new: dict[str, Any], num_processes_old: int, num_processes_new: int
) -> list[str]:
    """Why a checkpoint made under the config `old` cannot be resumed under `new`: the keys that differ but must not,
    with both values, and a sentence if the rows per optimizer step changed.  Empty if it can.  Both are mappings from
    `to_dict`; `old` may come from an earlier version, and keys that it lacks take their defaults."""
    old = _with_defaults(old)
    conflicts = [
        f"{key} ({there} there, {here} here)"
        for key, there, here in _differences(old, new)
        if key not in BATCH_KEYS and (key.startswith(FIXED_ON_RESUME) or not key.startswith(FREE_ON_RESUME))
    ]
    if (unnamed := len(conflicts) - MOST_NAMED) > 1:
        conflicts[MOST_NAMED:] = [f"{unnamed} other keys"]
    rows_old, product_old = _rows_per_step(old, num_processes_old)
    rows_new, product_new = _rows_per_step(new, num_processes_new)
    if rows_old != rows_new:
        conflicts.append(
            f"one optimizer step took {product_old} = {rows_old} rows and would now take {product_new} = {rows_new}; "
            "keep batch size × accumulation steps × processes the same"
        )
    return conflicts


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, old value, new value) as messages show them: entries of a mapping one by one, likewise those that lists of
    mappings both have, other lists whole."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            inner = f"{key}.{name}" if key else str(name)
            if name not in old:
                yield inner, "nothing", show(new[name])
            elif name not in new:
                yield inner, show(old[name]), "nothing"
            else:
                yield from _differences(old[name], new[name], inner)
    elif _is_list_of_mappings(old) and _is_list_of_mappings(new):
        if len(old) != len(new):
            yield key, f"a list of {len(old)}", f"of {len(new)}"
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            yield from _differences(before, after, f"{key}.{index}")
    else:
        yield key, show(old), show(new)


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A config as `to_dict` gives it, with the default of every key that it lacks, also in its lists of data sets."""
    dataset = plain(Dataset())
    filled = {section: values | old.get(section, {}) for section, values in to_dict(Config()).items()}
    for name in ("datasets", "val_datasets"):
        if filled["data"][name] is not None:
            filled["data"][name] = [dataset | entry for entry in filled["data"][name]]
    return filled


def _rows_per_step(config: dict[str, Any], num_processes: int) -> tuple[int, str]:
    factors = [config["train"][key.partition(".")[2]] for key in BATCH_KEYS] + [num_processes]
    return math.prod(factors), " × ".join(str(factor) for factor in factors)
