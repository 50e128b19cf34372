"""One rule finds the model inside its wrappers, for injection, export and the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from sora_llm.causal_loss import takes_columns
from sora_llm.head_loss import frozen_head
from sora_llm.inject import adapters, inject_sora
from sora_llm.wrappers import unwrapped


class DeepSpeedEngine(nn.Module):
    """Wraps as DeepSpeed's does (tests/worlds.py trains in the real one)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: object, **options: object) -> object:
        return self.module(*inputs, **options)


class Pipeline(DeepSpeedEngine):
    """A kind of it."""


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        DeepSpeedEngine,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: Pipeline(compiled(model)),
    ],
    ids=["compile", "data parallelism", "an engine", "both", "in the other order"],
)
def test_whatever_asks_about_the_model_sees_the_one_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_llama().requires_grad_(False)
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    assert frozen_head(wrapped) is model.lm_head and takes_columns(wrapped)


def test_a_model_of_ones_own_may_have_a_part_called_module() -> None:
    own = nn.Sequential()
    own.module, own.score = tiny_llama(), nn.Linear(8, 2)
    assert unwrapped(own) is own
    inject_sora(own, r=2)
    assert all(name.startswith("module.") or name == "score" for name in adapters(own))
    assert not own.score.base_layer.weight.requires_grad, "what is beside that part is frozen as well"
