"""Does the rate of the gates matter: SoRA with `gate_lr: auto` against 1e-2, which auto was until 2026-11-30.

    python benchmarks/quality/gate_rate.py [--seeds 21 22 …] [--out FILE]

At 25 and 70 %, at the learning rate that grid.py froze for SoRA at both, on test rows and seeds of its own, one thread.
Every run is a line of --out (default gate_rate.jsonl); one that is there is not made again, and processes with other
--seeds may run at the same time.  Prints the tables of README.md once all seeds are there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grid import HERE, append, missing_data, unusable
from protocol import TEST, Cell, Group, Protocol, read_lines
from statistics_of_pairs import bootstrap_interval, sign_flip_p

SIZES, LEARNING_RATE, SEEDS = (0.25, 0.70), 1.13e-2, tuple(range(21, 29))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=HERE / "gate_rate.jsonl")
    arguments = parser.parse_args()
    if wrong := unusable(arguments.out) or missing_data():
        print(f"gate_rate.py: {wrong}", file=sys.stderr)
        return 2
    missing = [cell for cell in cells(arguments.seeds) if cell.key not in read_lines(arguments.out)]
    if missing:
        with tempfile.TemporaryDirectory() as name:
            from runner import Runner, split

            split(Protocol(), Path(name))
            runner = Runner(Protocol(), Path(name), "cpu")
            for cell in missing:
                line = runner.run(cell)
                append(arguments.out, line)
                print(f"{cell.group} seed {cell.seed}: {line.get('loss', 'failed')}", flush=True)
    lines = read_lines(arguments.out)
    if all(cell.key in lines for cell in cells(SEEDS)):
        print(table(lines))
    return 0


def cells(seeds: tuple[int, ...] | list[int]) -> list[Cell]:
    """Pair by pair."""
    groups = [Group(size, arm) for size in SIZES for arm in ("sora", "slow_gates")]
    return [Cell(group, LEARNING_RATE, seed, TEST, Protocol()) for seed in seeds for group in groups]


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Losses over test rows, and the pairs of one seed."""
    rows = ["| size | 1e-2 | auto | mean difference (95 %) | better in | p |", "|---|---|---|---|---|---|"]
    for size in SIZES:
        slow, auto = (
            [lines[cell.key].get("loss", float("inf")) for cell in cells(SEEDS) if cell.group == Group(size, arm)]
            for arm in ("slow_gates", "sora")
        )
        differences = [a - b for a, b in zip(auto, slow, strict=True)]
        low, high = bootstrap_interval(differences)
        wins = f"{sum(difference < 0 for difference in differences)} of {len(differences)}"
        rows.append(
            f"| {size:.0%} | {statistics.mean(slow):.4f} | {statistics.mean(auto):.4f} | "
            f"{statistics.mean(differences):+.4f} ({low:+.4f} … {high:+.4f}) | {wins} | "
            f"{sign_flip_p(differences):.4f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
