"""Which layers of a model take an adapter, and why others do not."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sora_llm.errors import UserError

ALL_LINEAR = "all-linear"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""torch modules that read their linear layers' weights directly, bypassing any wrapper."""
NOT_CALLED_IN_TRAINING = ("A_log", "correction_coefs")
"""Attributes of modules that call layers whose weights they read, but not in training: state-space mixers, which hand
them to fused kernels, and Gemma 3n's AltUp, which clamps one."""


def target_linears(model: nn.Module, target_modules: str | Sequence[str] = ALL_LINEAR) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by name, in the model's order.

    `target_modules` is "all-linear" (every nn.Linear, 4-bit and 8-bit ones included, never the output head or the
    layers in `left_out`), or one or several suffixes of module names ("q_proj", "mlp.down_proj").

    Raises:
        UserError: no suffix, one that matches no linear layer or only those in `left_out`, or a model without any.
    """
    found = linear_layers(model)
    without = left_out(model)
    linears = {name: linear for name, linear in found.items() if name not in without}
    if not linears:
        why = "".join(f": no adapter on {name}, {reason}" for name, reason in list(without.items())[:1])
        if not why and any(type(module).__name__ == "Conv1D" for module in model.modules()):
            why = ": its projections are transformers' Conv1D (as in GPT-2), which takes none"
        raise UserError(f"{type(model).__name__} has no linear layers that can take an adapter{why}")
    if target_modules == ALL_LINEAR:
        return linears
    is_list = isinstance(target_modules, Collection) and all(isinstance(suffix, str) for suffix in target_modules)
    if not is_list:
        raise UserError(f"target_modules is {target_modules!r}; it must be {ALL_LINEAR} or suffixes like q_proj")
    suffixes = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not suffixes:
        raise UserError(f"target_modules names no module; use {ALL_LINEAR} or suffixes like q_proj")
    for suffix in suffixes:
        if any(matches(name, [suffix]) for name in linears):
            continue
        for name, reason in without.items():
            if matches(name, [suffix]):
                raise UserError(f"target module {suffix!r} is {name}, {reason}")
        known = sorted({name.rpartition(".")[2] for name in linears})
        several = f"; several are a list: [{', '.join(suffix.replace(',', ' ').split())}]" if "," in suffix else ""
        raise UserError(
            f"target module {suffix!r} matches no linear layer of {type(model).__name__}; it has {', '.join(known)}"
            f"{several}"
        )
    return {name: linear for name, linear in linears.items() if matches(name, suffixes)}


def matches(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name of a module, or its end after a dot, is one of these suffixes."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear by name, except the output head."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] != "lm_head"
    }


def left_out(model: nn.Module) -> dict[str, str]:
    """{linear layer: why no adapter is put on it}, the reason phrased to follow the layer's name."""
    found = linear_layers(model)
    experts, decoder = _names_of_experts(model, found), _name_of_decoder(model)
    reasons = {}
    for name, linear in found.items():
        if not name.startswith(decoder):
            reasons[name] = "which no text passes: it is for other input, such as images"
        elif _is_bypassed(model, name):
            reader = type(parent_of(model, name)).__name__
            reasons[name] = f"whose weight {reader} reads without calling it: an adapter would do nothing there"
        elif not _computes_linear(type(linear)):  # type: ignore[arg-type]  # classes are hashable
            reasons[name] = f"a {type(linear).__name__}, which does not compute a plain linear layer"
        elif name.rpartition(".")[2] in experts:
            reasons[name] = "which PEFT takes for stacked experts in this architecture: it could load no adapter there"
    return reasons


def _name_of_decoder(model: nn.Module) -> str:
    """How the names of the text layers begin, with the dot, of a model that has others; "" if it has none."""
    config = getattr(model, "config", None)
    if config is None or not has_other_inputs(config):
        return ""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()  # type: ignore[operator]
    if embeddings not in list(decoder.modules()):  # get_decoder goes by names of attributes
        return ""
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def has_other_inputs(config: Any) -> bool:
    """Whether a model takes more than text, such as images: its transformers config then holds one for the text."""
    return config.get_text_config() is not config


@functools.lru_cache(maxsize=64)
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class of linear layers computes x Wᵀ + b, however written (Falcon's does, a router's does not)."""
    if kind.forward is nn.Linear.forward or kind.forward.__module__.startswith("bitsandbytes"):
        return True
    with torch.random.fork_rng([]):
        try:
            layer, x = kind(3, 2), torch.randn(4, 3)
            return torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
        except Exception:  # it takes other arguments, or does not return a tensor
            return False


def _is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether a linear layer's weight is used without its forward, by the source of the module that holds it."""
    parent, child = parent_of(model, name), name.rpartition(".")[2]
    if isinstance(parent, READS_WEIGHTS):
        return True
    source = _source_of(type(parent))  # type: ignore[arg-type]  # classes are hashable
    read = rf"(?<!isinstance\()self\.{child}\.weight\b(?!\.(?:dtype|device|shape|data|_?is_\w+)\b)"
    if re.search(read, source) is None:
        return False
    is_called = re.search(rf"self\.{child}\(", source) is not None
    return not is_called or any(hasattr(parent, mark) for mark in NOT_CALLED_IN_TRAINING)


@functools.lru_cache(maxsize=64)
def _source_of(kind: type) -> str:
    """The source of a module's class and of its base classes, where available.  Python parses a whole file for each,
    which takes tens of milliseconds."""
    sources = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):
            sources.append(inspect.getsource(base))
    return "\n".join(sources)


def _names_of_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The last names of layers that PEFT takes for experts.

    In some architectures it reads the former names of experts' layers ("up_proj") as those of the tensors that hold all
    experts, even if a dense layer has the same name (PEFT 0.20, 0.21).
    """
    config = getattr(model, "config", None)
    if config is None or not stacked_weights(model):  # without experts: PEFT's import takes a second
        return set()
    return {last for last in {name.rpartition(".")[2] for name in names} if not _peft_adapts(config, last)}


def _peft_adapts(config: object, name: str) -> bool:
    """Whether PEFT puts a LoRA on a linear layer of this name in a model with this config."""
    from peft import LoraConfig, inject_adapter_in_model

    model, linear = nn.Module(), nn.Linear(1, 1, device="meta")
    model.config = config  # type: ignore[assignment]
    model.add_module(name, linear)
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[name]), model, low_cpu_mem_usage=True)
        except ValueError:
            return False
    return model.get_submodule(name) is not linear


def stacked_weights(model: nn.Module) -> list[str]:
    """The last names of weights that stack several matrices, such as "experts.down_proj": they are not in a linear
    layer, and no adapter is put on them."""
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, CONVOLUTIONS)}
    names = (name for name, p in model.named_parameters() if p.ndim > 2 and id(p) not in convolutions)
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def parent_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the module `name`."""
    return model.get_submodule(name.rpartition(".")[0])
