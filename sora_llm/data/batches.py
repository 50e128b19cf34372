"""Rows → tensors: `collate`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sora_llm.data.dataset import TokenRow
from sora_llm.head_loss import IGNORED


def collate(
    sequences: Sequence[Sequence[TokenRow]], pad_id: int, *, packed: bool = False, flat: bool = False
) -> dict[str, Tensor]:
    """Collate sequences, each one row or several packed rows, into a batch of tensors.

    Args:
        packed: add the position ids that keep the rows of a sequence apart.
        flat: all rows in one sequence, without padding (flash attention keeps only rows of one sequence apart).

    Returns `input_ids` and `labels`, both (B, T) int64; if `packed`, `position_ids` (B, T), which restart at 0 for
    every row; if any weight is neither 0 nor 1, `loss_weights` (B, T) float32.

    Labels are the ids of tokens with weight and -100 elsewhere, not shifted; the first token of a row is never a label,
    since it follows another row.  Padding is on the right and masked by position: if pad_id is eos, the real eos tokens
    stay supervised.  There is no attention mask: under causal attention no token sees the padding to its right, the
    padding's own outputs have no label, and with a mask transformers would not keep packed rows apart.

    Without sequences the batch is 1 × 2 and has no labels, so that a process without rows takes part with zero weight.
    """
    if flat:
        sequences = [[row for sequence in sequences for row in sequence]] if sequences else []
    width = max((sum(len(ids) for ids, _ in rows) for rows in sequences), default=2)
    shape = (max(len(sequences), 1), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    position_ids = np.tile(np.arange(width), (shape[0], 1))
    for i, rows in enumerate(sequences):
        start = 0
        for ids, row_weights in rows:
            end = start + len(ids)
            input_ids[i, start:end], weights[i, start:end] = ids, row_weights
            weights[i, start] = 0
            position_ids[i, start:] -= position_ids[i, start]
            start = end
        position_ids[i, start:] -= position_ids[i, start] if start < width else 0  # padding sees padding
    batch = {"input_ids": input_ids, "labels": np.where(weights > 0, input_ids, IGNORED)}
    if packed:
        batch["position_ids"] = position_ids
    if not np.isin(weights, (0, 1)).all():
        batch["loss_weights"] = weights
    return {name: torch.from_numpy(values) for name, values in batch.items()}
