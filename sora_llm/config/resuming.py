"""The settings that a resumed run may change: where and how it runs and is logged, never what it computes."""

from __future__ import annotations

import math
from typing import Any

from sora_llm.config.origin import show
from sora_llm.config.schema import Config, Dataset
from sora_llm.config.writing import differing_keys, flattened, plain, to_dict

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


def resume_conflicts(
    old: dict[str, Any], new: dict[str, Any], num_processes_old: int, num_processes_new: int
) -> list[str]:
    """Why a checkpoint made under the config `old` cannot be resumed under `new`: the keys that differ but must not,
    with both values, and a sentence if the rows per optimizer step changed.  Empty if it can.  Both are mappings from
    `to_dict`; `old` may come from an earlier version, and keys that it lacks take their defaults."""
    old = _with_defaults(old)
    values_old, values_new = flattened(old), flattened(new)
    conflicts = [
        f"{key} ({_shown(key, values_old)} there, {_shown(key, values_new)} here)"
        for key in differing_keys(old, new)
        if key not in BATCH_KEYS and (key.startswith(FIXED_ON_RESUME) or not key.startswith(FREE_ON_RESUME))
    ]
    rows_old, product_old = _rows_per_step(old, num_processes_old)
    rows_new, product_new = _rows_per_step(new, num_processes_new)
    if rows_old != rows_new:
        conflicts.append(
            f"one optimizer step took {product_old} = {rows_old} rows and would now take {product_new} = {rows_new}; "
            "keep batch size × accumulation steps × processes the same"
        )
    return conflicts


def _shown(key: str, values: dict[str, Any]) -> str:
    return show(values[key]) if key in values else "nothing"


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
