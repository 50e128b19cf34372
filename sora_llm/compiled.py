"""A model's blocks under torch.compile: fewer kernels, and fewer operations issued from Python, for the same
mathematics in another order of rounding."""

from __future__ import annotations

import contextlib
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sora_llm.errors import UserError

_GRAPHS_PER_BLOCK = 4
"""Limit on the graphs that may be compiled, beyond which a block runs as it is: blocks whose ranks are all 2 or more
share one, every other combination of pruned, rank-1 and larger adapters is a graph of its own."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model: the modules that gradient checkpointing would recompute."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_compilable(model: nn.Module, strategy: str, *, cuda: bool) -> None:
    """UserError if the blocks of `model` (its skeleton is enough) cannot be compiled under `strategy`, or not here."""
    if strategy == "zero3":
        raise UserError("train.torch_compile does not go with zero3, which gathers weights inside blocks; use zero2")
    if not blocks(model):
        raise UserError(
            f"train.torch_compile: {type(model).__name__} has no blocks of transformers' GradientCheckpointingLayer, "
            "which are what is compiled; leave it out"
        )
    tools = {"a C++ compiler": "apt install g++", "Python's headers": "apt install python3-dev"}
    found = {
        "a C++ compiler": any(map(shutil.which, ("g++", "clang++"))),
        "Python's headers": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    }
    if cuda:
        tools["Triton"], found["Triton"] = "pip install triton", find_spec("triton") is not None
    for name in tools:
        if not found[name]:
            raise UserError(f"train.torch_compile needs {name}: {tools[name]}, or leave it out")


class CompiledBlocks:
    """The blocks of `model`, compiled when a training pass first needs them.

    Only inside `active`: evaluation, generation and export see the model as it is.  They would meet other shapes, each
    of which takes seconds to compile, and their results stay those of any other run.
    """

    def __init__(self, model: nn.Module) -> None:
        torch.compiler.reset()  # what an earlier run in this process compiled would count towards the limit
        self._compiled: list[tuple[Any, Any]] = [(block, torch.compile(block._call_impl)) for block in blocks(model)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the blocks run compiled, in both directions."""
        options = {
            "recompile_limit": _GRAPHS_PER_BLOCK * len(self._compiled),
            "accumulated_recompile_limit": _GRAPHS_PER_BLOCK * len(self._compiled),
            # Ranks are shapes of parameters: by default each combination of them would be a graph of its own.
            "force_parameter_static_shapes": False,
            "optimize_ddp": False,  # it refuses autograd functions such as ours
        }
        for block, compiled in self._compiled:
            block._compiled_call_impl = compiled  # where nn.Module.compile() puts it
        try:
            with torch._dynamo.config.patch(options):
                yield
        finally:
            for block, _ in self._compiled:
                block._compiled_call_impl = None
