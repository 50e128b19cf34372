"""Are the runs of this benchmark those of the product?  The same cell here and by `python -m sora_llm.train`.

    python benchmarks/quality/same_as_train.py [--steps 20] [--arm sora] [--size 0.25]

Compares the mean rank and the train loss of every logged step, the tuning loss at the end and the ranks of all modules:
bit for bit, on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from protocol import CONFIG, TUNING, Cell, Group, Protocol
from runner import NUM_POINTS, Runner, split
from tasks import BASE, ROOT

SMALL: dict[str, Any] = {"rows_per_step": 4, "num_train": 400, "num_tuning": 24, "num_test": 8}


def by_command(cell: Cell, folder: Path) -> dict[str, Any]:
    """What a run directory says of the cell."""
    run_dir = folder / "by_command"
    every = cell.protocol.steps // NUM_POINTS
    values = {**cell.overrides(folder, BASE), "output.output_dir": str(run_dir), "output.logging_steps": every}
    command = [sys.executable, "-m", "sora_llm.train", CONFIG]
    command += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python -m sora_llm.train failed: {(done.stdout + done.stderr)[-2000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    ranks = json.loads((run_dir / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    return {
        "base_loss": lines[0]["eval_loss"],
        "train_losses": [line["loss"] for line in steps],
        "mean_ranks": [line["mean_rank"] for line in steps],
        "loss": lines[-1]["eval_loss"],
        "kept_params": lines[-1]["kept_params"],
        "ranks": list(ranks.values()),
    }


def in_process(cell: Cell, folder: Path) -> dict[str, Any]:
    """The same of the benchmark's own run."""
    line = Runner(cell.protocol, folder, "cpu").run(cell)
    if "failed" in line:
        raise SystemExit(f"the run failed: {line['failed']}")
    return {
        "base_loss": line["base_loss"],
        "train_losses": [point["loss"] for point in line["curve"]],
        "mean_ranks": [point["mean_rank"] for point in line["curve"]],
        "loss": line["loss"],
        "kept_params": line["kept_params"],
        "ranks": line["ranks"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help=f"a multiple of {NUM_POINTS}")
    parser.add_argument("--arm", default="sora", choices=("sora", "decoupled", "slots", "late", "end"))
    parser.add_argument("--size", type=float, default=0.25)
    arguments = parser.parse_args()
    if arguments.steps < NUM_POINTS or arguments.steps % NUM_POINTS:
        parser.error(f"--steps is {arguments.steps}; give a multiple of {NUM_POINTS}")
    protocol = Protocol(steps=arguments.steps, **SMALL)
    cell = Cell(Group(arguments.size, arguments.arm), 8e-3, 1, TUNING, protocol)
    with tempfile.TemporaryDirectory() as folder:
        split(protocol, Path(folder))
        ours, theirs = in_process(cell, Path(folder)), by_command(cell, Path(folder))
    differing = [key for key in theirs if ours[key] != theirs[key]]
    for key in differing:
        print(f"{key} differs\n  here:                       {ours[key]}\n  python -m sora_llm.train:   {theirs[key]}")
    if not differing:
        print(
            f"{cell.group}, {arguments.steps} steps: tuning loss {ours['loss']:.6f}, {ours['kept_params']:,} "
            f"parameters, losses and mean ranks of {NUM_POINTS} points: as python -m sora_llm.train, bit for bit"
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
