"""The cross-entropy of a model's frozen output head, some tokens at a time: its logits never exist in full.

Logits and what their backward pass needs are 12 bytes per token and word: 12.6 GB for 8,192 tokens and 128,256 words.
Of a frozen head the backward pass needs only the gradient by its input, which is computed together with the loss, from
the same logits; these are then dropped.  The matrix products are the same, for supervised tokens only.

Shape suffixes: B batch, T tokens (N in all), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The label of tokens that are not trained on: torch's cross-entropy skips it."""

LOGITS_AT_ONCE = 2**25
"""How many logits exist at a time: 128 MiB in float32, a thousand tokens of a vocabulary of 32,000."""

_CHANGED: WeakSet[nn.Module] = WeakSet()
"""Heads whose logits were seen to be changed by their model."""


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits exist at a time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


class _TokenLosses(torch.autograd.Function):
    """−log softmax(h Wᵀ + b) at the targets, (N,) float32, and 0 where they are `IGNORED`; h (N, H), W (V, H)."""

    @staticmethod
    def forward(ctx: Any, h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        losses_N = h_NH.new_zeros(len(h_NH), dtype=torch.float32)
        gradient_NH = torch.zeros_like(h_NH) if ctx.needs_input_grad[0] else None
        supervised = (targets_N != IGNORED).nonzero().flatten()
        for some in supervised.split(tokens_at_once(len(weight_VH))):
            log_p, target = F.linear(h_NH[some], weight_VH, bias_V).float().log_softmax(-1), targets_N[some, None]
            losses_N[some] = -log_p.gather(1, target).squeeze(1)
            if gradient_NH is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                gradient_NH[some] = p.to(h_NH.dtype) @ weight_VH
        ctx.gradient_NH = gradient_NH
        return losses_N

    @staticmethod
    def backward(ctx: Any, *dlosses: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NH: Tensor = ctx.gradient_NH
        return (gradient_NH * dlosses[0][:, None]).to(gradient_NH.dtype), None, None, None


def frozen_head(model: nn.Module) -> nn.Linear | None:
    """The output head of a model, in wrappers or not, if `token_losses` can take it.

    None for a head that is trained, quantised, replaced or absent; in float16, whose small gradients need the loss
    scale before they are rounded; if the model was seen to change its logits; under autocast, and in inference_mode,
    whose tensors do not count changes.
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DistributedDataParallel's, DeepSpeed's
        model = inner
    get_head = getattr(model, "get_output_embeddings", None)  # of PEFT's models, too
    head = get_head() if callable(get_head) else None
    if type(head) is not nn.Linear or head in _CHANGED or "forward" in vars(head):
        return None
    if any(parameter.requires_grad for parameter in head.parameters()) or head.weight.dtype == torch.float16:
        return None
    is_other_mode = torch.is_autocast_enabled(head.weight.device.type) or torch.is_inference_mode_enabled()
    return None if is_other_mode else head


def token_losses(model: nn.Module, head: nn.Linear, targets_BT: Tensor, **inputs: Any) -> Tensor | None:
    """A model's cross-entropy (B, T) float32 at `targets_BT`, 0 where they are `IGNORED`, by its `frozen_head`.

    During the forward pass the head returns losses (B, T, 1) in place of logits.  None if the model does not pass them
    on as they are (Gemma 2 caps logits, Cohere scales them); its head is then no longer a `frozen_head`.
    """
    returned: list[tuple[Any, ...]] = []

    def losses_for_logits(h_BTH: Tensor) -> Tensor:
        losses_N = _TokenLosses.apply(h_BTH.flatten(0, 1), head.weight, head.bias, targets_BT.flatten())
        return losses_N.view(*targets_BT.shape, 1)

    def note(_head: nn.Module, _inputs: Any, losses: Tensor) -> None:
        returned.append(_identity(losses))

    head.forward = losses_for_logits  # type: ignore[assignment, method-assign]
    hook = head.register_forward_hook(note)  # after DeepSpeed's, whose result is another tensor of the same memory
    try:
        losses = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
        del head.forward
    if returned != [_identity(losses)]:
        _CHANGED.add(head)
        return None
    return losses[..., 0]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What differs between two tensors unless they are views of the same, unchanged numbers."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor._version


def try_head(model: nn.Module, device: torch.device | str) -> None:
    """Find out on two tokens whether a model changes its logits, before a training step does, which would then draw the
    dropout masks of two forward passes."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    if (head := frozen_head(model)) is not None:
        with torch.no_grad():
            token_losses(model, head, ids, input_ids=ids)
