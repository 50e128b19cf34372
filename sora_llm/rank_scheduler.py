"""The adaptive threshold for loops of your own: brings adapters down to a rank budget, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sora_llm.budget import ADAPTIVE
from sora_llm.distributed.collectives import gather_objects
from sora_llm.errors import RunFailed, UserError
from sora_llm.inject import adapter_parameters, gate_values, on_cpu, refuse_sharded, unwrapped
from sora_llm.optim import GATES, IMPORTANCE, ProxAdamW
from sora_llm.pipeline import balanced_values, gated_adapters, model_budget, require_equal_adapters
from sora_llm.sparsity_controller import SparsityController
from sora_llm.values import is_integer

STEPS_TAKEN = "rank_scheduler_steps"
"""Option of the gates' groups, which an optimizer saves and loads: the number of its steps."""
WRITES = "RankScheduler writes parameters"


class RankScheduler:
    """Brings the adapters of an injected model down to a rank budget while they are trained, as `sora_llm.train` does
    by default:

        optimizer = ProxAdamW(parameter_groups(model, learning_rate=2e-4, gate_lr=1e-2))
        RankScheduler(model, optimizer, target_rank=16, dense_steps=100, sparsify_steps=300)
        ...  # 400 optimizer steps
        consensus_prune(model, target_rank=16)

    It follows the steps of the optimizer by itself (hooks before and after `optimizer.step`), so accumulated batches
    and skipped steps are none of its business, and its state is saved and loaded with the optimizer's.

    Nothing is pruned in the first `dense_steps`.  Then every ΔW is put into singular components, one per slot, with
    gates of 1: the parameters are the same objects with other values, and AdamW starts afresh (a learning rate that
    ramps up there avoids a jump; averages of weights such as EMA have to start later).  From then on a gate survives a
    step while |g| · σ/√(I + O) is above the quantile, over all modules, that keeps what a cubic schedule asks for.
    After `sparsify_steps` that is a little more than the budget, 1 % or a component, and stays so until
    `consensus_prune` cuts to the budget itself; give it the same target and `min_rank`.

    Gates only decide which components go next, so `gate_lr` may be small: a run's is 1e-2, scaled by the schedule of
    the learning rate.  On several processes, under DDP, that all hold the same adapter is checked.

    Args:
        model: with gated adapters; a DistributedDataParallel or compiled one, too.
        optimizer: a ProxAdamW with all of its adapters, or a wrapper of it, such as accelerate's.  The gates'
            "threshold" becomes "adaptive", and their "sparse_lambda" is set at every step.
        target_rank: the budget as mean rank, weighted by I + O; or `target_params`: as a number of parameters.
        dense_steps: optimizer steps before pruning begins, at least 1: at first B is 0, and pruning would be blind.
        sparsify_steps: optimizer steps of pruning, at least 1.
        min_rank: ranks that every module keeps.

    Raises:
        UserError: a model without gated adapters or one that FSDP or DeepSpeed has sharded, another optimizer or one
            with another scheduler, frozen gates, or an invalid budget or number of steps.
        RunFailed: from the optimizer's step: processes hold different adapters or settings, nothing was learned, or
            gates are not finite.
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
        self._model = unwrapped(model)
        refuse_sharded(self._model, WRITES)
        layers = gated_adapters(self._model)
        budgets = model_budget(layers, target_rank, target_params, min_rank)
        if not budgets:
            raise UserError("RankScheduler needs a budget; give target_rank or target_params")
        self._optimizer = _prox_adamw(optimizer)
        _check_groups(self._model, self._optimizer)
        self._dense_steps, self._sparsify_steps = dense_steps, sparsify_steps
        self._controller = SparsityController(ADAPTIVE, budgets, None)
        self._is_agreed = False
        for group in self._gate_groups:  # it may have loaded a state that has them
            group.setdefault(STEPS_TAKEN, 0)
        self._optimizer.rank_scheduler = self
        self._optimizer.register_step_pre_hook(self._before_step)
        self._optimizer.register_step_post_hook(self._after_step)

    @property
    def steps_taken(self) -> int:
        """The number of optimizer steps taken, those before a resume included."""
        return int(self._gate_groups[0][STEPS_TAKEN])

    @property
    def _gate_groups(self) -> list[dict[str, Any]]:
        """Read each time: an optimizer that loads a state gets new groups."""
        return [group for group in self._optimizer.param_groups if group.get("name") == GATES]

    def _before_step(self, *_: Any) -> None:
        """Set the threshold of the step that follows (collective)."""
        if not self._is_agreed:  # not on creation, which may precede the process group
            self._require_equal_settings()
        gates = gate_values(self._model)
        if not gates:
            return  # they have been cut, and the optimizer will say so
        threshold = 0.0
        if self.steps_taken >= self._dense_steps:
            if not all(bool(gate.isfinite().all()) for gate in gates.values()):
                raise RunFailed("gates are not finite; lower the learning rate, or skip steps whose loss is not finite")
            group = self._gate_groups[0]
            progress = min(1.0, (self.steps_taken - self._dense_steps + 1) / self._sparsify_steps)
            self._controller.importance = self._importance()
            device, rate = group["params"][0].device, float(group["lr"])
            chosen = self._controller.choose(gates, progress, device, gate_lr=rate)
            assert isinstance(chosen, dict), "there is one budget"
            threshold = next(iter(chosen.values()))
        for group in self._gate_groups:
            group.update({"threshold": ADAPTIVE, "sparse_lambda": threshold})

    def _require_equal_settings(self) -> None:
        budget = self._controller.budgets[0]
        named = {"dense_steps": self._dense_steps, "sparsify_steps": self._sparsify_steps, "budget": budget.params}
        named |= {"min_rank": budget.min_rank, "steps taken": self.steps_taken}
        first, *others = gather_objects(named)
        for process, other in enumerate(others, start=1):
            if other != first:
                raise RunFailed(f"RankScheduler differs between processes: 0 has {first}, {process} has {other}")
        self._is_agreed = True

    def _after_step(self, *_: Any) -> None:
        """Count the step; after the last dense one, change the form of the adapters (collective)."""
        steps = self.steps_taken + 1
        for group in self._gate_groups:
            group[STEPS_TAKEN] = steps
        if steps == self._dense_steps:
            self._balance()

    def _balance(self) -> None:
        refuse_sharded(self._model, WRITES)  # it may have been sharded since
        parameters = adapter_parameters(self._model)
        require_equal_adapters(self._model)
        values, importance = balanced_values(
            gated_adapters(self._model),
            {name: self._optimizer.master(parameter).cpu() for name, parameter in parameters.items()},
            budgets=self._controller.budgets,
            device=next(iter(parameters.values())).device,
            remedy="take more dense_steps, or raise the learning rate",
        )
        self._optimizer.restart(
            {parameters[name]: value for name, value in values.items()},
            {parameters[name.removesuffix(f".{IMPORTANCE}")]: value for name, value in importance.items()},
        )

    def _importance(self) -> dict[str, torch.Tensor]:
        """{module: (R,)}, from the optimizer's state."""
        gates = {name: layer.gate for name, layer in gated_adapters(self._model).items() if layer.gate is not None}
        states = {name: self._optimizer.state.get(gate, {}) for name, gate in gates.items()}
        if any(IMPORTANCE not in state for state in states.values()):
            raise UserError(
                f"after {self.steps_taken} steps the optimizer's state should hold the importance of every gate, and "
                "does not: load the one that was saved with the model"
            )
        return on_cpu({name: state[IMPORTANCE] for name, state in states.items()})


def _prox_adamw(optimizer: Any) -> ProxAdamW:
    """The ProxAdamW in wrappers such as accelerate's."""
    inner = optimizer
    while not isinstance(inner, ProxAdamW):
        if not hasattr(inner, "optimizer"):
            raise UserError(f"RankScheduler needs a ProxAdamW, not {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner


def _check_groups(model: nn.Module, optimizer: ProxAdamW) -> None:
    """UserError unless the optimizer trains all adapters of the model, and no other scheduler their gates."""
    parameters = adapter_parameters(model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if parameter not in held]
    if missing:
        raise UserError(f"the optimizer does not hold {missing[0]}: make it from parameter_groups(model, …)")
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise UserError(
                f"{name} is frozen, so it could not be pruned: train it, or leave its module out of target_modules"
            )
    if any(group.get("deferred", False) for group in optimizer.param_groups):
        raise UserError("the optimizer's gates are deferred, so that no step prunes them; leave out deferred=True")
    if optimizer.rank_scheduler is not None:
        raise UserError("this optimizer already has a RankScheduler; make a new optimizer and its scheduler")
