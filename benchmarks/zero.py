"""A training step under DDP or ZeRO, over the processes of this launch: seconds, tokens/s, peak memory of the steps.

    torchrun --standalone --nproc_per_node 8 benchmarks/zero.py zero2 --shape 7b --tokens 2048

LLaMA blocks with random weights in NF4 with SoRA on all linears, gradient checkpointing, one sequence of random tokens
per process; the engine, loss and optimizer are those of a run.  The main process prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from step import SHAPES, circumstances, make_backbone
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sora_llm import ProxAdamW, inject_sora, parameter_groups
from sora_llm.backbone import enable_checkpointing
from sora_llm.base_spec import DTYPES, resolve_quant_storage
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import end, make_accelerator
from sora_llm.running.optimizer_step import StepBatches, forget_peak, peak_memory_gib, train_step
from sora_llm.topology import ZERO_STAGES, deepspeed_config, launched_world


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=("ddp", *ZERO_STAGES))
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of each process in a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    options = parser.parse_args(argv)
    environ, world = dict(os.environ), launched_world(os.environ)
    config = None
    if options.strategy in ZERO_STAGES:
        config = deepspeed_config(options.strategy, max_grad_norm=1.0, adapter_dtype="float32")
    accelerator = make_accelerator(options.strategy, world, deepspeed_config=config)
    device = options.device = str(accelerator.device)
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would shard while building (see backbone.py)
    storage = DTYPES[resolve_quant_storage("auto", "bfloat16", options.strategy)]
    model = make_backbone(options.shape, options.layers, "nf4", torch.device(device), storage)
    enable_checkpointing(model)
    model.enable_input_require_grads()
    inject_sora(model, options.r, 16)
    optimizer = ProxAdamW(parameter_groups(model, 1e-4, 1e-3, sparse_lambda=0.5))
    engine = Engine(accelerator, model, optimizer, options.strategy, 1.0)
    forget_peak(engine.device)

    generator = torch.Generator().manual_seed(world.process_index)
    ids = torch.randint(SHAPES[options.shape][5], (1, options.tokens), generator=generator)
    supervised = (options.tokens - 1) * world.num_processes
    batches = StepBatches(
        [{"input_ids": ids, "labels": ids}],
        weight=supervised,
        own_weight=options.tokens - 1,
        supervised_tokens=supervised,
        tokens=options.tokens * world.num_processes,
    )
    seconds: list[float] = []
    for round_number in range(-options.warm_up, options.rounds):
        started = time.perf_counter()
        _, outcome = train_step(engine, batches, world.num_processes)  # computes the norm, which synchronises
        assert outcome.grad_norm > 0 and not outcome.skipped, f"gradient norm {outcome.grad_norm}"
        if round_number >= 0:
            seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds)
    if world.is_main:
        found = {
            "strategy": options.strategy,
            "num_processes": world.num_processes,
            "r": options.r,
            "tokens": batches.tokens,
            "step_seconds": step,
            "tokens_per_second": batches.tokens / step,
            "peak_memory_gib": peak_memory_gib(engine.device),
            "grad_norm": outcome.grad_norm,
        }
        print(json.dumps({**found, **circumstances(options)}))
    end(accelerator, environ)
    return 0


if __name__ == "__main__":
    sys.exit(main())
