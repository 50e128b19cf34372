"""How much of SoRA's lead over SVD cuts is when the first cut comes: at 25 %, with the first of four cuts at 10 %.

    python benchmarks/quality/early.py [--workers 2] [--out FILE]

Three arms on one machine, one thread each: `svd4early` (cuts at 10, 20, 30 and 40 %, where SoRA prunes), tuned here,
and `svd4` and `sora` at the rates that grid.py froze (--runs), because machines round bfloat16 differently and pairs
want the same one.  Every run is a line of --out (default early.jsonl); one that is there is not made again.  Prints
the numbers of README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol import Group, Protocol, Queue, tuning_lines
from statistics_of_pairs import PAIR_TABLE, pair_row
from tasks import HERE
from workers import add_options, lines_there, missing_data, run_cell, too_few_workers, unusable, work_off

SIZE = 0.25
EARLY, LATE, SORA = (Group(SIZE, arm) for arm in ("svd4early", "svd4", "sora"))
PAIRS = ((EARLY, LATE), (SORA, EARLY), (SORA, LATE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--runs", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "early.jsonl")
    arguments = parser.parse_args()
    if wrong := too_few_workers(arguments.workers) or unusable(arguments.out) or missing_data():
        print(f"early.py: {wrong}", file=sys.stderr)
        return 2
    queue = Queue(Protocol(), [[EARLY, LATE, SORA]])
    lines = {**tuning_lines(arguments.runs), **lines_there(arguments.out, arguments.again)}
    if wrong := work_off(queue, lines, arguments.out, run_cell, num_workers=arguments.workers):
        print(f"early.py: {wrong}", file=sys.stderr)
        return 1
    print(table(queue, lines))
    return 0


def table(queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Losses over test rows, and the pairs of one seed."""
    losses = {
        group: [lines[cell.key].get("loss", float("inf")) for cell in queue.test_cells(group, lines)]
        for group in (EARLY, LATE, SORA)
    }
    rows = ["| arm | rate | test loss | by seed |", "|---|---|---|---|"]
    for group, found in losses.items():
        by_seed = ", ".join(f"{loss:.4f}" for loss in found)
        rows.append(f"| {group} | {queue.tuned(group, lines)} | {statistics.mean(found):.4f} | {by_seed} |")
    rows += ["", PAIR_TABLE]
    for one, other in PAIRS:
        differences = [a - b for a, b in zip(losses[one], losses[other], strict=True)]
        rows.append(pair_row(f"{one} − {other}", differences))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
