"""The adaptive threshold for loops of your own: a scheduler that brings adapters down to a rank budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sora_llm.budget import ADAPTIVE
from sora_llm.errors import UserError
from sora_llm.inject import adapter_parameters, gate_values, refuse_sharded, unwrapped
from sora_llm.optim import GATES, IMPORTANCE, ProxAdamW, importance_by_module
from sora_llm.pipeline import balanced_values, gated_adapters, model_budget, require_equal_adapters
from sora_llm.schedule import SPARSIFY, Phases
from sora_llm.sparsity_controller import SparsityController
from sora_llm.values import is_integer

WRITES = "RankScheduler writes parameters"


class RankScheduler:
    """Brings the adapters of an injected model down to a rank budget while they are trained, as `sora_llm.train` does
    by default.  Used like a learning-rate scheduler:

        optimizer = ProxAdamW(parameter_groups(model, learning_rate=2e-4, gate_lr=4 / 300))
        ranks = RankScheduler(model, optimizer, target_rank=16, dense_steps=100, sparsify_steps=300)
        for step in range(400):
            ...
            optimizer.step()
            ranks.step()  # after the step of a learning-rate scheduler
        consensus_prune(model, target_rank=16)

    After `dense_steps` every ΔW is put into singular components, one per slot, with gates of 1: the parameters are the
    same objects with other values, and AdamW starts afresh (a learning rate that ramps up there avoids a jump).  From
    then on a gate survives a step while |g| · σ/√(I + O) is above the quantile, over all modules, that keeps what a
    cubic schedule asks for; it ends 1 % or a component above the budget after `sparsify_steps`, when `consensus_prune`
    should cut to the budget itself.  Before and after, nothing is pruned.  A gate has to be able to move from 1 to 0:
    the gates' rate, summed over `sparsify_steps`, should be about 4.

    On several processes, under DDP, every one of them calls it; that they hold the same adapter is checked.

    Args:
        model: with gated adapters; a DistributedDataParallel or compiled one, too.
        optimizer: a ProxAdamW with the model's gates, or a wrapper of it, such as accelerate's.  Their "threshold"
            becomes "adaptive", and their "sparse_lambda" this scheduler's to set.
        target_rank: the budget as mean rank, weighted by I + O; or `target_params`: as a number of parameters.
        dense_steps: optimizer steps before pruning begins, at least 1: at first B is 0, and pruning would be blind.
        sparsify_steps: optimizer steps of pruning, at least 1.
        min_rank: ranks that every module keeps.

    Raises:
        UserError: a model without gated adapters or one that FSDP or DeepSpeed has sharded, another optimizer, or an
            invalid budget or number of steps.
        RunFailed: from `step`: processes hold different adapters, nothing was learned, or values are not finite.
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
        held = {gate for group in self._gate_groups for gate in group["params"]}
        if held != {layer.gate for layer in layers.values()}:
            raise UserError("the optimizer does not hold the model's gates: make it from parameter_groups(model, …)")
        self._phases = Phases(dense_steps, dense_steps + sparsify_steps, dense_steps + sparsify_steps)
        self._controller = SparsityController(ADAPTIVE, budgets, None)
        self._step = 0
        for group in self._gate_groups:
            group["threshold"] = ADAPTIVE
        self._set_threshold(0.0)

    @property
    def _gate_groups(self) -> list[dict[str, Any]]:
        """Read each time: an optimizer that loads a state gets new groups."""
        return [group for group in self._optimizer.param_groups if group.get("name") == GATES]

    def step(self) -> None:
        """Prepare the next optimizer step; call it after every one (collective)."""
        self._step += 1
        if self._step == self._phases.dense_end:
            self._balance()
        self._choose()

    def state_dict(self) -> dict[str, int]:
        """The number of optimizer steps taken; all else is in the states of the model and of the optimizer."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue after that many optimizer steps; load the model and the optimizer first (collective).

        Raises:
            UserError: the optimizer's state is not that of a run that has begun to prune.
        """
        step = state_dict["step"]
        if self._phases.at(step) == SPARSIFY:
            found = {name: self._optimizer.state.get(p, {}) for name, p in adapter_parameters(self._model).items()}
            self._controller.importance = importance_by_module(
                {f"{name}.{IMPORTANCE}": state[IMPORTANCE] for name, state in found.items() if IMPORTANCE in state}
            )
            if self._controller.importance.keys() != gated_adapters(self._model).keys():
                raise UserError(
                    f"after {step} steps the optimizer's state holds the importance of every gate, but this one does "
                    "not: load the state_dict that was saved at that step, before the scheduler's"
                )
        self._step = step
        self._choose()

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
        self._controller.importance = importance_by_module(importance)

    def _choose(self) -> None:
        """Set the threshold of the next optimizer step."""
        if self._phases.at(self._step) != SPARSIFY:
            self._set_threshold(0.0)
            return
        gated_adapters(self._model)  # an error if they have been cut in the meantime
        group = self._gate_groups[0]
        gates, device = gate_values(self._model), group["params"][0].device
        progress, rate = self._phases.progress(self._step), float(group["lr"])
        chosen = self._controller.choose(gates, progress, device, gate_lr=rate)
        assert isinstance(chosen, dict), "there is one budget"
        self._set_threshold(next(iter(chosen.values())))

    def _set_threshold(self, threshold: float) -> None:
        for group in self._gate_groups:
            group["sparse_lambda"] = threshold


def _prox_adamw(optimizer: Any) -> ProxAdamW:
    """The ProxAdamW in wrappers such as accelerate's."""
    inner = optimizer
    while not isinstance(inner, ProxAdamW):
        if not hasattr(inner, "optimizer"):
            raise UserError(f"RankScheduler needs a ProxAdamW, not {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner
