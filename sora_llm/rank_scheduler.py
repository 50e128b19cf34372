"""The adaptive threshold for loops of your own: brings adapters down to a rank budget, step by step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sora_llm.budget import ADAPTIVE
from sora_llm.distributed.collectives import gather_integers, gather_objects
from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import on_cpu
from sora_llm.inject import adapter_parameters, refuse_sharded
from sora_llm.optim import GATES, IMPORTANCE, STEPS_TAKEN, ProxAdamW
from sora_llm.pipeline import balanced_values, gated_adapters, model_budget, require_equal_adapters
from sora_llm.sparsity_controller import SparsityController
from sora_llm.values import is_integer
from sora_llm.wrappers import unwrapped

DENSE_STEPS = "rank_scheduler_dense_steps"
"""Option of the gates' groups, beside STEPS_TAKEN: when their form changes, or changed."""
WRITES = "RankScheduler writes parameters"


class RankScheduler:
    """Brings the adapters of an injected model down to a rank budget while they are trained, as `sora_llm.train` does
    by default:

        optimizer = ProxAdamW(parameter_groups(model, learning_rate=2e-4, gate_lr=1e-2))
        RankScheduler(model, optimizer, target_rank=16, dense_steps=100, sparsify_steps=300)
        ...  # 400 optimizer steps
        consensus_prune(model, target_rank=16)

    It follows the steps of the optimizer by itself (hooks before and after `optimizer.step`): accumulated batches and
    skipped steps do not count.  Its state is in the optimizer's, which saves and loads it; a resumed loop makes both
    again, in any order.

    Nothing is pruned in the first `dense_steps`.  Then every ΔW is put into singular components, one per slot, with
    gates of 1: the parameters are the same objects with other values, and AdamW starts afresh (a learning rate that
    ramps up there avoids a jump; averages of weights such as EMA have to start later).  From then on a gate survives a
    step while |g| · σ/√(I + O) is above the quantile, over all modules, that keeps what a cubic schedule asks for.
    After `sparsify_steps` that is a little more than the budget (1 % or a component, and what comes back in one step of
    the gates), and stays so until `consensus_prune` cuts to the budget itself; give it the same target and `min_rank`.

    The gates' rate decides how fast components gain or lose weight; a run's is 1e-2, scaled by the schedule of the
    learning rate.  In short runs a higher one may be better (benchmarks/LOG.md).

    On several processes, under DDP, all processes of the default group take every step, and none alone (no `join`).
    They compare their settings at the first step, the adapter's bits at the change of form, and the number of kept
    parameters at every step of pruning.

    Args:
        model: with gated adapters; a DistributedDataParallel or compiled one, too.
        optimizer: a ProxAdamW of `parameter_groups(model, …)`, or a wrapper of it, such as accelerate's.  The gates'
            "threshold" and "sparse_lambda" are set at every step.
        target_rank: the budget as mean rank, weighted by I + O; or `target_params`: as a number of parameters.
        dense_steps: optimizer steps before pruning begins, at least 1: at first B is 0, and pruning would be blind.
        sparsify_steps: optimizer steps of pruning, at least 1.
        min_rank: ranks that every module keeps.

    Raises:
        UserError: a model without gated adapters or one that FSDP or DeepSpeed has sharded (also from the optimizer's
            step), another optimizer or one with another scheduler or a λ of its own, frozen gates, an invalid budget or
            number of steps; from the optimizer's step, a state with other dense_steps or without importance.
        RunFailed: from the optimizer's step: processes differ, nothing was learned, or gates are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        target_rank: float | None = None,
        target_params: int | None = None,
        *,
        dense_steps: int,
        sparsify_steps: int,
        min_rank: int = 0,
    ) -> None:
        for name, value in (("dense_steps", dense_steps), ("sparsify_steps", sparsify_steps)):
            if not is_integer(value) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be an integer from 1")
        refuse_sharded(model, WRITES)
        self._model = unwrapped(model)
        layers = gated_adapters(self._model)
        budgets = model_budget(layers, target_rank, target_params, min_rank)
        if not budgets:
            raise UserError("RankScheduler needs a budget; give target_rank or target_params")
        inner = _prox_adamw(optimizer)
        self._parameters = adapter_parameters(self._model)
        self._gates = {name: layer.gate for name, layer in layers.items() if layer.gate is not None}
        _check_groups(self._parameters, inner)
        self._dense_steps, self._sparsify_steps = dense_steps, sparsify_steps
        self._controller = SparsityController(ADAPTIVE, budgets, None)
        self._is_agreed = False
        for group in _gate_groups(inner):  # it may have loaded a state that has them
            group.setdefault(STEPS_TAKEN, 0)
            group.setdefault(DENSE_STEPS, dense_steps)
        self._optimizer = weakref.ref(inner)  # which holds this scheduler, and is free after the cut
        inner.rank_scheduler = self
        inner.register_step_pre_hook(self._before_step)
        inner.register_step_post_hook(self._after_step)

    @property
    def steps_taken(self) -> int:
        """The number of optimizer steps taken, those before a resume included."""
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer is gone"
        return _steps_taken(optimizer)

    @torch._disable_dynamo  # in a step that is compiled, too
    def _before_step(self, optimizer: ProxAdamW, *_: Any) -> None:
        """Set the threshold of the step that follows (collective)."""
        if any(getattr(gate, "was_cut", False) for gate in self._gates.values()):
            return  # the optimizer will say so
        if not self._is_agreed:  # not on creation, which may precede the process group and wrappers
            refuse_sharded(self._model, WRITES)
            self._require_equal_settings(optimizer)
        steps, threshold = _steps_taken(optimizer), 0.0
        if (made_with := _gate_groups(optimizer)[0][DENSE_STEPS]) != self._dense_steps:
            raise UserError(
                f"the optimizer's state is from a RankScheduler with dense_steps {made_with}, not {self._dense_steps}"
            )
        if steps >= self._dense_steps:
            progress = min(1.0, (steps - self._dense_steps + 1) / self._sparsify_steps)
            threshold = self._choose(optimizer, progress)
        for group in _gate_groups(optimizer):
            group.update({"threshold": ADAPTIVE, "sparse_lambda": threshold})

    def _choose(self, optimizer: ProxAdamW, progress: float) -> float:
        """The threshold of a step of pruning (collective)."""
        gates = on_cpu(self._gates)
        states = {name: optimizer.state.get(gate, {}) for name, gate in self._gates.items()}
        is_finite = all(bool(gate.isfinite().all()) for gate in gates.values())
        is_whole = all(IMPORTANCE in state for state in states.values())
        group = _gate_groups(optimizer)[0]
        device, rate = group["params"][0].device, float(group["lr"])
        found = gather_integers([group[STEPS_TAKEN], is_finite, is_whole], device)
        if not all(other[1] for other in found):
            raise RunFailed("gates are not finite; lower the learning rate, or skip steps whose loss is not finite")
        if not all(other[2] for other in found):
            raise UserError(
                f"after {group[STEPS_TAKEN]} steps the optimizer's state should hold the importance of every gate, and "
                "does not: load the one that was saved with the model"
            )
        if any(other[0] != found[0][0] for other in found):
            raise RunFailed(f"processes have taken different numbers of steps: {[other[0] for other in found]}")
        self._controller.importance = on_cpu({name: state[IMPORTANCE] for name, state in states.items()})
        chosen = self._controller.choose(gates, progress, device, gate_lr=rate)
        assert isinstance(chosen, dict), "there is one budget"
        return next(iter(chosen.values()))

    @torch._disable_dynamo
    def _after_step(self, optimizer: ProxAdamW, *_: Any) -> None:
        """Count the step; after the last dense one, change the form of the adapters (collective)."""
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler calls fused optimizers to skip the step inside
        if found_inf is not None and bool(found_inf):
            return
        steps = _steps_taken(optimizer) + 1
        if steps == self._dense_steps:
            self._balance(optimizer)
        for group in _gate_groups(optimizer):
            group[STEPS_TAKEN] = steps

    def _require_equal_settings(self, optimizer: ProxAdamW) -> None:
        budget = self._controller.budgets[0]
        named = {"dense_steps": self._dense_steps, "sparsify_steps": self._sparsify_steps, "budget": budget.params}
        named |= {"min_rank": budget.min_rank, "steps taken": _steps_taken(optimizer)}
        first, *others = gather_objects(named)
        for process, other in enumerate(others, start=1):
            if other != first:
                raise RunFailed(f"RankScheduler differs between processes: 0 has {first}, {process} has {other}")
        self._is_agreed = True

    def _balance(self, optimizer: ProxAdamW) -> None:
        parameters = self._parameters
        require_equal_adapters(self._model)
        values, importance = balanced_values(
            gated_adapters(self._model),
            {name: optimizer.master(parameter).cpu() for name, parameter in parameters.items()},
            budgets=self._controller.budgets,
            device=next(iter(parameters.values())).device,
            remedy="take more dense_steps, or raise the learning rate",
        )
        optimizer.restore(
            {parameters[name]: value for name, value in values.items()},
            {parameters[name.removesuffix(f".{IMPORTANCE}")]: {IMPORTANCE: v} for name, v in importance.items()},
        )


def _gate_groups(optimizer: ProxAdamW) -> list[dict[str, Any]]:
    """Read each time: an optimizer that loads a state gets new groups."""
    return [group for group in optimizer.param_groups if group.get("name") == GATES]


def _steps_taken(optimizer: ProxAdamW) -> int:
    return int(_gate_groups(optimizer)[0][STEPS_TAKEN])


def _prox_adamw(optimizer: Any) -> ProxAdamW:
    """The ProxAdamW in wrappers such as accelerate's."""
    inner = optimizer
    while not isinstance(inner, ProxAdamW):
        if not hasattr(inner, "optimizer"):
            raise UserError(f"RankScheduler needs a ProxAdamW, not {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner


def _check_groups(parameters: Mapping[str, nn.Parameter], optimizer: ProxAdamW) -> None:
    """UserError unless the optimizer trains all of an adapter's parameters, and nobody else sets the thresholds."""
    groups = _gate_groups(optimizer)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    gates = {gate for group in groups for gate in group["params"]}
    for name, parameter in parameters.items():
        if parameter not in held or (name.endswith(".gate") and parameter not in gates):
            raise UserError(f"the optimizer does not hold {name} as it should: make it from parameter_groups(model, …)")
        if not parameter.requires_grad:
            raise UserError(
                f"{name} is frozen, so it could not be pruned: train it, or leave its module out of target_modules"
            )
    if any(group.get("deferred", False) for group in groups):
        raise UserError("the optimizer's gates are deferred, so that no step prunes them; leave out deferred=True")
    if optimizer.rank_scheduler is not None:
        raise UserError("this optimizer already has a RankScheduler; make a new optimizer and its scheduler")
    if any(STEPS_TAKEN not in group and group["sparse_lambda"] > 0 for group in groups):
        raise UserError("a RankScheduler sets sparse_lambda at every step; leave it out of parameter_groups")
