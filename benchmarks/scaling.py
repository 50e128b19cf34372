"""What processes send each other in a step, counted; and what that predicts for many GPUs, calculated.

    python benchmarks/scaling.py                    # both: starts 1, 2 and 4 processes by strategy, some minutes
    python benchmarks/scaling.py --processes ''     # the prediction alone

Counted is every call of the process group (gloo) during steps of a tiny float32 LLaMA, whoever makes it: the loop, DDP
or DeepSpeed; the bytes are those that one process gives.  Predicted is the time of a step from a stated model with no
measurement of a GPU in it: read it as what the strategies cost relative to each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from spawn import spawn, warm_deepspeed
from step import SHAPES

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


# -------------------------------------------------------------------------------------------------------------- counted


def counted(num_processes: Sequence[int], strategies: Sequence[str]) -> str:
    """A Markdown table of a step's collectives: the last of three, when everything has settled."""
    lines = [
        "| processes | strategy | calls | reduced | adapter gathered | frozen gathered | scalars | all bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
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
            lines.append(
                f"| {number} | {strategy} | {len(last)} | {kinds['reduced']:,} | {kinds['gathered'] - frozen:,} | "
                f"{frozen:,} | {kinds['scalars']} | {sum(kinds.values()):,} |"
            )
    sizes = f"Adapter: {found['adapter_bytes']:,} bytes; frozen weights: {found['frozen_bytes']:,} bytes."
    return "\n".join([*lines, "", sizes])


# ------------------------------------------------------------------------------------------------------------ predicted


@dataclass(frozen=True)
class Machine:
    """What the prediction assumes of the hardware."""

    flops: float = 989e12
    """bf16 peak of a GPU, 1/s (an H100 SXM's data sheet)."""
    utilisation: float = 0.35
    """Share of the peak that a step with an NF4 backbone reaches: assumed."""
    gpus_per_node: int = 8
    inside: float = 300e9
    """Bytes a second from and to a GPU inside a machine (NVLink): assumed."""
    between: float = 25e9
    """The same between machines (200 Gbit/s a GPU): assumed."""
    latency: float = 20e-6
    """Seconds of one collective for every doubling of the processes: assumed."""


def linears(shape: str) -> list[tuple[int, int]]:
    """(in, out) of the linears of one layer."""
    hidden, intermediate, _, heads, kv_heads, _ = SHAPES[shape]
    kv = hidden * kv_heads // heads
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    return [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, by what they are spent on; none of them hidden behind another."""

    compute: float
    reduce: float
    gather: float

    @property
    def step(self) -> float:
        return self.compute + self.reduce + self.gather


def predict(shape: str, strategy: str, num_gpus: int, r: int, tokens: int, machine: Machine) -> Prediction:
    """A step of `tokens` tokens on every GPU, gradient checkpointing on, float32 adapters, an NF4 backbone.

    compute   (6 T Σ I O of the linears: forward, again for the backward pass, backward; 4 T of the head;
              8 T r Σ (I + O) of the adapters) / (flops · utilisation); attention is left out
    reduce    ring all-reduce of the adapter's gradients: 2 (K − 1)/K · bytes / bandwidth
    gather    zero2: (K − 1)/K of the adapter; zero3: of adapter and backbone, in forward and again in backward
    """
    layers, vocabulary, hidden = SHAPES[shape][2], SHAPES[shape][5], SHAPES[shape][0]
    products = layers * sum(i * o for i, o in linears(shape))
    adapter = layers * r * sum(i + o for i, o in linears(shape))
    compute = tokens * (6 * products + 4 * vocabulary * hidden + 8 * adapter) / (machine.flops * machine.utilisation)
    bandwidth = machine.inside if num_gpus <= machine.gpus_per_node else machine.between
    share, doublings = (num_gpus - 1) / num_gpus, max(num_gpus - 1, 0).bit_length()
    backbone = 0.53 * products + 2 * 2 * vocabulary * hidden  # NF4 with its scales; embeddings and head in bf16
    reduce = 2 * share * 4 * adapter / bandwidth + machine.latency * doublings
    if strategy == "ddp":
        return Prediction(compute, reduce, 0.0)
    if strategy == "zero2":
        return Prediction(compute, reduce, share * 4 * adapter / bandwidth + machine.latency * doublings)
    # Half of a ring all-reduce is a reduce-scatter; a gather for every layer in either direction.
    gather = 2 * share * (backbone + 4 * adapter) / bandwidth + 2 * layers * machine.latency * doublings
    return Prediction(compute, reduce / 2, gather)


def predicted(r: int, tokens: int, machine: Machine, gpus: Sequence[int]) -> str:
    lines = [
        f"| model | strategy | {' | '.join(f'{k} GPUs' for k in gpus)} |",
        "|---|---|" + "---|" * len(gpus),
    ]
    for shape in ("7b", "13b", "70b"):
        for strategy in ("ddp", "zero2", "zero3"):
            cells = []
            for number in gpus:
                found = predict(shape, strategy, number, r, tokens, machine)
                cells.append(f"{found.step:.2f} s ({1 - found.compute / found.step:.0%})")
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
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine, name))
    options = parser.parse_args(argv)
    machine = Machine(
        **{name: getattr(options, name) for name in ("flops", "utilisation", "inside", "between", "latency")}
    )
    print(f"**Predicted, not measured** (r = {options.r}, {options.tokens} tokens a GPU and step; {machine}):")
    print("seconds of a step, in brackets the share that is communication\n")
    print(predicted(options.r, options.tokens, machine, [int(k) for k in options.gpus.split(",")]) + "\n", flush=True)
    if options.processes:
        numbers = [int(number) for number in options.processes.split(",")]
        print(f"**Counted** (bytes that one process gives in a step; load {os.getloadavg()[0]:.1f})\n")
        print(counted(numbers, options.strategies.split(",")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
