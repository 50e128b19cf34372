"""Frozen 4-bit layers that re-read their weight in the backward pass: under ZeRO-3 it is released after the forward."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def reread_weights_in_backward(model: nn.Module) -> None:
    """Let frozen 4-bit layers re-read their weight in the backward pass, until `keep_weights`.

    bitsandbytes keeps the tensor that the forward pass read (0.50: `ctx.tensors`), which checkpointing does not see.
    ZeRO-3 gathers a weight for each pass of its module and gives the parameter new memory every time: the kept tensors
    would be the whole model, on every process, from a step's forward to its backward pass.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.__class__ = _reading_again(type(module))  # type: ignore[arg-type]  # classes are hashable


def keep_weights(model: nn.Module) -> None:
    """Undo `reread_weights_in_backward`."""
    for module in model.modules():
        if hasattr(module, "reads_again"):
            module.__class__ = type(module).__base__  # type: ignore[assignment]


@functools.lru_cache(maxsize=16)
def _reading_again(kind: type) -> type:
    """A subclass of this kind of 4-bit layer that re-reads its weight."""
    if hasattr(kind, "reads_again"):
        return kind

    @functools.wraps(kind.forward)  # type: ignore[attr-defined]  # its module tells `targets` what it computes
    def forward(self: Any, x: Tensor) -> Tensor:
        product = functools.partial(kind.forward, self)  # type: ignore[attr-defined]
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self, product)
        return product(x)

    return type(kind.__name__, (kind,), {"forward": forward, "reads_again": True})


class _Product(torch.autograd.Function):
    """The output of a 4-bit layer, and dx = dy W; both bit for bit as in bitsandbytes."""

    @staticmethod
    def forward(ctx, x, layer, product):
        y = product(x)
        # The parameter as an attribute: saved for the backward pass, it would be one more tensor that checkpointing has
        # to recompute, and in the state in which ZeRO-3 left it afterwards.
        ctx.weight, ctx.state = layer.weight, layer.weight.quant_state
        ctx.compute_dtype, ctx.dtype = layer.compute_dtype or x.dtype, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from bitsandbytes import functional

        codes = ctx.weight.data.view(-1, 1)
        assert codes.nbytes == -(-math.prod(ctx.state.shape) // 2), "the weight was put away before its backward pass"
        dy = dy.to(ctx.compute_dtype)
        return (dy @ functional.dequantize_4bit(codes, ctx.state).to(dy.dtype)).to(ctx.dtype), None, None
