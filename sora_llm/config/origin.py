"""Where each key of a config was stated, and how messages show it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sora_llm.config.schema import Config
from sora_llm.config.writing import plain


@dataclass(frozen=True)
class Origin:
    """Where each key of a config was stated, for messages."""

    file: str
    tree: dict[str, Any]  # as read, overrides included
    overridden: tuple[str, ...]  # the keys that the command line set

    def of(self, key: str) -> str:
        """Where a key was stated, e.g. "in configs/llama7b.yaml"."""
        for stated in self.overridden:
            if f"{key}.".startswith(f"{stated}.") or stated.startswith(f"{key}."):
                return "on the command line"
        section, *rest = key.split(".")
        body = self.tree.get(section)
        by_default = rest and isinstance(body, dict) and rest[0] not in map(str, body)
        return "by default" if by_default else f"in {self.file}"

    def state(self, config: Config, key: str) -> str:
        """A key with its value and origin, e.g. "sora.r (64, in configs/llama7b.yaml)"."""
        return f"{key} ({show(plain(value_of(config, key)))}, {self.of(key)})"


def value_of(config: Config, key: str) -> Any:
    """The value at "section.name"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def show(value: Any) -> str:
    """A value as shown in messages: as in YAML, truncated to one line."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def names_of(cls: type) -> str:
    """The keys of a section, for messages."""
    return ", ".join(field_.name for field_ in fields(cls))
