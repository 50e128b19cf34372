"""The whole pipeline in small: tune, freeze, confirm; then whether the arms come out in the committed order.

    python benchmarks/quality/smoke.py [--workers 2] [--out FILE] [--commit]

LoRA at r = 16; LoRA, LoRA cut to singular components, and SoRA of a quarter of its parameters; twenty steps of four
rows: a check of the pipeline, not a measurement.  With --out it goes on from the runs that are there.  --commit writes
smoke.json, what later runs are compared with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grid import overview
from protocol import Group, Protocol, Queue, read_lines
from tasks import HERE
from workers import missing_data, run_cell, too_few_workers, work_off

SMALL = Protocol(
    steps=20,
    rows_per_step=4,
    num_train=400,
    num_tuning=32,
    num_test=64,
    rates=(8e-3, 1.6e-2),
    tuning_seeds=(101,),
    seeds=(1, 2),
)
GROUPS = [Group(1.0, "lora"), *(Group(0.25, arm) for arm in ("uniform", "svd4", "sora"))]
COMMITTED = HERE / "smoke.json"
CLEAR = 0.04
"""Arms whose committed losses are nearer than this may change places: other kernels round otherwise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", action="store_true")
    arguments = parser.parse_args()
    if wrong := too_few_workers(arguments.workers) or missing_data():
        print(f"smoke.py: {wrong}", file=sys.stderr)
        return 2
    queue = Queue(SMALL, [GROUPS])
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "runs.jsonl"
        lines = read_lines(out)
        if wrong := work_off(queue, lines, out, run_cell, num_workers=arguments.workers):
            print(f"smoke.py: {wrong}", file=sys.stderr)
            return 1
        print(overview(queue, lines))
        found = mean_losses(queue, lines)
    if arguments.commit:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    committed = json.loads(COMMITTED.read_text())
    for name, loss in found.items():
        print(f"{name:<14} test loss {loss:.4f}, committed {committed[name]:.4f}")
    if surprises := out_of_order(found, committed):
        print("smoke.py: " + "; ".join(surprises), file=sys.stderr)
        return 1
    print("the arms come out in the committed order")
    return 0


def mean_losses(queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{arm and size: mean test loss}; a failed run counts as infinite."""
    found = {}
    for group in GROUPS:
        cells = queue.test_cells(group, lines)
        losses = [lines[cell.key].get("loss", float("inf")) for cell in cells]
        found[str(group)] = statistics.mean(losses) if losses else float("inf")
    return found


def out_of_order(found: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """A sentence for every pair that is clearly apart in `committed` and not in that order here."""
    return [
        f"{better} ({found[better]:.4f}) is not better than {worse} ({found[worse]:.4f})"
        for better in committed
        for worse in committed
        if committed[better] + CLEAR < committed[worse] and not found[better] < found[worse]
    ]


if __name__ == "__main__":
    sys.exit(main())
