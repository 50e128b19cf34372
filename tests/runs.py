"""Whole runs as a user starts them: the command in a process of its own, and its run directory afterwards."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import shared
from spawn import run_apart

CONFIG = "configs/llama7b.yaml"
TINY = {"train.max_steps": 4, "output.save_steps": 2, "output.report_to": [], "sora.r": 4, "data.val_set_size": None}
"""Overrides of a run of four steps with checkpoints at 2 and 4."""
QUESTIONS = {"type": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"}}
"""How rows of GSM8K are read."""
PRUNED = {
    "sora.r": 8,
    "sora.target_rank": 2,
    "sora.sparse_lambda": None,
    "sora.consensus_at": 0.4,
    "sora.consensus": "svd",
    "output.logging_steps": 5,
    "output.report_to": [],
}
"""Overrides of a run that is cut to a quarter and finetuned."""
PLAIN = (sys.executable, "-m", "sora_llm.train")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def gsm8k_overrides(output_dir: Path, **others: Any) -> list[str]:
    """configs/llama7b.yaml on stories260k and GSM8K: what a user overrides for a first try on a CPU."""
    dataset = {"path": str(shared("data/gsm8k_train.jsonl")), **QUESTIONS}
    values = {
        "model.name_or_path": str(shared("models/stories260k")),
        "data.datasets": [dataset],
        "data.val_set_size": 48,
        "data.sequence_len": 320,
        "train.num_train_epochs": None,
        "train.max_steps": 30,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
        "train.learning_rate": 5e-3,
        "sora.target_rank": None,
        "sora.sparse_lambda": 0.6,  # gates to the end; tests of budgets and of the cut say so
        "sora.consensus_at": 1.0,
        "sora.consensus": "slots",
        "output.output_dir": str(output_dir),
        **others,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class Finished:
    """A process that ended, and the run directory it was to write."""

    returncode: int
    stdout: str
    stderr: str
    directory: Path

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl or ranks.jsonl."""
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    def json(self, name: str) -> dict[str, Any]:
        """One of the directory's JSON files."""
        return json.loads((self.directory / name).read_text())


def assert_same_end(found: Finished, expected: Finished) -> None:
    """The same ranks, and the same loss as far as kernels for other devices and layouts round."""
    own, other = (run.lines("metrics.jsonl")[-1] for run in (found, expected))
    assert own["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)
    assert found.lines("ranks.jsonl")[-1]["ranks"] == expected.lines("ranks.jsonl")[-1]["ranks"]


def start(
    launcher: tuple[str, ...], arguments: list[str], directory: Path, timeout: float = 300, **environ: str
) -> Finished:
    """Run `launcher arguments…` from the project's root and wait for it; all it started is ended with it."""
    # no accelerate config of the user's may decide how tests are launched
    variables = {"HF_HOME": str(directory.parent / "hf"), **environ}
    return Finished(*run_apart([*launcher, *arguments], timeout=timeout, **variables), directory)
