"""Communication between processes in a step, counted; and predictions for many GPUs, calculated.

    python benchmarks/scaling.py                    # both: starts 1, 2 and 4 processes per strategy; minutes
    python benchmarks/scaling.py --processes ''     # the prediction alone

Counts every call of the process group (gloo) while the engine is created, during steps of a tiny float32 LLaMA, and
while the engine is created again after a cut, whether by the loop, DDP or DeepSpeed; the bytes are those that one
process contributes, or receives in a broadcast.
Predicts the time of a step with the model of `sora_llm.estimates.step_time`, which `sora-llm estimate` uses for a
config.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from spawn import spawn, warm_deepspeed
from step import SHAPES

from sora_llm.estimates.step_time import Machines, Work, step_time

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


# -------------------------------------------------------------------------------------------------------------- counted


def counted(num_processes: Sequence[int], strategies: Sequence[str]) -> str:
    """A Markdown table of the collectives of a step, the last of three, when all has settled, of the start, and of
    preparing the model again after a cut to half the ranks."""
    columns = "processes, strategy, calls, reduced, adapter gathered, frozen gathered, scalars, all bytes"
    names = [*columns.split(", "), "at the start", "after a cut"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    warm_deepspeed()
    for number in num_processes:
        for strategy in strategies if number > 1 else ("none",):
            found = spawn("counting:counted_steps", number, {"strategy": strategy}, timeout=600)[0]
            last = found["steps"][-1]
            kinds: Counter[str] = Counter()
            for name, size in last:
                if size <= 8:
                    kinds["scalars"] += size
                elif "gather" in name or "broadcast" in name:
                    kinds["gathered"] += size
                else:
                    kinds["reduced"] += size
            # ZeRO-3 gathers both in one call, in proportion to their sizes.
            share = (
                found["frozen_bytes"] / (found["frozen_bytes"] + found["adapter_bytes"]) if strategy == "zero3" else 0
            )
            frozen = round(kinds["gathered"] * share)
            start, renewed = (sum(size for _, size in found[key]) for key in ("start", "renewed"))
            lines.append(
                f"| {number} | {strategy} | {len(last)} | {kinds['reduced']:,} | {kinds['gathered'] - frozen:,} | "
                f"{frozen:,} | {kinds['scalars']} | {sum(kinds.values()):,} | {start:,} | {renewed:,} |"
            )
    sizes = f"Adapter: {found['adapter_bytes']:,} bytes; frozen weights: {found['frozen_bytes']:,} bytes."
    return "\n".join([*lines, "", sizes])


# ------------------------------------------------------------------------------------------------------------ predicted


def work_of(shape: str, r: int, tokens: int) -> Work:
    """A step with rank r on all linears, gradient checkpointing, float32 adapters and an NF4 backbone."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden * kv_heads // heads
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    linears = [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    products = layers * sum(i * o for i, o in linears)
    return Work(
        tokens=tokens,
        linear_parameters=products,
        head_parameters=vocabulary * hidden,
        adapter_parameters=layers * r * sum(i + o for i, o in linears),
        num_layers=layers,
        # NF4 with its scales; embeddings and head in bf16
        frozen_bytes=round(0.53 * products) + 2 * 2 * vocabulary * hidden,
    )


def predicted(r: int, tokens: int, machines: Machines, gpus: Sequence[int]) -> str:
    lines = [
        f"| model | strategy | {' | '.join(f'{k} GPUs' for k in gpus)} |",
        "|---|---|" + "---|" * len(gpus),
    ]
    for shape in ("7b", "13b", "70b"):
        for strategy in ("ddp", "zero2", "zero3"):
            cells = []
            for number in gpus:
                found = step_time(work_of(shape, r, tokens), strategy, number, machines)
                cells.append(f"{found.seconds:.2f} s ({1 - found.compute / found.seconds:.0%})")
            lines.append(f"| {shape} | {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="how many to count with; '' counts nothing")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--gpus", default="8,16,64,512")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="of a GPU in a step")
    for name in ("flops", "utilisation", "inside", "between", "latency"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machines, name))
    options = parser.parse_args(argv)
    machines = Machines(
        **{name: getattr(options, name) for name in ("flops", "utilisation", "inside", "between", "latency")}
    )
    print(f"**Predicted, not measured** (r = {options.r}, {options.tokens} tokens a GPU and step; {machines}):")
    print("seconds of a step, in brackets the share that is communication\n")
    print(predicted(options.r, options.tokens, machines, [int(k) for k in options.gpus.split(",")]) + "\n", flush=True)
    if options.processes:
        numbers = [int(number) for number in options.processes.split(",")]
        print(f"**Counted** (bytes that one process gives in a step; load {os.getloadavg()[0]:.1f})\n")
        print(counted(numbers, options.strategies.split(",")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
