"""H4: wall time to a given loss of SoRA at 70 %, compaction on, beside LoRA at r = 16.

    python benchmarks/quality/speed.py --device cuda [--pairs 8] [--size 0.7] [--minutes 3]

One process, nothing beside it: pairs of runs of one seed, in turn (SoRA first in every other pair), after one pair
that warms up and is thrown away.  The loss over tuning rows is taken at twenty points of a run, while its clock stands
still; seconds are of steps and of changes of form.  Learning rates are those that grid.py froze (--runs).  Every run is
a line of --out (default speed.jsonl); a pair that is there on this device is not made again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import HERE, append, missing_data, missing_device, unusable
from protocol import TUNING, WHOLE, Cell, Group, Protocol, Queue, core_groups, read_all, read_lines
from statistics_of_pairs import sign_test_p

CURVE_ROWS, POINTS = 200, 20
SHARES = (0.95, 0.90)
"""Of the gap between the base and LoRA at the end of its run: the losses to be reached; the first one decides H4."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--size", type=float, default=0.7)
    parser.add_argument("--minutes", type=float, help="begin no pair that would not end within so many")
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--runs", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "speed.jsonl")
    arguments = parser.parse_args()
    started = time.monotonic()
    protocol = Protocol(steps=arguments.steps)
    groups = Group(WHOLE, "lora"), Group(arguments.size, "sora")
    queue, lines = Queue(protocol, [core_groups()]), read_lines(arguments.runs)
    rates = {group: queue.tuned(group, lines) for group in groups}
    wrong = unusable(arguments.out) or missing_data() or missing_device(arguments.device)
    if untuned := [str(group) for group, rate in rates.items() if rate is None]:
        wrong = f"{arguments.runs} has no learning rate for {' and '.join(untuned)} yet; run grid.py first"
    if not 1 <= arguments.pairs <= len(protocol.seeds):
        wrong = f"--pairs is {arguments.pairs}; give 1 to {len(protocol.seeds)}"
    if wrong:
        print(f"speed.py: {wrong}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        from runner import Runner, split

        split(protocol, Path(name))
        runner = Runner(protocol, Path(name), arguments.device)
        there = {(line["cell"]["seed"], line["cell"]["size"]) for line in read_speed(arguments.out, runner.device_name)}
        warm, longest = False, 0.0
        for number, seed in enumerate(protocol.seeds[: arguments.pairs]):
            cells = [Cell(group, rates[group], seed, TUNING, protocol) for group in groups]
            if all((seed, cell.group.size) in there for cell in cells):
                continue
            if not warm:
                for cell in cells:
                    runner.run(cell)
                warm = True
            began = time.monotonic()
            if arguments.minutes is not None and began - started + 1.2 * longest > 60 * arguments.minutes:
                break
            pair = [runner.run(cell, CURVE_ROWS, POINTS) for cell in (cells if number % 2 else reversed(cells))]
            longest = max(longest, time.monotonic() - began)
            for line in pair:
                append(arguments.out, line)
                print(f"{line['cell']['arm']:<6} seed {seed}  {line.get('failed') or line['curve'][-1]}", flush=True)
    print(speed_section(arguments.out))
    return 0


def read_speed(file: Path, device: str | None = None) -> list[dict[str, Any]]:
    """The lines of a file, of one device where it is given; one of each run and device."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in read_all(file):
        if device is None or line["device"] == device:
            found.setdefault((line["key"], line["device"]), line)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ results


def speed_section(file: Path) -> str:
    """H4 of results.md: seconds to the losses, pair by pair, and the verdict; a section per device."""
    lines = read_speed(file)
    devices = dict.fromkeys(line["device"] for line in lines)
    if not devices:
        return "## Wall time to a given loss (H4)\n\nOpen: not run."
    return "\n\n".join(_of_device([line for line in lines if line["device"] == device], device) for device in devices)


def _of_device(lines: Sequence[Mapping[str, Any]], device: str) -> str:
    runs = {(line["cell"]["arm"], line["cell"]["seed"]): line for line in lines if "failed" not in line}
    seeds = sorted({seed for arm, seed in runs if ("lora", seed) in runs and ("sora", seed) in runs})
    text = f"## Wall time to a given loss (H4), {device}\n\n"
    if not seeds:
        return text + "Open: no pair of runs."
    base = runs["lora", seeds[0]]["base_loss"]
    last = statistics.mean(runs["lora", seed]["curve"][-1]["eval_loss"] for seed in seeds)
    rows = [
        "| loss | share of the gap | LoRA, median s | SoRA, median s | SoRA first | p |",
        "|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        goal = base - share * (base - last)
        times = {arm: [seconds_to(runs[arm, seed]["curve"], goal) for seed in seeds] for arm in ("lora", "sora")}
        wins = sum(own < other for own, other in zip(times["sora"], times["lora"], strict=True))
        shown = [f"{statistics.median_low(times[arm]):.2f}" for arm in ("lora", "sora")]
        p = sign_test_p(wins, len(seeds))
        rows.append(f"| {goal:.3f} | {share:.0%} | {' | '.join(shown)} | {wins} of {len(seeds)} | {p:.3f} |")
    whole = {arm: statistics.median(runs[arm, seed]["seconds"] for seed in seeds) for arm in ("lora", "sora")}
    steps = (
        f"A whole run took {whole['lora']:.2f} s (LoRA) and {whole['sora']:.2f} s (SoRA), medians. A run that does not "
        "reach a loss loses its pair. p: exact sign test; H4 is decided by the first row."
    )
    return text + "\n".join(rows) + "\n\n" + steps


def seconds_to(curve: Sequence[Mapping[str, float]], goal: float) -> float:
    """When the loss was first at `goal`, on straight lines between points; infinite if it never was."""
    before = None
    for point in curve:
        if point["eval_loss"] <= goal:
            if before is None:
                return point["seconds"]
            place = (before["eval_loss"] - goal) / (before["eval_loss"] - point["eval_loss"])
            return before["seconds"] + place * (point["seconds"] - before["seconds"])
        before = point
    return math.inf


if __name__ == "__main__":
    sys.exit(main())
