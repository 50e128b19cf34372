"""The loss of a causal language model over its supervised tokens, packed or not."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from sora_llm.head_loss import IGNORED, frozen_head, token_losses
from sora_llm.wrappers import unwrapped


def causal_loss_sum(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Σ weight · cross-entropy (float32) over the supervised tokens of a right-padded batch.

    All are (B, T).  `labels` are `IGNORED` for tokens that are not trained on; token t is predicted at t − 1;
    `position_ids` restart at 0 for every row of a packed batch; `loss_weights` belong to the labels, 1 if omitted.
    There is no attention mask: with causal attention no real token sees the padding after it, and transformers keeps
    packed rows apart only without one.  Logits exist for a few supervised tokens at a time (`head_loss`), or, if the
    model's head does not allow that, for the supervised columns, if the model supports it.
    """
    options = {} if position_ids is None else {"position_ids": position_ids}
    if (head := frozen_head(model)) is not None:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        losses = token_losses(model, head, targets, input_ids=input_ids, **options)
        if losses is not None:
            return losses.sum() if loss_weights is None else (losses[:, :-1] * loss_weights[:, 1:]).sum()
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero().flatten()
    if columns.numel() == 0:  # a process without rows joins with zero weight, its gradients exactly 0
        columns = columns.new_zeros(1)
    if takes_columns(model):
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=columns, **options).logits
    else:
        logits = model(input_ids=input_ids, use_cache=False, **options).logits[:, columns]
    flat_logits, kept = logits.flatten(0, 1).float(), targets[:, columns].flatten()
    if loss_weights is None:
        return nn.functional.cross_entropy(flat_logits, kept, ignore_index=IGNORED, reduction="sum")
    losses = nn.functional.cross_entropy(flat_logits, kept, ignore_index=IGNORED, reduction="none")
    return (losses * loss_weights[:, 1:][:, columns].flatten()).sum()


def packs_flat(attn_implementation: str) -> bool:
    """Whether packed rows must be in one sequence to be kept apart: flash attention reads the position ids only for a
    batch of one (and silently lets the rows of a larger one see each other)."""
    return attn_implementation.startswith("flash")


def takes_columns(model: nn.Module) -> bool:
    """Whether the model's forward has `logits_to_keep` (as in LLaMA, Mistral, Qwen, Gemma)."""
    inner = unwrapped(model)
    peft_base = getattr(inner, "get_base_model", None)
    inner = peft_base() if callable(peft_base) else inner  # PEFT passes it on
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
