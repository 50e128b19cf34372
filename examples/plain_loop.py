"""SoRA in a plain PyTorch loop: inject, train with a gate per rank, cut to a budget, train on, export.

    python examples/plain_loop.py MODEL DATA.jsonl OUT --load-in-4bit

The data are JSON lines with a prompt and a completion; --prompt and --completion name these fields.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

import common
import torch
from torch import nn

from sora_llm import ProxAdamW, consensus_prune, inject_sora, parameter_groups


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    train_rows, dev_rows = (common.token_rows(rows, args) for rows in common.text_rows(args))
    model = common.load_base(args)
    torch.manual_seed(args.seed)
    inject_sora(model, r=args.r, lora_alpha=16)
    print(f"base: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}")  # B is 0: nothing has changed yet

    batches = micro_batches(train_rows, args.batch_size)
    _, cut = sparse_phase(args)
    train(model, batches, cut, args)
    print(f"before the cut: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}{common.live_gates(model)}")

    consensus_prune(model, target_rank=args.target_rank)
    print(f"after the cut: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}")
    train(model, batches, args.steps - cut, args)
    common.export_and_reload(model, dev_rows, args)


def train(model: Any, batches: Iterator[list[common.Row]], num_steps: int, args) -> None:
    """One phase, with its own optimizer: after the cut the parameters are new."""
    optimizer, schedule = make_optimizer(model, args, num_steps)
    for step in range(num_steps):
        set_sparse_lambda(optimizer, step, args)
        rows = [next(batches) for _ in range(args.accumulate)]
        # The mean is over all supervised tokens of the step, or tokens of short rows would weigh more.
        count = sum(label != -100 for micro_batch in rows for row in micro_batch for label in row["labels"][1:])
        loss = 0.0
        for micro_batch in rows:
            batch = {key: value.to(model.device) for key, value in common.collate(micro_batch).items()}
            part = model(**batch, num_items_in_batch=count).loss
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm=1.0)
        optimizer.step()  # includes the prox of the gates
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss:.4f}{common.live_gates(model)}", flush=True)


def micro_batches(rows: Sequence[common.Row], batch_size: int) -> Iterator[list[common.Row]]:
    """Batches of rows in their order, epoch after epoch."""
    while True:
        yield from (list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))


def sparse_phase(args: argparse.Namespace) -> tuple[int, int]:
    """(steps before pruning begins, steps before the cut): B has to leave 0 first, and a cut has to heal."""
    if args.steps < 2:
        raise SystemExit(f"--steps is {args.steps}; it takes 2 or more, one with λ and one after the cut")
    if args.sparse_lambda <= 0:
        raise SystemExit(f"--sparse-lambda is {args.sparse_lambda:g}; it must be above 0")
    return args.steps // 8, args.steps // 2


def make_optimizer(model: nn.Module, args: argparse.Namespace, num_steps: int) -> tuple[ProxAdamW, Any]:
    """ProxAdamW for `num_steps`: a cosine for the factors, a constant rate for the gates, so that λ keeps its strength.

    The gates' rate takes a gate without a gradient from 1 to 0 in half of the steps with λ > 0.
    """
    dense, cut = sparse_phase(args)
    gate_lr = 2 / (args.sparse_lambda * (cut - dense))
    optimizer = ProxAdamW(parameter_groups(model, args.learning_rate, gate_lr))
    warmup = max(1, num_steps // 20)

    def cosine(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))

    rates = [cosine if group["name"] == "factors" else lambda _step: 1.0 for group in optimizer.param_groups]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def set_sparse_lambda(optimizer: Any, step: int, args: argparse.Namespace) -> None:
    """λ for a step of the first phase; afterwards there are no gates."""
    dense, _ = sparse_phase(args)
    for group in optimizer.param_groups:
        if group["name"] == "gates":
            group["sparse_lambda"] = args.sparse_lambda if step >= dense else 0.0


if __name__ == "__main__":
    main()
