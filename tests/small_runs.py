"""Runs of six steps on a few short rows of GSM8K, in a second: for tests of stopping and resuming."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import shared
from nursery import Child, Nursery
from runs import CONFIG, QUESTIONS, gsm8k_overrides
from safetensors.torch import load_file

STEPS, DENSE_STEPS, EVALUATED_STEP = 6, 2, 3
DEV_ROWS, EVAL_BATCH = 6, 2
EVAL_CALLS = DEV_ROWS // EVAL_BATCH
"""Batches of an evaluation in one process (it takes as many of half the size in each of two)."""

WORLDS: dict[int, dict[str, Any]] = {1: {}, 2: {"distributed.strategy": "zero2"}}
"""Options of a run by its number of processes."""

PREEMPTED = 75
"""The exit code of a run that was asked to stop."""

END_SECONDS = 45
"""In which processes end after another one, or the launcher, has died."""

CLOCKS = ("tokens_per_second", "step_seconds", "sync_seconds", "peak_memory_gib")
"""What two equal runs log differently."""

MODULES = ("faults", "sora_llm.train", "deepspeed", "peft", "transformers.trainer")
"""What every trainer imports, and the examples."""


def short_rows(folder: Path, count: int = 30) -> dict[str, Any]:
    """A data set of the first short rows of GSM8K."""
    lines = [line for line in shared("data/gsm8k_train.jsonl").read_text().splitlines() if len(line) < 240]
    (folder / "rows.jsonl").write_text("\n".join(lines[:count]))
    return {"path": str(folder / "rows.jsonl"), **QUESTIONS}


def overrides(folder: Path, run_dir: Path, num_processes: int = 1, **others: Any) -> list[str]:
    """configs/llama7b.yaml in float32 on `folder`/rows.jsonl: steps of two rows whatever the number of processes."""
    values = {
        "data.datasets": [{"path": str(folder / "rows.jsonl"), **QUESTIONS}],
        "data.val_set_size": DEV_ROWS,
        "data.sequence_len": 192,
        "data.excess_length": "truncate",
        "data.sample_packing": False,
        "data.cache_dir": str(folder / "cache"),
        "model.dtype": "float32",
        "quantization.load_in_4bit": False,
        "sora.r": 4,
        "sora.gate_lr": 0.5,  # high enough for gates to reach 0 in four steps
        "sora.dense_ratio": 0.34,
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 2 // num_processes,
        "train.gradient_checkpointing": False,
        "evaluation.eval_steps": EVALUATED_STEP,
        "evaluation.per_device_eval_batch_size": EVAL_BATCH // num_processes,
        "output.logging_steps": 1,
        "output.save_total_limit": None,
        "output.report_to": [],
        **others,
    }
    return gsm8k_overrides(run_dir, **values)


@dataclass(frozen=True)
class Playground:
    """A nursery and a folder for run directories; rows and cache are shared.

    Trainers are real processes (nursery.py) to which something happens at a given moment (faults.py).
    """

    folder: Path
    nursery: Nursery

    def start(
        self,
        name: str,
        num_processes: int = 1,
        faults: Sequence[dict[str, Any]] = (),
        audit: bool = False,
        **others: Any,
    ) -> list[Child]:
        """The processes of a run into the directory `name`."""
        call = self.call(name, num_processes, faults, **others) | {"audit": audit}
        return start_trainers(self.nursery, num_processes, call)

    def call(
        self, name: str, num_processes: int = 1, faults: Sequence[dict[str, Any]] = (), **others: Any
    ) -> dict[str, Any]:
        """The arguments of `faults.trainer`."""
        run_dir = self.run_dir(name)
        run_dir.parent.mkdir(exist_ok=True)
        return trainer_call(overrides(self.folder, run_dir, num_processes, **others), run_dir, faults)

    def codes(self, *arguments: Any, **options: Any) -> list[int]:
        """The exit codes of `start`."""
        children = self.start(*arguments, **options)
        codes = [child.wait() for child in children]
        if any(codes):
            print(children[0].output)  # for the report of a test that did not expect it
        return codes

    def reported(self, name: str, place: str, timeout: float = 240) -> None:
        """Wait for the report `place` of a fault."""
        deadline = time.monotonic() + timeout
        while not (self.folder / name / place).exists():
            assert time.monotonic() < deadline, f"{name} was not at {place} after {timeout:g} s"
            time.sleep(0.01)

    def go(self, name: str) -> None:
        """Let faults that wait go on."""
        (self.folder / name / "go").touch()

    def run_dir(self, name: str) -> Path:
        """Of a run; reports of faults lie beside it."""
        return self.folder / name / "run"


def trainer_call(overrides: Sequence[str], run_dir: Path, faults: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The arguments of `faults.trainer` for a run of CONFIG; reports of faults lie beside its directory."""
    folder = str(run_dir.parent)
    return {"arguments": [CONFIG, *overrides], "faults": list(faults), "folder": folder, "run_dir": str(run_dir)}


def start_trainers(nursery: Nursery, num_processes: int, call: dict[str, Any]) -> list[Child]:
    """The processes of a run: of one alone, or of a world."""
    if num_processes == 1:
        return [nursery.start("faults:trainer", call)]
    return nursery.world("faults:trainer", num_processes, call)


def status(run_dir: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run_dir / "status.json").read_text())


def checkpoints(run_dir: Path) -> list[str]:
    """Names of everything in checkpoints/, also of what should not be left there."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or ranks.jsonl."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def timeless(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what a clock or the system measured."""
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def result(run_dir: Path) -> dict[str, Any]:
    """What must be the same in two runs: the adapter's bytes, the lines but for their clocks."""
    return {
        "adapter": (run_dir / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": timeless(lines(run_dir, "metrics.jsonl")),
        "ranks": timeless(lines(run_dir, "ranks.jsonl")),
    }


def interrupt(straight: Path, run_dir: Path, step: int) -> Path:
    """The directory of a run as its death some time after the checkpoint of `step` leaves it."""

    def later(_folder: str, names: list[str]) -> list[str]:
        steps = [name for name in names if name.startswith("step-")]
        return [name for name in steps if int(name.removeprefix("step-")) > step] + ["adapter"]

    shutil.copytree(straight, run_dir, ignore=later)
    left = status(run_dir) | {"state": "running", "checkpoint": f"checkpoints/step-{step}", "adapter": None}
    (run_dir / "status.json").write_text(json.dumps(left))
    return run_dir


def delta_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """B · A of every module of the exported adapter, in float64."""
    factors: dict[str, Any] = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return {
        name: factors[name.replace("lora_A", "lora_B")].double() @ A.double()
        for name, A in factors.items()
        if "lora_A" in name
    }


def delta_error(run_dir: Path, expected: Path) -> float:
    """Relative error of all ΔW of an exported adapter together, against another of the same modules."""
    ours, theirs = delta_weights(run_dir), delta_weights(expected)
    assert ours.keys() == theirs.keys()
    size = torch.stack([delta.norm() for delta in theirs.values()]).norm()
    return float(torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm() / size)
