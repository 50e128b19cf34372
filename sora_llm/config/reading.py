"""Reads a `Config` from a file and overrides, or from plain mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_llm.config.conversion import elsewhere, refuse_unknown, section_of
from sora_llm.config.names import ALIASES, NO_EQUIVALENT
from sora_llm.config.origin import Origin, names_of, show
from sora_llm.config.rules import check_combinations, check_required
from sora_llm.config.schema import Config
from sora_llm.config.yaml_text import read_yaml
from sora_llm.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file `path`, apply `section.key=value` overrides in order, and check everything that can be checked
    without looking at any other file.

    Raises:
        UserError: the first problem found.
    """
    return _of_tree(read_mapping(Path(path)), str(path), overrides)


def from_dict(content: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The config that a file with this content would give, made by `to_dict` or otherwise; `origin` is the source that
    messages name.

    Raises:
        UserError: as in `load_config`.
    """
    return _of_tree(_as_read(content), origin, overrides)


def _as_read(value: Any) -> Any:
    """Python values as YAML would give them: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {name: _as_read(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_read(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _of_tree(content: dict[str, Any], file: str, overrides: Sequence[str]) -> Config:
    tree = _rename(content, file)
    overridden = []
    for text in overrides:
        key, value = _read_override(text)
        tree = _with_value(tree, key.split("."), value, text)
        overridden.append(key)
    origin = Origin(file, tree, tuple(overridden))
    refuse_unknown(tree, origin)
    config = section_of(Config, tree, "", origin)
    check_required(config, origin)
    check_combinations(config, origin)
    return config


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file as it is, {} if there is nothing in it; UserError if it cannot be read, or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The config file {path} does not exist; give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The config file {path} is not UTF-8 text ({error.reason}); give a YAML file.") from error
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read ({error.strerror}); give a YAML file.") from error
    tree = read_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {show(tree)}; a config is a mapping of the sections {names_of(Config)}.")
    return tree


def _read_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        name = key.lstrip("-")
        known = elsewhere(name)
        example = f"{known}={value or '…'}" if known else "train.max_steps=100"
        instead = NO_EQUIVALENT.get(name, f"write for example {example}")
        raise UserError(f"The override {text!r} is not of the form section.key=value; {instead}")
    section, name, *rest = key.split(".")
    renamed = ALIASES.get(f"{section}.{name}", f"{section}.{name}")
    return ".".join([renamed, *rest]), read_yaml(value, f"The override {text!r}")


def _with_value(tree: Any, path: list[str], value: Any, override: str) -> Any:
    """A copy of `tree` with `value` at `path`; missing mappings and lists on the way are created."""
    if not path:
        return value
    head, *rest = path
    if tree is None:
        tree = [] if head.isdecimal() else {}
    if isinstance(tree, dict):
        return tree | {head: _with_value(tree.get(head), rest, value, override)}
    if not isinstance(tree, list):
        raise UserError(f"The override {override!r} sets {head} inside {show(tree)}; name a key that exists.")
    if not head.isdecimal() or int(head) > len(tree):
        raise UserError(f"The override {override!r} needs an index from 0 to {len(tree)} in place of {head}.")
    index = int(head)
    old = tree[index] if index < len(tree) else None
    return [*tree[:index], _with_value(old, rest, value, override), *tree[index + 1 :]]


def _rename(tree: dict[str, Any], file: str) -> dict[str, Any]:
    """The file's mapping with our keys in place of their aliases."""
    renamed = {}
    for section, body in tree.items():
        if not isinstance(body, dict):
            renamed[section] = body
            continue
        stated: dict[str, str] = {}  # our key → the name that the file used
        renamed[section] = {}
        for name, value in body.items():
            written = f"{section}.{name}"
            key = ALIASES.get(written, written)
            if key in stated:
                raise UserError(f"{stated[key]} and {written} mean the same in {file}; keep one of them.")
            stated[key] = written
            renamed[section][key.partition(".")[2] if written in ALIASES else name] = value
    return renamed
