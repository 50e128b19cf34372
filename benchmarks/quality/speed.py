"""H4: wall time to a given loss of SoRA at 70 %, compaction on, beside LoRA at r = 16.

    python benchmarks/quality/speed.py --device cuda [--pairs 8] [--minutes 3]

One process, nothing beside it: pairs of runs of one seed, in turn (SoRA first in every other pair), after one pair
that warms up and is thrown away.  The loss over all tuning rows is taken at ten points of a run, while its clock stands
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

from protocol import TUNING, WHOLE, Cell, Group, Protocol, Queue, core_groups, read_all, read_lines
from statistics_of_pairs import LEVEL, sign_test_p
from tasks import HERE
from workers import append, missing_data, missing_device, unusable

POINTS = 10
SIZE = 0.70
SHARES = (0.95, 0.90)
"""Of the gap between the base and LoRA at the end of its run: the losses to be reached; the first one decides H4."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--minutes", type=float, help="begin no pair that would not end within so many")
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--runs", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "speed.jsonl")
    arguments = parser.parse_args()
    started = time.monotonic()
    protocol = Protocol(steps=arguments.steps)
    queue, lines = Queue(protocol, [core_groups()]), read_lines(arguments.runs)
    pairs = speed_pairs(queue, lines)
    wrong = unusable(arguments.out) or missing_data() or missing_device(arguments.device)
    if not pairs:
        wrong = f"{arguments.runs} has no learning rates for {LORA} and {SORA} yet; run grid.py first"
    if not 1 <= arguments.pairs <= len(protocol.seeds):
        wrong = f"--pairs is {arguments.pairs}; give 1 to {len(protocol.seeds)}"
    if wrong:
        print(f"speed.py: {wrong}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        from runner import Runner, split

        split(protocol, Path(name))
        runner = Runner(protocol, Path(name), arguments.device)
        there = {line["key"] for line in read_all(arguments.out) if line["device"] == runner.device_name}
        warm, longest = False, 0.0
        for number, cells in enumerate(pairs[: arguments.pairs]):
            if all(cell.key in there for cell in cells):
                continue
            if not warm:
                for cell in cells:
                    runner.run(cell)
                warm = True
            began = time.monotonic()
            if arguments.minutes is not None and began - started + 1.2 * longest > 60 * arguments.minutes:
                break
            in_turn = cells if number % 2 else cells[::-1]
            for line in [runner.run(cell, protocol.num_tuning, POINTS) for cell in in_turn]:
                append(arguments.out, line)
                said = line.get("failed") or line["curve"][-1]
                print(f"{line['cell']['arm']:<6} seed {line['cell']['seed']}  {said}", flush=True)
            longest = max(longest, time.monotonic() - began)
    print(speed_section(arguments.out, pairs))
    return 0


LORA, SORA = Group(WHOLE, "lora"), Group(SIZE, "sora")


def speed_pairs(queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> list[tuple[Cell, Cell]]:
    """LoRA at r = 16 and SoRA at 70 % with the frozen learning rates, seed by seed; none before they are tuned."""
    lora, sora = queue.tuned(LORA, lines), queue.tuned(SORA, lines)
    if lora is None or sora is None:
        return []
    protocol = queue.protocol
    return [
        (Cell(LORA, lora, seed, TUNING, protocol), Cell(SORA, sora, seed, TUNING, protocol)) for seed in protocol.seeds
    ]


# ------------------------------------------------------------------------------------------------------------ results


def speed_section(file: Path, pairs: Sequence[tuple[Cell, Cell]]) -> str:
    """H4 of results.md, a section per device: the seconds of every pair and the verdict."""
    found: dict[str, dict[str, dict[str, Any]]] = {}  # device → key → line
    for line in read_all(file):
        found.setdefault(line["device"], {}).setdefault(line["key"], line)
    sections = []
    for device, lines in found.items():
        there = [(lines[a.key], lines[b.key]) for a, b in pairs if a.key in lines and b.key in lines]
        if there:
            sections.append(_of_device(there, len(pairs), device))
    return "\n\n".join(sections) or "## Wall time to a given loss (H4)\n\nOpen: not run."


def _of_device(there: Sequence[tuple[dict[str, Any], dict[str, Any]]], wanted: int, device: str) -> str:
    text = f"## Wall time to a given loss (H4), {device}\n\n"
    whole = [lora for lora, _ in there if "failed" not in lora]
    if not whole:
        return text + "Open: no run of LoRA that went well."
    base, last = whole[0]["base_loss"], statistics.mean(lora["curve"][-1]["eval_loss"] for lora in whole)
    rows = [
        "| loss | share of the gap | seconds of LoRA, SoRA by seed | SoRA first | p | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        goal = base - share * (base - last)
        times = [tuple(seconds_to(line.get("curve", ()), goal) for line in pair) for pair in there]
        wins = sum(sora < lora for lora, sora in times)
        p = sign_test_p(wins, len(times))
        verdict = "" if share != SHARES[0] else "**holds**" if p <= LEVEL else "not shown"
        if verdict and len(there) < wanted:
            verdict = f"open: {len(there)} of {wanted} pairs"
        shown = "; ".join(f"{lora:.1f}, {sora:.1f}" for lora, sora in times)
        rows.append(f"| {goal:.3f} | {share:.0%} | {shown} | {wins} of {len(times)} | {p:.4f} | {verdict} |")
    medians = [
        statistics.median(line["seconds"] for line in side if "failed" not in line)
        for side in zip(*there, strict=True)
        if any("failed" not in line for line in side)
    ]
    steps = (
        f"A whole run took {' s and '.join(f'{median:.1f}' for median in medians)} s (LoRA, SoRA; medians). p: exact "
        "sign test. inf: never reached, or the run failed; SoRA is not first then."
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
