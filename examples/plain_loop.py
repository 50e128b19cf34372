"""SoRA in a plain PyTorch loop: inject, train with a gate per rank down to a budget, cut, train on, export.

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

from sora_llm import ProxAdamW, RankScheduler, consensus_prune, inject_sora, parameter_groups


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    train_rows, dev_rows = (common.token_rows(rows, args) for rows in common.text_rows(args))
    model = common.load_base(args)
    torch.manual_seed(args.seed)
    inject_sora(model, r=args.rank, lora_alpha=16)
    print(f"base: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}")  # B is 0: nothing has changed yet

    batches = micro_batches(train_rows, args.batch_size)
    cut = sum(gated_steps(args))
    optimizer, schedule = make_optimizer(model, args)
    train(model, batches, range(cut), optimizer, schedule, args)
    print(f"before the cut: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}{common.live_gates(model)}")

    consensus_prune(model, target_rank=args.target_rank)
    print(f"after the cut: dev loss {common.loss_of(model, dev_rows, args.batch_size):.4f}")
    optimizer, schedule = make_optimizer(model, args, first_step=cut)  # the parameters are new
    train(model, batches, range(cut, args.steps), optimizer, schedule, args)
    common.export_and_reload(model, dev_rows, args)


def train(
    model: Any, batches: Iterator[list[common.Row]], steps: range, optimizer: ProxAdamW, schedule: Any, args
) -> None:
    """Steps before the cut, or after it."""
    for step in steps:
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
        optimizer.step()  # with the prox of the gates, and what RankScheduler does before and after it
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss:.4f}{common.live_gates(model)}", flush=True)


def micro_batches(rows: Sequence[common.Row], batch_size: int) -> Iterator[list[common.Row]]:
    """Batches of rows in their order, epoch after epoch."""
    while True:
        yield from (list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))


def gated_steps(args: argparse.Namespace) -> tuple[int, int]:
    """(steps before pruning begins, steps of pruning): B has to leave 0 first, and there has to be time after a cut."""
    dense, cut = args.steps // 8, args.steps // 2
    if dense < 1:
        raise SystemExit(f"--steps is {args.steps}; it takes 8 or more, an eighth of them before pruning begins")
    return dense, cut - dense


def make_optimizer(model: nn.Module, args: argparse.Namespace, first_step: int = 0) -> tuple[ProxAdamW, Any]:
    """ProxAdamW, with a RankScheduler before the cut, and from `first_step` on one cosine for all rates, which ramps up
    at the start and wherever the optimizer starts afresh: with pruning, and after the cut."""
    dense_steps, sparsify_steps = gated_steps(args)
    gate_lr = min(0.25, max(1e-2, 4 / sparsify_steps))  # above a run's 1e-2 if there are few steps
    optimizer = ProxAdamW(parameter_groups(model, args.learning_rate, gate_lr))
    if first_step == 0:
        RankScheduler(model, optimizer, args.target_rank, dense_steps=dense_steps, sparsify_steps=sparsify_steps)
    fresh, ramp_steps = (0, dense_steps, dense_steps + sparsify_steps), max(1, args.steps // 40)

    def cosine(step: int) -> float:
        whole = first_step + step
        since = whole - max(start for start in fresh if start <= whole)
        return min(1.0, (since + 1) / ramp_steps) * 0.5 * (1 + math.cos(math.pi * whole / args.steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


if __name__ == "__main__":
    main()
