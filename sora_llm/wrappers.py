"""The model inside the wrappers that torch.compile and data parallelism put around it."""

from __future__ import annotations

from torch import nn

_OF_DATA_PARALLELISM = frozenset(
    {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
)
"""Names of the classes, or of a parent, that hold the model as `module` and compute what it computes.  Not any module
with such an attribute: a model of one's own may have a part of that name, and other parts beside it."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers, whose modules have the names of the base's."""
    return layers_of(model)[-1]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The wrappers of a model, outermost first, and the model inside."""
    layers = [model]
    while (inner := _inside(layers[-1])) is not None:
        layers.append(inner)
    return layers


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None of a model."""
    is_parallel = any(parent.__name__ in _OF_DATA_PARALLELISM for parent in type(model).__mro__)
    inner = getattr(model, "module" if is_parallel else "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None
