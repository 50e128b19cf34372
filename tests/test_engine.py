"""An engine of one process: what a step leaves where no token has passed."""

from __future__ import annotations

import torch
from helpers import randomise_all, tiny_llama

from sora_llm.causal_loss import causal_loss_sum
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.inject import adapters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.topology import World


def test_an_adapter_that_no_token_passes_is_thresholded_counted_and_saved_like_the_others() -> None:
    """As under ZeRO, whose flat gradients are 0 there (an expert that no token of a step was sent to)."""
    model = inject_sora(tiny_llama(), r=4)
    randomise_all(model, size=0.1)
    optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2, sparse_lambda=0.5))
    engine = Engine(make_accelerator("none", World(1, 0, 0)), model, optimizer, "none", 1.0)
    name, unpassed = next(iter(adapters(model).items()))
    before = engine.gates()[name]
    for _ in range(2):
        ids = torch.arange(12)[None]
        engine.backward(causal_loss_sum(engine.model, ids, ids) / 11)
        for parameter in unpassed.parameters(recurse=False):
            parameter.grad = None
        assert not engine.step().skipped
    state, num_steps = engine.optimizer_state()
    assert num_steps == 2
    assert not state[f"{name}.gate.exp_avg"].any() and not state[f"{name}.lora_A.exp_avg_sq"].any()
    assert (engine.gates()[name].abs() < before.abs()).all(), "soft-thresholded"
