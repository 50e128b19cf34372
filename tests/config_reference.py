"""configs/README.md, every key of the config, from the schema and the comments in it.

`python tests/config_reference.py` writes it anew; `tests/test_config.py` says when that is due.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from sora_llm import config
from sora_llm.config.conversion import describe
from sora_llm.row_types import FIELDS

PAGE = Path(__file__).parents[1] / "configs" / "README.md"

HEAD = """# Every key of the config

The YAML files here are whole runs, with the command on top; this page is the schema, `sora_llm/config/schema.py`, as
tables. A key that is not here stops with the nearest one that is, and one of another trainer with what to set instead;
some of their names are [taken as ours](#names-of-other-trainers). All keys can be given on the command line, as
`section.key=value`, the value read as YAML; lists by index: `data.datasets.0.path=…`. `--print-config` shows a config
with every default.
"""


def comments_of(cls: type) -> dict[str, str]:
    """{field: what the comments at it, and on the lines below it, say}."""
    source = inspect.getsource(cls)
    at = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    found = [node for node in body if isinstance(node, ast.AnnAssign)]
    ends = [node.lineno for node in found[1:]] + [len(source.splitlines()) + 1]
    return {
        node.target.id: " ".join(at[line] for line in range(node.lineno, end) if line in at)  # type: ignore[union-attr]
        for node, end in zip(found, ends, strict=True)
    }


def shown(value: Any) -> str:
    """A default as YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def table(cls: type) -> str:
    hints, comments = get_type_hints(cls, include_extras=True), comments_of(cls)
    rows = ["| key | default | allowed | |", "|---|---|---|---|"]
    for each in fields(cls):  # type: ignore[arg-type]
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        comment = comments[each.name].removeprefix("required: ").removeprefix("required")
        is_required = comments[each.name].startswith("required")
        value = "required" if is_required else f"`{shown(default)}`"
        allowed = describe(hints[each.name])
        row = (f"`{each.name}`", value, allowed, comment)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(rows)


def page() -> str:
    """The whole of it."""
    parts = [HEAD]
    for section in fields(config.Config):
        cls = getattr(config, section.type)  # type: ignore[arg-type]
        parts.append(f"## {section.name}\n\n{cls.__doc__}\n\n{table(cls)}\n")
        if cls is config.Data:
            parts.append(f"### Of each of data.datasets and val_datasets\n\n{table(config.Dataset)}\n")
            rows = [f"| `{kind}` | {', '.join(f'`{name}`' for name in names)} |" for kind, names in FIELDS.items()]
            parts.append("\n".join(["| type | fields that `columns` maps |", "|---|---|", *rows, ""]))
    parts.append("## Names of other trainers\n\nTaken as ours, in the same section:\n")
    names = [f"| {', '.join(f'`{name}`' for name in old)} | `{key}` |" for key, old in config.NAMES_ELSEWHERE.items()]
    parts.append("\n".join(["| written | taken as |", "|---|---|", *names, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
