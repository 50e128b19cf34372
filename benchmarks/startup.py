"""Time before a run's first step: seconds of each part, in a fresh process.

    python benchmarks/startup.py [--rounds 3] [CONFIG section.key=value ...]     (default: the demo's config and base)

One process with one thread.  Parts: *imports* of `sora_llm.train`, *checks* of config and inputs before weights,
*data*, *group* (accelerate, and DeepSpeed's import under ZeRO), *model* (weights, injection, the check that packed rows
do not see each other, prepare, first files), *dev loss* before the first step, *first step*.  Medians over processes
started one after the other; CPU seconds and wall time, which other jobs on the machine lengthen.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("imports", "checks", "data", "group", "model", "dev loss", "first step")
Clock = tuple[float, float]


def now() -> Clock:
    """Wall time and CPU time of this process's threads, in seconds."""
    return time.perf_counter(), time.process_time()


class Done(Exception):
    """The first step is over."""


def measure(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Start a run in this process and exit it after its first step."""
    marks: list[tuple[str, Clock]] = [("start", now())]
    from sora_llm import train
    from sora_llm.running import training_loop

    marks.append(("imports", now()))

    def marked(caller: Any, name: str, part: str, before: bool) -> None:
        """Note the time before or after what a module calls `name`."""
        real = getattr(caller, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if before:
                marks.append((part, now()))
                return real(*arguments, **options)
            result = real(*arguments, **options)
            marks.append((part, now()))
            if part == PARTS[-1]:
                raise Done
            return result

        setattr(caller, name, call)

    marked(train, "load_data", "checks", before=True)
    marked(train, "make_plan", "data", before=False)
    marked(train, "print_summary", "group", before=True)
    marked(train, "train_stage", "model", before=True)
    marked(training_loop, "change_form", "dev loss", before=True)
    marked(training_loop, "train_step", "first step", before=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done):
        train.run(config, *overrides, f"output.output_dir={folder}/run", "output.report_to=[]")
    found: dict[str, Any] = {}
    for (_, earlier), (part, later) in itertools.pairwise(marks):
        found.setdefault(part, [later[0] - earlier[0], later[1] - earlier[1]])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    if options.child:
        print(json.dumps(measure(options.config, options.overrides)))
        return 0
    command = [sys.executable, __file__, "--child", options.config, *options.overrides]
    rounds = []
    for _ in range(options.rounds):
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-3000:])
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"load {os.getloadavg()[0]:.1f}\n\n| part | seconds | CPU seconds |\n|---|---|---|")
    for part in PARTS:
        wall, cpu = (statistics.median(found[part][k] for found in rounds) for k in (0, 1))
        print(f"| {part} | {wall:.2f} | {cpu:.2f} |")
    sums = [statistics.median(sum(found[part][k] for part in PARTS) for found in rounds) for k in (0, 1)]
    print(f"| all | {sums[0]:.2f} | {sums[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
