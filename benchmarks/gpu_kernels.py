"""Does a step wait for the CPU or for the GPU?

    python benchmarks/gpu_kernels.py [--layers 8] [--r 64] [--rows 1,4]

Forward and backward of some layers of a LLaMA-7B shape in NF4, 2,048 tokens a sequence (CUDA only): milliseconds until
Python has queued a step (issued), until it is done, and of its kernels on the GPU, with their number, from torch's
profiler.  Fastest of --rounds steps.  One JSON line for each arm; the arms are those of step.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from step import ARMS, Arm, circumstances, make_arm, make_backbone, random_factors
from torch.profiler import ProfilerActivity, profile


def times(arm: Arm, rounds: int) -> dict[str, Any]:
    issued, done = [], []
    for round_number in range(-2, rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        arm.forward_backward()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        if round_number >= 0:
            issued.append(queued - started)
            done.append(time.perf_counter() - started)
        arm.clear()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        arm.forward_backward()
        torch.cuda.synchronize()
    arm.clear()
    kernels = [event for event in found.key_averages() if event.device_type.name == "CUDA"]
    return {
        "issued_ms": min(issued) * 1e3,
        "done_ms": min(done) * 1e3,
        "kernels_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "kernels": sum(event.count for event in kernels),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rows", default="1,4", help="sequences in a step")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--arms", default="floor,peft_bf16,ours,ungated", help=", ".join(ARMS))
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device")
    if unknown := [name for name in options.arms.split(",") if name not in ARMS]:
        parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    options.device, options.shape = "cuda", "7b"
    device = torch.device("cuda")
    model = make_backbone(options.shape, options.layers, "nf4", device)
    factors = random_factors(model, options.r)
    for rows in map(int, options.rows.split(",")):
        shape = (rows, options.tokens)
        ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(2)).to(device)
        inputs = model.get_input_embeddings()(ids).detach() * 50
        for name in options.arms.split(","):
            own = make_arm(name, model, factors, options.r)
            found = times(Arm.make(name, own, inputs.clone().requires_grad_(), ids), options.rounds)
            print(json.dumps({"rows": rows, "arm": name, **found, **circumstances(options)}), flush=True)
            del own
    return 0


if __name__ == "__main__":
    sys.exit(main())
