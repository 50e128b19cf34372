"""The loss over a whole data set, distributed over the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sora_llm.causal_loss import causal_loss_sum
from sora_llm.data.dataset import TokenDataset, TokenRow
from sora_llm.distributed.collectives import sum_over_processes
from sora_llm.head_loss import IGNORED
from sora_llm.inject import evaluating
from sora_llm.topology import World


def evaluate(
    model: nn.Module,
    rows: TokenDataset,
    collate: Callable[[list[list[TokenRow]]], Mapping[str, Tensor]],
    *,
    batch_size: int,
    world: World,
    device: torch.device | str,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Σ cross-entropy / Σ supervised tokens of `model` over all rows, in nats, both weighted if the data is
    (collective).

    `collate` turns some rows, unpacked, into a batch (the arguments of `causal_loss_sum`), and no rows into a batch
    without supervised tokens.  Rows of similar length go together; every process runs the same number of batches (under
    ZeRO-3 each forward is a collective) and calls `before_batch` before each.  Every module is returned to the mode it
    was in, and no gradient is touched.
    """
    by_length = sorted(range(len(rows)), key=lambda row: (-int(rows.lengths[row]), row))
    stride = batch_size * world.num_processes
    loss_sum, weight = torch.zeros((), dtype=torch.float64, device=device), 0.0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(by_length), stride):
            before_batch()
            mine = by_length[start + world.process_index : start + stride : world.num_processes]
            batch = collate([[rows[row]] for row in mine])
            supervised = batch["labels"][:, 1:] != IGNORED
            weights = batch.get("loss_weights")
            weight += float(supervised.sum() if weights is None else weights[:, 1:][supervised].double().sum())
            loss_sum += causal_loss_sum(model, **{name: part.to(device) for name, part in batch.items()}).double()
    total, total_weight = sum_over_processes(loss_sum, weight, device=device)
    return total / total_weight
