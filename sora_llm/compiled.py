"""A model's blocks under torch.compile: fewer kernels, and fewer operations issued from Python, for the same
mathematics rounded in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sora_llm.errors import RunFailed, UserError, first_line
from sora_llm.extensions import COMPILER, HEADERS, missing_tools

_GRAPHS_PER_BLOCK = 8
"""Limit on graphs, beyond which torch runs a block as it is.  Blocks whose ranks are all 2 or more share theirs, every
other combination of pruned, rank-1 and larger adapters has its own: up to three, for the first length of sequences, for
all others, and for another batch size."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model: the modules that gradient checkpointing would recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

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
    missing = missing_tools(COMPILER, HEADERS)
    if cuda and find_spec("triton") is None:
        missing["Triton"] = "pip install triton"
    if missing:
        name, remedy = next(iter(missing.items()))
        raise UserError(f"train.torch_compile needs {name}: {remedy}, or leave it out")


class CompiledBlocks:
    """The blocks of `model`, compiled when a training pass first needs them; what was compiled before, for adapters of
    other shapes, is forgotten.

    Only inside `active`: evaluation, generation and export see the model as it is.  They would meet other shapes, each
    of which takes seconds to compile, and their results stay those of any other run.
    """

    def __init__(self, model: nn.Module) -> None:
        torch.compiler.reset()  # old graphs would count towards the limit
        self._compiled: list[tuple[Any, Any]] = [(block, torch.compile(block._call_impl)) for block in blocks(model)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the blocks run compiled.  A backward pass in another thread, as on CUDA, finds the graphs of
        the forward pass; from torch 2.13 on, the options below hold in this thread alone.

        Raises:
            RunFailed: they cannot be compiled.
        """
        options = {
            "recompile_limit": _GRAPHS_PER_BLOCK * len(self._compiled),
            "accumulated_recompile_limit": _GRAPHS_PER_BLOCK * len(self._compiled),
            # Ranks are shapes of parameters: by default each combination of them would be a graph of its own.
            "force_parameter_static_shapes": False,
            "optimize_ddp": False,  # it splits a graph where DDP's buckets end; blocks are small enough to stay whole
        }
        for block, compiled in self._compiled:
            block._compiled_call_impl = compiled  # where nn.Module.compile() puts it
        try:
            with torch._dynamo.config.patch(options):
                yield
        except torch._dynamo.exc.TorchDynamoException as error:
            why = first_line(getattr(error, "inner_exception", error))
            raise RunFailed(
                f"train.torch_compile: blocks could not be compiled ({why}); set it to false, also for a resumed run"
            ) from error
        finally:
            for block, _ in self._compiled:
                block._compiled_call_impl = None
