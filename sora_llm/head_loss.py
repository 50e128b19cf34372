"""The cross-entropy of a model's frozen output head, some tokens at a time: its logits never exist in full.

Logits and what their backward pass needs are 12 bytes per token and word: 12.6 GB for 8,192 tokens and 128,256 words.
Of a frozen head the backward pass needs only the gradient by its input, which is computed together with the loss, from
the same logits; these are then dropped.  The matrix products are the same, for supervised tokens only.

Shape suffixes: B batch, T tokens (N in all), H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sora_llm.wrappers import unwrapped

IGNORED = -100
"""The label of tokens that are not trained on: torch's cross-entropy skips it."""

LOGITS_AT_ONCE = 2**25
"""How many logits exist at a time: a thousand tokens of a vocabulary of 32,000; 8 bytes each, with their gradient."""

_GIVES_LOGITS = "sora_llm_gives_logits"
"""Name of a mark on heads that were tried: whether the model hands on what the head returns."""


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits exist at a time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def supervised_tokens(targets_N: Tensor) -> Tensor:
    """The numbers of the tokens whose targets are not `IGNORED`.  A GPU's queue runs empty until they are known."""
    return (targets_N != IGNORED).nonzero().flatten()


def head_losses(h_NH: Tensor, head: nn.Linear, targets_N: Tensor, supervised: Tensor) -> Tensor:
    """The cross-entropy (N,) of a frozen head at the targets of the `supervised_tokens`, 0 at others: float32, or
    float64 if the head is."""
    losses_N: Tensor = _HeadLosses.apply(h_NH, head.weight, head.bias, targets_N, supervised)
    return losses_N


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, supervised: Tensor
    ) -> Tensor:
        fine = torch.promote_types(h_NH.dtype, torch.float32)
        losses_N = h_NH.new_zeros(len(h_NH), dtype=fine)
        gradient_NH = torch.zeros_like(h_NH) if ctx.needs_input_grad[0] else None
        for rows in supervised.split(tokens_at_once(len(weight_VH))):
            log_p, target = F.linear(h_NH[rows], weight_VH, bias_V).to(fine).log_softmax(-1), targets_N[rows, None]
            losses_N[rows] = -log_p.gather(1, target).squeeze(1)
            if gradient_NH is not None:
                # Of one token and between −1 and 1: float16 holds it without the loss scale, which comes later.
                dlogits = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
                gradient_NH[rows] = dlogits.to(h_NH.dtype) @ weight_VH
                del dlogits
            del log_p  # before the next ones are made
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        out = torch.empty_like(gradient_NH)
        return torch.mul(gradient_NH, dlosses_N[:, None], out=out), None, None, None, None  # in float32, rounded once


def frozen_head(model: nn.Module) -> nn.Linear | None:
    """The output head of a model, in wrappers or not, if `token_losses` can take it.

    None for a head that is trained, quantised, replaced or absent; if the model was seen to do anything to its logits;
    under autocast, and in inference_mode, whose tensors do not count changes.
    """
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)  # of PEFT's models, too
    head = get_head() if callable(get_head) else None
    if type(head) is not nn.Linear or "forward" in vars(head) or not getattr(head, _GIVES_LOGITS, True):
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    is_other_mode = torch.is_autocast_enabled(head.weight.device.type) or torch.is_inference_mode_enabled()
    return None if is_other_mode else head


def try_head(model: nn.Module, head: nn.Linear) -> bool:
    """Whether a model's logits are what its head returns, neither scaled (Cohere), capped (Gemma 2) nor cut to fewer
    words: by a forward pass of two tokens, once for each head."""
    if not hasattr(head, _GIVES_LOGITS):
        device = head.weight.device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        returned: list[_Place] = []

        def as_ever(hidden: Tensor) -> Tensor:
            logits = F.linear(hidden, head.weight, head.bias)
            if hidden.shape[:-1] == ids.shape and not torch.is_autocast_enabled(device.type):
                returned.append(_place(logits))
            return logits

        own_random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), own_random_state, _forward_of(head, as_ever):
            logits = model(input_ids=ids, use_cache=False).logits
        setattr(head, _GIVES_LOGITS, returned == [_place(logits)])
    return bool(getattr(head, _GIVES_LOGITS))


def token_losses(model: nn.Module, head: nn.Linear, targets_BT: Tensor, **inputs: Any) -> Tensor | None:
    """A model's cross-entropy (B, T) float32 at `targets_BT`, 0 where they are `IGNORED`, by its `frozen_head`.

    During the forward pass the head returns losses (B, T, 1) in place of logits, to whoever calls it: also to another
    thread.  None if the model does not pass them on as they are.
    """
    if not try_head(model, head):
        return None
    targets_N = targets_BT.flatten()
    supervised = supervised_tokens(targets_N)  # before anything is queued
    returned: list[_Place] = []

    def losses_for_logits(h_BTH: Tensor) -> Tensor:
        losses = head_losses(h_BTH.flatten(0, 1), head, targets_N, supervised).view(*targets_BT.shape, 1)
        returned.append(_place(losses))
        return losses

    with _forward_of(head, losses_for_logits):
        losses = model(**inputs, use_cache=False).logits
    if returned != [_place(losses)]:
        setattr(head, _GIVES_LOGITS, False)
        return None
    return losses[..., 0]  # not `returned`: hooks of ZeRO-3 on the way belong to the graph


@contextlib.contextmanager
def _forward_of(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del head.forward


@dataclass(frozen=True)
class _Place:
    """The numbers that a tensor had, and where: two are equal if one tensor is the other, or a view of all of it, and
    nobody has written to it since."""

    tensor: Tensor = field(compare=False)  # while it lives nobody else gets its memory
    place: tuple[Any, ...]


def _place(tensor: Tensor) -> _Place:
    return _Place(tensor, (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version))
