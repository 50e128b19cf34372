"""The cost of checking that processes agree: `Engine.check_agreement` against an optimizer step.

    python benchmarks/agreement.py [--rank 64] [--tokens 512] [--rounds 15]

Two processes (gloo) train a LLaMA with random weights (two layers, hidden 1024, float32) with rank-64 adapters on all
linears under each strategy that can check something.  Steps and checks (proofs) take turns; prints medians of their
times, the cost of a check per step at distributed.check_every 100, the bytes compared, and their speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.inject import inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.optimizer_step import StepBatches, train_step
from sora_llm.topology import ZERO_STAGES, deepspeed_config, launched_world

CHECK_EVERY = 100
STRATEGIES = ("ddp", "zero1", "zero2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of each process's one sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--strategy", choices=STRATEGIES, help="as one of the processes")
    arguments = parser.parse_args()
    if arguments.strategy:
        measure(arguments.strategy, arguments.rank, arguments.tokens, arguments.rounds)
        return 0
    print(
        "| strategy | step, s | proof, s | MB compared | GB/s | of a step, every 100 steps |\n|---|---|---|---|---|---|"
    )
    for strategy in STRATEGIES:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        options = [f"--rank={arguments.rank}", f"--tokens={arguments.tokens}", f"--rounds={arguments.rounds}"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        command = [sys.executable, *launcher, __file__, *options, f"--strategy={strategy}"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
        print("\n".join(rows) if rows else (done.stdout + done.stderr)[-2000:], flush=True)
    return 0


def measure(strategy: str, rank: int, num_tokens: int, rounds: int) -> None:
    """One process: steps and checks in turn; the main one prints its medians."""
    world = launched_world(os.environ)
    options = None
    if strategy in ZERO_STAGES:
        options = deepspeed_config(strategy, max_grad_norm=1.0, adapter_dtype="float32")
    accelerator = make_accelerator(strategy, world, deepspeed_config=options)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape))
    inject_sora(model, r=rank, lora_alpha=rank)
    groups = parameter_groups(model, learning_rate=1e-3, gate_lr=1e-2)
    engine = Engine(accelerator, model, ProxAdamW(groups), strategy, max_grad_norm=1.0)
    ids = torch.randint(512, (1, num_tokens), generator=torch.Generator().manual_seed(world.process_index))
    step = StepBatches([{"input_ids": ids, "labels": ids}], 2 * num_tokens, num_tokens, 2 * num_tokens, 2 * num_tokens)
    steps, proofs = [], []
    for index in range(rounds + 2):
        started = time.perf_counter()
        train_step(engine, step, world.num_processes)
        between = time.perf_counter()
        engine.check_agreement()
        ended = time.perf_counter()
        if index >= 2:
            steps.append(between - started)
            proofs.append(ended - between)
    parameters = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    compared = parameters * (3 if strategy == "ddp" else 1)  # moments too; the masters are compared in place
    step_seconds, proof_seconds = statistics.median(steps), statistics.median(proofs)
    share = proof_seconds / (CHECK_EVERY * step_seconds)
    if world.is_main:
        print(
            f"| {strategy} | {step_seconds:.3f} | {proof_seconds:.4f} | {compared / 1e6:.0f} "
            f"| {compared / proof_seconds / 1e9:.2f} | {share:.3%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
