"""Whether every token passes every adapter."""

from __future__ import annotations

import torch
from torch import nn

from sora_llm.errors import UserError
from sora_llm.inject import adapters


def check_routing(model: nn.Module) -> None:
    """Raise UserError if a token can miss an adapter, as where experts are layers of their own.

    For processes that average gradients: on each, a step then reaches other adapters.  ZeRO-1 and 2 reduce gradients in
    the order in which they arrive and would add those of different layers to each other, without an error (ΔW was off
    by 23 % after three steps of two processes); DDP and ZeRO-3 would end with an error of their own.  The model is left
    in its mode: in eval mode, some call layers that they do not call in training.
    """
    layers, passed = adapters(model), set()
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: passed.add(name))
        for name, layer in layers.items()
    ]
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)  # one: it cannot pass all experts
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if missed := [name for name in layers if name not in passed]:
        others = f" and {len(missed) - 1:,} others" if len(missed) > 1 else ""
        raise UserError(
            f"a token can miss {missed[0]}{others}, as with experts, and processes cannot average gradients of "
            "different layers: name other layers in sora.target_modules, train with one process, or let each step on "
            "its own (distributed.sync_every above 1, replica process)"
        )
