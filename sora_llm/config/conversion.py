"""Converts a mapping as read into the schema's dataclasses: types, ranges, unknown keys."""

from __future__ import annotations

import difflib
import operator
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sora_llm.config.names import ALIASES, NO_EQUIVALENT, SPELLINGS, value_elsewhere
from sora_llm.config.origin import Origin, names_of, show
from sora_llm.config.schema import Config, Dataset
from sora_llm.errors import UserError

T = TypeVar("T")


LARGEST_NUMBER = 1e30
"""Numbers are multiplied by others before they are rounded to float32, which ends at 3.4e38."""


class _MismatchError(Exception):
    """A value does not match its type hint."""


def section_of(cls: type[T], tree: Any, key: str, origin: Origin) -> T:
    """The dataclass `cls` from the mapping at `key` ("" is the root)."""
    if not isinstance(tree, dict):
        raise UserError(f"{key} is {show(tree)} {origin.of(key)}; it must be a mapping with the keys {names_of(cls)}.")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in tree.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise UserError(_unknown(inner, str(name), cls, origin))
        if value is None and NoneType not in get_args(hints[name]):
            continue  # null unsets a key: the default applies
        try:
            values[name] = _convert(value, hints[name], inner, origin)
            if value == "" and NoneType in get_args(hints[name]):
                raise _MismatchError
        except _MismatchError:
            allowed = describe(hints[name])
            if value == "":
                allowed = allowed.replace("text", "text with something in it")
                raise UserError(f"{inner} is an empty text {origin.of(inner)}; it must be {allowed}.") from None
            quotes = "" if isinstance(value, str | list | dict) or "text" not in allowed else " (put it in quotes)"
            meant = value_elsewhere(inner, value)
            instead = f" ({meant})" if meant else ""
            raise UserError(
                f"{inner} is {show(value)} {origin.of(inner)}; it must be {allowed}{quotes}{instead}."
            ) from None
    return cls(**values)


def refuse_unknown(tree: dict[str, Any], origin: Origin) -> None:
    """UserError that names every unknown key in the sections and data sets: a config for another trainer has many."""
    sections = get_type_hints(Config)
    unknown: list[tuple[str, str, type]] = [(str(name), str(name), Config) for name in tree if name not in sections]
    for section, cls in sections.items():
        if isinstance(body := tree.get(section), dict):
            known = get_type_hints(cls)
            unknown += [(f"{section}.{name}", str(name), cls) for name in body if name not in known]
    if isinstance(data := tree.get("data"), dict):
        known = get_type_hints(Dataset)
        for key in ("datasets", "val_datasets"):
            entries = data.get(key)
            for i, entry in enumerate(entries if isinstance(entries, list) else []):
                names = [name for name in entry if name not in known] if isinstance(entry, dict) else []
                unknown += [(f"data.{key}.{i}.{name}", str(name), Dataset) for name in names]
    if len(unknown) == 1:
        raise UserError(_unknown(*unknown[0], origin))
    if unknown:
        lines = (f"\n  {key} {origin.of(key)}: {_instead(key, name, cls)}" for key, name, cls in unknown)
        raise UserError(f"the config has {len(unknown)} unknown keys:{''.join(lines)}")


def _convert(value: Any, hint: Any, key: str, origin: Origin) -> Any:
    """`value` as the type hint says, or `_MismatchError`.  Integers pass for floats; true and false are not numbers."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        number = _convert(value, args[0], key, origin)
        if not all(_within(number, bound) for bound in args[1:]):
            raise _MismatchError
        return number
    if kind in (Union, UnionType):
        return _convert_to_first(value, args, key, origin)
    if kind is Literal:
        choice = SPELLINGS.get(value, value) if isinstance(value, str) else value
        if choice in args:
            return choice
    elif is_dataclass(kind):
        return section_of(kind, value, key, origin)  # type: ignore[arg-type]
    elif kind is tuple and isinstance(value, list):
        return tuple(_convert(item, args[0], f"{key}.{index}", origin) for index, item in enumerate(value))
    elif kind is dict and isinstance(value, dict):
        return {_convert(name, str, key, origin): _convert(item, args[1], key, origin) for name, item in value.items()}
    elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        if abs(value) > LARGEST_NUMBER:
            raise UserError(
                f"{key} is {show(value)} {origin.of(key)}; it must be at most {LARGEST_NUMBER:g}, as products with "
                "more overflow float32."
            )
        return float(value)
    elif type(value) is kind and kind in (str, int, bool, NoneType):
        return value
    raise _MismatchError


def _convert_to_first(value: Any, hints: Sequence[Any], key: str, origin: Origin) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint, key, origin)
        except _MismatchError:
            continue
    raise _MismatchError


def _within(number: float, bound: str) -> bool:
    """Whether `number` satisfies a bound like ">= 1"."""
    compare, limit = bound.split()
    return {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[compare](number, float(limit))


def describe(hint: Any) -> str:
    """The values that a type hint allows, in words."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return f"{describe(args[0])} {' and '.join(args[1:])}"
    if kind is Literal:
        return args[0] if len(args) == 1 else f"one of {', '.join(args)}"
    if kind in (Union, UnionType):
        return " or ".join(describe(arg) for arg in args)
    if kind is tuple:
        return f"a list ([] for none), each entry {describe(args[0])}"
    if kind is dict:
        return f"a mapping of names to {describe(args[1])}"
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    return words.get(kind, "a mapping")


def _unknown(key: str, name: str, cls: type, origin: Origin) -> str:
    """The message for a key that `cls` does not have."""
    return f"{key} {origin.of(key)} is not a key of the config; {_instead(key, name, cls)}"


def _instead(key: str, name: str, cls: type) -> str:
    """What to write instead of a key that `cls` does not have: the nearest valid one, or what to do without it."""
    if name in NO_EQUIVALENT:
        return f"{NO_EQUIVALENT[name]}."
    parent = key.rpartition(".")[0]
    own = {field_.name: f"{parent}.{field_.name}".lstrip(".") for field_ in fields(cls)}
    own |= {alias.partition(".")[2]: to for alias, to in ALIASES.items() if alias.partition(".")[0] == parent}
    close = [own[other] for other in difflib.get_close_matches(name, own, n=1)]
    with_it = {to for other, to in own.items() if name in other.split("_")}
    known = elsewhere(name) or next(iter(close or (with_it if len(with_it) == 1 else ())), None)
    return f"did you mean {known}?" if known else f"allowed there: {names_of(cls)}."


def elsewhere(name: str) -> str | None:
    """The dotted key with exactly this last name or alias, in any section."""
    for section, cls in get_type_hints(Config).items():
        if name in get_type_hints(cls):
            return f"{section}.{name}"
    return next((key for alias, key in ALIASES.items() if alias.partition(".")[2] == name), None)
