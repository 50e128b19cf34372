"""Whether rows packed into one sequence attend to each other in this model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_llm.causal_loss import packs_flat
from sora_llm.data.batches import collate
from sora_llm.errors import UserError


def check_packing(
    model: nn.Module, attn_implementation: str, device: torch.device | str, is_8bit: bool = False
) -> None:
    """Raise UserError unless rows packed into one sequence give the same logits as each does alone.

    Whether packed rows see each other depends on the model's code, its attention and the version of transformers, and
    a leak raises no error.  Random rows are run alone, packed, and packed behind a first row of other tokens: the
    change in the later rows must be negligible compared with that in one long row, and their logits must equal those of
    each row alone up to rounding.  Call it with the base, in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    num_ids = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    rows = [torch.randint(num_ids, (length,), generator=generator).numpy() for length in (11, 17, 5)]
    other = torch.randint(num_ids, (11,), generator=generator).numpy()

    def logits(packed: Sequence[Any], isolated: bool = True) -> Tensor:
        """The logits (T, V) of a sequence's last rows; it is batched with another one if a batch can have several."""
        sequence = [(ids, np.zeros(len(ids), dtype=np.float32)) for ids in packed]
        flat = packs_flat(attn_implementation)
        batch = collate([sequence] if flat else [sequence, sequence[1:]], 0, packed=isolated, flat=flat)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch}
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits[0].float()
        return out[-sum(map(len, packed[1:])) :] if len(packed) > 1 else out

    alone = torch.cat([logits([row]) for row in rows[1:]])
    together = logits(rows)
    leak = (logits([other, *rows[1:]]) - together).norm()
    full_leak = (logits([other, *rows[1:]], isolated=False) - logits(rows, isolated=False)).norm()
    error = (together - alone).norm() / alone.norm()
    # LLM.int8 looks for outliers over the whole batch, so rows affect each other's rounding without seeing each other.
    leaks = not is_8bit and not bool(leak <= 1e-3 * full_leak)
    # Measured on two small checkpoints: a leak of exactly 0, errors of 1e-7 (float32) to 4e-3 (bf16); without the
    # position ids the error is above 1e-1.
    if not bool(alone.isfinite().all()):
        raise UserError(
            "the base's logits are not finite: its weights are damaged, or overflow their dtype (model.dtype, "
            "quantization.bnb_4bit_compute_dtype)"
        )
    if leaks or not bool(error <= 5e-2):
        raise UserError(
            f"data.sample_packing: packed rows see each other in this model under attn_implementation "
            f"{attn_implementation} (logits off by {float(error):.1e}, {float(leak / full_leak):.1e} of a full leak); "
            "set data.sample_packing to false, or choose another model.attn_implementation"
        )
