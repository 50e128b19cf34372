"""Writes a `Config` as plain values and YAML, and finds the keys in which two differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from sora_llm.config.schema import Config
from sora_llm.config.yaml_text import write_yaml


def to_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain mappings, lists and scalars, in the order of the schema."""
    return plain(config)


def to_yaml(config: Config) -> str:
    """The whole config as YAML; `load_config` reads it back as the same config."""
    return write_yaml(to_dict(config))


def recipe(config: Config) -> str:
    """The settings that decide what is learned, except for the base and the data sets themselves, as YAML."""
    whole = to_dict(config)
    elsewhere = {
        "model": ("name_or_path", "revision", "trust_remote_code"),
        "data": ("datasets", "val_datasets", "cache_dir", "num_proc", "max_bad_row_fraction"),
        "distributed": ("check_every", "timeout_minutes"),
        "evaluation": ("per_device_eval_batch_size", "sample_prompts"),
    }
    sections = ("model", "quantization", "sora", "data", "train", "distributed", "evaluation")
    return write_yaml(
        {
            section: {name: value for name, value in whole[section].items() if name not in elsewhere.get(section, ())}
            for section in sections
        }
    )


def plain(value: Any) -> Any:
    """A value with dataclasses as mappings and tuples as lists, recursively."""
    if is_dataclass(value):
        return {field_.name: plain(getattr(value, field_.name)) for field_ in fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The dotted keys whose values differ between two configs given as plain mappings, list entries by index."""
    flat_a, flat_b = flattened(a), flattened(b)
    missing = object()
    return [key for key in flat_a | flat_b if flat_a.get(key, missing) != flat_b.get(key, missing)]


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} for a config given as plain mappings, list entries by index."""
    return dict(_flatten(config))


def _flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for every scalar and every empty list or mapping."""
    inner = dict(enumerate(tree)) if isinstance(tree, list) else tree
    if not isinstance(inner, dict) or not inner:
        yield key, tree
        return
    for name, value in inner.items():
        yield from _flatten(value, f"{key}.{name}" if key else str(name))
