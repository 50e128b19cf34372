"""What a merge costs: `python benchmarks/consensus.py` from the project's root, on an idle machine.

K LoRA replicas of one square layer become one adapter of the same rank: `sora_llm.merge` under a budget against PEFT's
`add_weighted_adapter(combination_type="svd")`, which forms every O × I product and takes the SVD of their sum.  Each
round starts a process per side, in turn (A B A B); it builds the inputs, warms up on a small layer, and then measures
the one call: seconds, and by how much resident memory rose.  Medians over the rounds.  The parent
compares both results with the exact mean and with each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm.allocation import components
from sora_llm.factors import product_distance
from sora_llm.merge import WeightedAdapter, merge

LORA_ALPHA = 32.0
SIDES = {"ours": "sora_llm.merge", "peft": "PEFT add_weighted_adapter"}
Pair = tuple[Tensor, Tensor]  # A (R, I), B (O, R)


def replicas_of(size: int, num_replicas: int, rank: int) -> list[Pair]:
    """Float32 adapters that agree on a signal of falling strength and differ by noise, as diverged replicas do."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    strength = torch.logspace(0, -1.5, rank)
    A, B = randn(rank, size), randn(size, rank) * strength
    return [(A + 0.3 * randn(rank, size), B + 0.1 * randn(size, rank)) for _ in range(num_replicas)]


def weights_of(num_replicas: int) -> list[float]:
    """Uneven weights that sum to 1."""
    total = num_replicas * (num_replicas + 1) / 2
    return [(k + 1) / total for k in range(num_replicas)]


def exact_mean(pairs: list[Pair]) -> Pair:
    """Float64 factors of ΔW̄ itself, of rank K·r."""
    rank = pairs[0][0].shape[0]
    scales = [weight * LORA_ALPHA / rank for weight in weights_of(len(pairs))]
    A = torch.cat([A.double() for A, _ in pairs])
    return A, torch.cat([scale * B.double() for scale, (_, B) in zip(scales, pairs, strict=True)], dim=1)


# ----- one side, in its own process -----------------------------------------------------------------------------------


def our_side(pairs: list[Pair]) -> Callable[[], Pair]:
    rank, size = pairs[0][0].shape
    replicas = [
        WeightedAdapter(weight, {"proj": (A, B, None)}, LORA_ALPHA / rank)
        for weight, (A, B) in zip(weights_of(len(pairs)), pairs, strict=True)
    ]
    return lambda: merge(replicas, budget=2 * size * rank).factors["proj"]


def peft_side(pairs: list[Pair]) -> Callable[[], Pair]:
    from peft import LoraConfig, get_peft_model

    rank, size = pairs[0][0].shape
    names = [f"replica{k}" for k in range(len(pairs))]
    config = LoraConfig(r=rank, lora_alpha=int(LORA_ALPHA), target_modules=["proj"])
    base = nn.ModuleDict({"proj": nn.Linear(size, size, bias=False)})
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer: Any = base["proj"]
    for name, (A, B) in zip(names, pairs, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A, B

    def combine() -> Pair:
        model.add_weighted_adapter(names, weights_of(len(pairs)), "merged", combination_type="svd", svd_rank=rank)
        return layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()

    return combine


def memory(field: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(side: str, size: int, num_replicas: int, rank: int, file: str) -> None:
    """Prints seconds and MiB of one call as JSON and saves its factors."""
    warnings.simplefilter("ignore")
    make = our_side if side == "ours" else peft_side
    make(replicas_of(256, num_replicas, rank))()  # libraries load their kernels
    call = make(replicas_of(size, num_replicas, rank))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, began = memory("VmRSS"), time.perf_counter()
    A, B = call()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "mib": (memory("VmHWM") - before) / 1024}))
    torch.save((A, B), file)


# ----- the comparison -------------------------------------------------------------------------------------------------


def compare(size: int, num_replicas: int, rank: int, rounds: int, threads: int) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        files = {side: str(Path(folder, side)) for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                found[side].append(child(side, size, num_replicas, rank, threads, files[side]))
        factors = {side: torch.load(file) for side, file in files.items()}
    mean = exact_mean(replicas_of(size, num_replicas, rank))
    sigma = components(*mean, None, 1.0).sigma
    best = math.sqrt(float((sigma[rank:] ** 2).sum() / (sigma**2).sum()))

    print(f"{size} × {size}, K = {num_replicas}, r = {rank}, float32, {threads} threads, medians of {rounds} rounds")
    print(f"{'':26}  {'seconds':>8}  {'MiB':>7}  {'error':>9}  error of the best of this rank {best:.7f}")
    median = {}
    for side, name in SIDES.items():
        median[side] = {key: statistics.median(run[key] for run in found[side]) for key in ("seconds", "mib")}
        error = product_distance(*mean, *factors[side])
        spread = " ".join(f"{run['seconds']:.2f}" for run in found[side])
        print(f"{name:26}  {median[side]['seconds']:8.3f}  {median[side]['mib']:7.1f}  {error:9.7f}  ({spread} s)")
    ratio = {key: median["peft"][key] / median["ours"][key] for key in ("seconds", "mib")}
    print(f"{'PEFT / ours':26}  {ratio['seconds']:7.0f}×  {ratio['mib']:6.1f}×")
    print(f"relative distance of the two results {product_distance(*factors['ours'], *factors['peft']):.1e}")


def child(side: str, size: int, num_replicas: int, rank: int, threads: int, file: str) -> dict[str, float]:
    """The output of one side, run alone."""
    numbers = map(str, (size, num_replicas, rank))
    command = [sys.executable, __file__, "--side", side, file, *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="I = O")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, file, size, num_replicas, rank = args.side
        measure(side, int(size), int(num_replicas), int(rank), file)
    else:
        compare(args.size, args.replicas, args.rank, args.rounds, args.threads)


if __name__ == "__main__":
    main()
