"""A run that was interrupted, and the command that goes on from its checkpoints: for tests of what lies in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CONFIG, Playground, overrides, status

from sora_llm.train import main

FILES = ("COMPLETE", "state.json", "adapter.safetensors")
TENSORS = {"a.lora_A": torch.arange(6.0).view(2, 3), "a.gate": torch.tensor([1.0, 0.0])}
STATE = {"phase": "dense", "tally": {"loss_sum": 0.5}}


@pytest.fixture
def interrupted(undisturbed: dict[int, Path], tmp_path: Path) -> Path:
    """A run directory of a run that was interrupted after step 4, with checkpoints of steps 2, 3 and 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir, ignore=shutil.ignore_patterns("adapter", "step-1", "step-5", "step-6"))
    left = status(run_dir) | {"state": "running", "step": 4, "checkpoint": "checkpoints/step-4", "adapter": None}
    (run_dir / "status.json").write_text(json.dumps(left))
    return run_dir


@pytest.fixture
def start(ground: Playground, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command on a run directory, in this process: exit code and everything it printed."""

    def command(run_dir: Path, **others: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main([CONFIG, *overrides(ground.folder, run_dir, **others)])
        return code, "".join(capsys.readouterr())

    return command
