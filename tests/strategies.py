"""Runs under each strategy, and what is compared of them: for tests with several processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import shared
from runs import QUESTIONS
from small_runs import timeless
from spawn import run_command, warm_deepspeed
from worlds import delta_weights

from sora_llm.report import read_json_lines

STRATEGIES = ("none", "ddp", "zero2", "zero3", "zero1")
SEVERAL = STRATEGIES[1:]
ZERO = STRATEGIES[2:]
EVALUATIONS = [("fp32", False), ("fp32", True), ("nf4", False), ("nf4", True)]  # precision, gradient checkpointing

DELTA_TOLERANCE = 1e-4
"""Relative error of ΔW: another split of a batch sums in another order, AdamW makes of 1e-7 up to 6e-5."""

TO_THE_END = {"consensus_at": 1.0, "consensus": "slots"}
"""Gates until the end of the run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worlds leave files."""
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def run_config(folder: Path) -> Path:
    """A YAML of a short run of stories260k in NF4 on 48 rows of GSM8K, packed, with dropout, without batch sizes."""
    lines = shared("data/gsm8k_train.jsonl").read_text().splitlines()
    # 6 for the dev set and 42 to train on, packed by two: the last step of an epoch has 5 or 6 of 8 sequences
    (folder / "rows.jsonl").write_text("\n".join([line for line in lines if len(line) < 260][:48]))
    config = {
        "model": {"name_or_path": str(shared("models/stories260k")), "dtype": "float32"},
        "quantization": {"bnb_4bit_compute_dtype": "float32"},
        "sora": {"r": 4, "lora_dropout": 0.05, "sparse_lambda": 0.5, "dense_ratio": 0.34, **TO_THE_END},
        "data": {
            "datasets": [{"path": str(folder / "rows.jsonl"), **QUESTIONS}],
            "val_set_size": 6,
            "sequence_len": 320,
            "excess_length": "truncate",
            "cache_dir": str(folder / "cache"),
        },
        "train": {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 5e-3},
        "evaluation": {"eval_steps": 3},
        "output": {"output_dir": str(folder / "unused"), "logging_steps": 1, "report_to": []},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def delta_error(masters: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a module's ΔW; infinite where only the reference is 0."""
    ours, theirs = delta_weights(masters), delta_weights(reference)
    return max(
        float(difference / theirs[name].norm()) if (difference := (ours[name] - theirs[name]).norm()) else 0.0
        for name in theirs
    )


def whole_error(masters: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The relative error of ΔW over all modules together."""
    ours, theirs = delta_weights(masters), delta_weights(reference)
    squares = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return (squares / sum(float(theirs[name].square().sum()) for name in theirs)) ** 0.5


def zero_pattern(gates: dict[str, torch.Tensor]) -> dict[str, list[bool]]:
    return {name: (gate == 0).tolist() for name, gate in gates.items()}


def assert_same_run(straight: Path, broken: Path) -> None:
    """Equal adapter files, and equal lines of metrics and ranks but for what a clock or the system measured."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (straight / "adapter" / name).read_bytes() == (broken / "adapter" / name).read_bytes()
    for name in ("metrics.jsonl", "ranks.jsonl"):
        one, other = (timeless(read_json_lines(run / name)) for run in (straight, broken))
        assert one == other and one


ACCELERATE = ["accelerate.commands.launch"]
SHORT_RUN = ("train.max_steps=3", "evaluation.eval_steps=null", "data.val_set_size=null")


def train_under(launcher: list[str], config: Path, run: Path, *overrides: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of the command under a launcher, a module and its options; under none if it is empty."""
    warm_deepspeed()
    module = ["-m", *launcher] if launcher else []
    command = [sys.executable, *module, "-m", "sora_llm.train", str(config), f"output.output_dir={run}", *overrides]
    return run_command(command, **variables)
