"""What a step does, counted: operations on tensors, and what travels between processes.

`counted_steps` is a worker: steps of a tiny model under a strategy, and every collective of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from helpers import tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_llm.causal_loss import causal_loss_sum
from sora_llm.distributed.collectives import any_process
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.inject import adapter_parameters, adapters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.optimizer_step import StepBatches, train_step
from sora_llm.topology import ZERO_STAGES, deepspeed_config, launched_world

R, NUM_STEPS, NUM_TOKENS = 4, 3, 12
VIEWS = {"view", "t", "transpose", "detach", "unsqueeze", "_unsafe_view", "permute", "alias", "slice", "expand"}
GIVEN = {"allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1, "_reduce_scatter_base_": 1}
"""Which argument of a collective is what this process gives, where it is not the first."""


class CountOps(TorchDispatchMode):
    """Operations that compute something, by name; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS and func.namespace == "aten":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self, *names: str) -> int:
        """Of some operations, or of all."""
        return sum(self.counts[name] for name in names) if names else self.counts.total()


class CountCollectives(TorchDispatchMode):
    """Every call of the process group, whoever makes it (DDP's reducer and DeepSpeed too): (name, bytes).

    The bytes are those of the tensors that this process gives: of an all_gather its own part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            given = args[GIVEN.get(name, 0)]
            self.calls.append((name, sum(t.numel() * t.element_size() for t in _tensors(given))))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def gradient_storages(engine: Engine, rows: list[dict[str, Tensor]]) -> int:
    """In how many pieces of memory the gradients lie after a backward pass; 0 where the engine keeps them."""
    engine.backward(causal_loss_sum(engine.model, **rows[0]) / NUM_TOKENS)
    gradients = [p.grad for p in adapter_parameters(engine.module).values() if p.grad is not None]
    engine.step()
    return len({gradient.untyped_storage().data_ptr() for gradient in gradients})


def counted_steps(strategy: str, r: int = R) -> dict[str, Any]:
    """Collectives of a tiny float32 LLaMA, while it is prepared, in every step, and while it is prepared again after a
    cut to half the ranks; the bytes of what could travel."""
    world = launched_world(os.environ)
    options = None
    if strategy in ZERO_STAGES:
        sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if strategy == "zero3" else None
        options = deepspeed_config(strategy, max_grad_norm=1.0, adapter_dtype="float32", user_config=sharded)
    accelerator = make_accelerator(strategy, world, deepspeed_config=options, timeout_minutes=2)
    model = inject_sora(tiny_llama(), r=r, lora_alpha=16)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    sizes = {
        "adapter_bytes": sum(p.numel() * p.element_size() for p in adapter_parameters(model).values()),
        "frozen_bytes": sum(p.numel() * p.element_size() for p in frozen),
    }
    optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2, sparse_lambda=0.5))
    with CountCollectives() as start:
        engine = Engine(accelerator, model, optimizer, strategy, 1.0)
    steps = []
    for step in range(NUM_STEPS):
        ids = torch.randint(48, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(step + world.process_index))
        rows = [{"input_ids": ids, "labels": ids}]
        tokens = (NUM_TOKENS - 1) * world.num_processes
        with CountCollectives() as seen:
            outcome = train_step(
                engine, StepBatches(rows, tokens, NUM_TOKENS - 1, tokens, tokens), world.num_processes
            )[1]
            any_process(False, engine.device)  # the loop's: was one of us asked to stop?
        assert not outcome.skipped and outcome.grad_norm > 0
        steps.append(seen.calls)
    sizes["gradient_storages"] = gradient_storages(engine, rows)
    with CountCollectives() as accumulated:
        train_step(engine, StepBatches(2 * rows, 2 * tokens, 2 * (NUM_TOKENS - 1), tokens, tokens), world.num_processes)
    sizes["num_parameters"] = len(adapter_parameters(model))
    masters = engine.masters()
    with CountCollectives() as renewed:
        with engine.released(whole=False):
            for name, layer in adapters(model).items():
                layer.cut(masters[f"{name}.lora_A"][: r // 2], masters[f"{name}.lora_B"][:, : r // 2])
        optimizer = ProxAdamW(parameter_groups(model, 1e-3, 1e-2, sparse_lambda=0))
        engine = Engine(accelerator, model, optimizer, strategy, 1.0)
    sizes["cut_bytes"] = sum(value.nbytes for value in engine.masters().values())
    with engine.released():
        pass
    calls = {"start": start.calls, "steps": steps, "accumulated": accumulated.calls, "renewed": renewed.calls}
    return {**sizes, **calls}
