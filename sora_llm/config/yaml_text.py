"""A stricter YAML loader and dumper; the only module that uses PyYAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sora_llm.errors import UserError


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter: no tags (`!!python/object/apply:os.system`), no key stated twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            problem = f"the tag {tag} is refused because tags can run code; a config holds plain values only"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in (earlier.value for earlier in keys[:index]):
                problem = f"the key {key.value} is stated twice; keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader, or another YAML reader, would take for another type."""


# YAML 1.1 takes 1e-4 (no dot) for text; people mean the number.
for _class in (Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), "-+0123456789")


def read_yaml(text: str, where: str) -> Any:
    """The plain values in a YAML text."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where} cannot be read as YAML{line}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}.") from error


def write_yaml(values: dict[str, Any]) -> str:
    """YAML of mappings, lists and scalars, in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
