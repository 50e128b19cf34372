"""Tune, freeze, confirm: runs whatever cells of the experiment are missing, for as long as there is time.

    python benchmarks/quality/grid.py --device cuda --workers 12 --minutes 9        # on a GPU, everything
    python benchmarks/quality/grid.py --device cpu --workers 2                      # goes on where that stopped
    python benchmarks/quality/grid.py --task roleplay --workers 2                   # other rows, fewer questions
    python benchmarks/quality/grid.py --dry-run                                     # what is there, what is missing

Every run is a line of --out (default runs.jsonl in the folder of the task, which for the first one is this folder),
written when it ends; a run that is there is not made again, so the command can be stopped and started, also twice at
once (the worst that happens is a run made twice).
Learning rates are chosen from the tuning runs by the rule in README.md.  A run that failed has a line too and is not
tried again unless asked to (--again).  What it says: `python benchmarks/quality/verdicts.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol import (
    ARMS,
    CORE_SIZES,
    WHOLE,
    Group,
    Protocol,
    Queue,
    core_blocks,
    extra_groups,
)
from tasks import GSM8K_ANSWERS, TASKS
from workers import (
    add_options,
    lines_there,
    missing_data,
    missing_device,
    run_cell,
    too_few_workers,
    unusable,
    work_off,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_options(parser)
    parser.add_argument("--minutes", type=float, help="begin no run that would not end within so many")
    parser.add_argument("--task", choices=TASKS, default=GSM8K_ANSWERS.name)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these (the first question needs lora)")
    parser.add_argument("--sizes", nargs="+", type=float, default=CORE_SIZES, help="shares of LoRA at r = 16")
    parser.add_argument("--core-only", action="store_true", help="no extras when the core is done")
    parser.add_argument("--dry-run", action="store_true", help="only say what is there and what is missing")
    arguments = parser.parse_args()
    if wrong := bad_input(arguments):
        print(f"grid.py: {wrong}", file=sys.stderr)
        return 2
    started = time.monotonic()
    task = TASKS[arguments.task]
    out = arguments.out or task.runs
    protocol = Protocol.of(task, arguments.steps)
    blocks = core_blocks(task, arguments.sizes)
    is_complete = arguments.arms is None and tuple(arguments.sizes) == CORE_SIZES
    if is_complete and not arguments.core_only:
        blocks += [[group] for group in extra_groups(task)]
    if arguments.arms is not None:
        sizes = {arm: [WHOLE] if ARMS[arm].is_whole else arguments.sizes for arm in arguments.arms}
        blocks = [[Group(size, arm) for arm in arguments.arms for size in sizes[arm]]]
    queue = Queue(protocol, blocks)
    lines = lines_there(out, arguments.again)
    if arguments.dry_run:
        print(overview(queue, lines))
        return 0
    seconds = None if arguments.minutes is None else 60 * arguments.minutes - (time.monotonic() - started)
    out.parent.mkdir(exist_ok=True)
    wrong = work_off(
        queue, lines, out, run_cell, device=arguments.device, num_workers=arguments.workers, seconds=seconds
    )
    print(overview(queue, lines))
    if wrong:
        print(f"grid.py: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def bad_input(arguments: argparse.Namespace) -> str | None:
    """What cannot work, in a sentence."""
    if wrong := too_few_workers(arguments.workers):
        return wrong
    if arguments.steps < 10:
        return f"--steps is {arguments.steps}; the phases of a run need 10 or more"
    if arguments.minutes is not None and arguments.minutes <= 0:
        return f"--minutes is {arguments.minutes:g}; give more than 0, or leave it out"
    if outside := [size for size in arguments.sizes if not 0.05 <= size < 1]:
        return f"--sizes has {outside[0]:g}; give shares of LoRA at r = 16, from 0.05 to below 1"
    if arguments.out is not None and (message := unusable(arguments.out)):
        return message
    return missing_data(TASKS[arguments.task]) or missing_device(arguments.device)


def overview(queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per arm and size: its learning rate, and how many of its runs are there."""
    rows = []
    for group in (group for block in queue.blocks for group in block):
        rate = queue.tuned(group, lines)
        losses = queue.tuning_losses(group, lines)
        cells = queue.test_cells(group, lines)
        done = sum(cell.key in lines for cell in cells)
        state = f"{len(losses)} rates tried, not tuned yet"
        if rate is not None:
            state = f"lr {rate:g} of {len(losses)}; {done} of {len(cells)} seeds"
        rows.append(f"{group!s:<14} {state}")
    failed = sum("failed" in line for line in lines.values())
    return "\n".join([*rows, f"{len(lines)} runs are there, {failed} of them failed"])


if __name__ == "__main__":
    sys.exit(main())
