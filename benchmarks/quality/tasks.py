"""What runs learn: rows of one kind, and the form of the base.  Without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
from gsm8k import BASE, DATA, GSM8K, ROOT, dataset  # noqa: F401  # of all benchmarks; the scripts here take ROOT here

HERE = Path(__file__).resolve().parent

RIVALS = ("uniform", "svd", "svd4", "sora")
"""What the hypotheses of the first task are about, beside LoRA at r = 16."""
AGAIN = ("uniform", "sora")
"""What is asked again on other tasks."""


@dataclass(frozen=True)
class Task:
    """Rows of `file` that have fewer than `max_tokens` tokens of text, shuffled once and for all: the first `num_train`
    are for training, the next ones for tuning, the next for testing.

    `type` and `columns` are those of the config's data sets; `sequence_len` leaves room for what their prompts add.
    """

    name: str
    file: Path
    type: str
    columns: tuple[tuple[str, str], ...]
    max_tokens: int
    sequence_len: int
    num_train: int
    num_tuning: int
    num_test: int
    load_in_4bit: bool = False
    rivals: tuple[str, ...] = AGAIN
    extras: tuple[tuple[float, str], ...] = ()
    """(size, arm) of what is run last, and decides no hypothesis; those of the first task are in protocol.py."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that the whole benchmark was made for: with controls, extras and wall times."""
        return self == GSM8K_ANSWERS

    @property
    def folder(self) -> Path:
        """Where its runs and results are."""
        return HERE if self.is_first else HERE / self.name

    @property
    def runs(self) -> Path:
        """The file of its runs."""
        return self.folder / "runs.jsonl"

    @property
    def needed(self) -> tuple[Path, ...]:
        """What its runs read."""
        return BASE, self.file

    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Every row, with the text in its columns."""
        text = self.file.read_text(encoding="utf-8")
        rows = json.loads(text) if self.file.suffix == ".json" else map(json.loads, text.splitlines())
        for row in rows:
            yield row, "".join(row[theirs] for _, theirs in self.columns)

    def dataset(self, file: Path) -> dict[str, Any]:
        """Rows of `file`, which has the task's columns, as `data.datasets` takes them; the loss is on the answers."""
        return {"path": str(file), "type": self.type, "columns": dict(self.columns)}


_ANSWERS = dataset()
GSM8K_ANSWERS = Task(
    "gsm8k",
    GSM8K,
    _ANSWERS["type"],
    tuple(_ANSWERS["columns"].items()),
    max_tokens=224,
    sequence_len=224,
    num_train=3000,
    num_tuning=300,
    num_test=500,
    rivals=RIVALS,
)
ON_4_BITS = replace(GSM8K_ANSWERS, name="gsm8k_nf4", load_in_4bit=True, rivals=AGAIN)
ROLE_PLAY = Task(
    "roleplay",
    DATA / "data/gpteacher_roleplay.json",
    "alpaca",
    (("instruction", "instruction"), ("input", "input"), ("output", "response")),
    max_tokens=304,
    sequence_len=400,
    num_train=1000,
    num_tuning=200,
    num_test=400,
    extras=((1.0, "balanced"), (1.0, "components"), (0.25, "svd4early"), (0.25, "svd4")),
)
TASKS = {task.name: task for task in (GSM8K_ANSWERS, ON_4_BITS, ROLE_PLAY)}
