"""Rows to evaluate on, what `sora-llm evaluate` finds, and runs that have ended: for tests of that command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_dirs import run_dir

from sora_llm import cli

ROWS = [("Tim had a", " red ball."), ("She was so", " happy and ran home."), ("Once", " upon a time")]
COLUMNS = {"prompt": "q", "completion": "a"}
FORM = ["--type", "prompt_completion", "--column", "prompt=q", "--column", "completion=a"]
NUMBERS = [f"{first} and {second}" for first in ("one", "two", "three", "four") for second in ("five", "six", "seven")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions under other names."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": prompt, "a": completion}) + "\n" for prompt, completion in ROWS))
    return file


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON that `sora-llm evaluate` prints."""
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def numbers_run(folder: Path, lora: Path, name: str = "run", **options: Any) -> Path:
    """A run of twelve rows of which it held four out, that has ended."""
    rows = folder / "numbers.jsonl"
    rows.write_text("".join(json.dumps({"q": f"Count to {text}", "a": text * 2}) + "\n" for text in NUMBERS))
    dataset = {"path": str(rows), "type": "prompt_completion", "columns": COLUMNS}
    run = run_dir(folder / name, **{"data.datasets": [dataset], "data.val_set_size": 4, **options})
    shutil.copytree(lora, run / "adapter")
    (run / "status.json").write_text("{}")
    return run
