"""Benchmarks and examples use names that exist: what is measured seldom would otherwise break unseen."""

from __future__ import annotations

import ast
import importlib
import socket
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sora_llm.files import staging_folder

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def found_in(module: ModuleType, name: str) -> Any:
    """What `from module import name` gives."""
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{module.__name__}.{name}")


def uses(script: Path) -> Iterator[tuple[ModuleType, str]]:
    """(module of sora_llm, name) for every name that a script imports, or takes from a module that it imported."""
    tree, modules = ast.parse(script.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sora_llm":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                yield module, alias.name
                if isinstance(value := found_in(module, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_a_script_takes_from_the_package_is_there(script: Path) -> None:
    for module, name in uses(script):
        found_in(module, name)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("chaos_trainer")


def test_a_file_operation_has_the_same_name_in_every_start(trainer: ModuleType, tmp_path: Path) -> None:
    """Or the crash that is to happen in it never happens, and the campaign never ends."""
    folders = [staging_folder(tmp_path / "adapter") / "README.md" for _ in range(2)]
    assert folders[0] != folders[1]
    names = {trainer.without_numbers(str(folder.relative_to(tmp_path))) for folder in folders}
    assert names == {trainer.without_numbers(f".adapter.{socket.gethostname()}-1-2.tmp/README.md")}
    assert trainer.without_numbers("checkpoints/.step-12.tmp") == "checkpoints/.step-N.tmp"


def test_the_places_where_runs_are_hurt_are_there(trainer: ModuleType) -> None:
    for where in (*trainer.PLACES.values(), trainer.RESUME):
        module, _, name = where.partition(":")
        assert callable(reduce(getattr, name.split("."), importlib.import_module(module))), where
