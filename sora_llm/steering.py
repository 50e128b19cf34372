"""What leads a run to its sparsity: one λ, or the λ or threshold of each step that a rank budget asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sora_llm.budget import (
    ADAPTIVE,
    CONTROLLED_GOAL,
    LAMBDA_START,
    QUANTILE_GOAL,
    RankBudget,
    next_lambda,
    quantile_threshold,
)
from sora_llm.consensus import kept_ranks
from sora_llm.distributed import Engine, gather_integers
from sora_llm.errors import RunFailed

SURE_MOVE = 0.1
"""What Adam moves a gate in one step at the least, in units of the learning rate, for nearly all of them."""


class Steering:
    """Chooses λ (`decoupled`, by feedback) or τ (`adaptive`, by quantile) of each step of the sparsify window.

    `lambdas` is the feedback's memory, one λ per budget; `importance` {module: (R,)} is what `adaptive` weighs gates
    with.  Both belong into checkpoints.  Without budgets λ is `sparse_lambda` throughout.
    """

    def __init__(self, threshold: str, budgets: Sequence[RankBudget], sparse_lambda: float | None) -> None:
        self.budgets = tuple(budgets)
        self.lambdas = {budget.name: LAMBDA_START for budget in budgets}
        self.importance: Mapping[str, Tensor] = {}
        self._threshold, self._sparse_lambda = threshold, sparse_lambda
        self._wanted: dict[str, float] = {}
        self._applied: dict[str, float] = {}

    def choose(self, engine: Engine, place: float, gate_lr: float) -> float | dict[str, float]:
        """λ of the step at `place` ∈ (0, 1] of the window, as Engine.set_rates takes it (collective).

        `gate_lr` is the step's: a gate that is 0 before it moves about so far in it.

        Raises:
            RunFailed: processes count different gates.
        """
        if not self.budgets:
            assert self._sparse_lambda is not None
            return self._sparse_lambda
        gates = engine.gates()
        kept = self._agreed(gates, engine)
        for budget in self.budgets:
            adaptive = self._threshold == ADAPTIVE
            wanted = budget.wanted(place, QUANTILE_GOAL if adaptive else CONTROLLED_GOAL)
            self._wanted[budget.name] = wanted
            if adaptive:
                values = {name: gates[name].abs() * self.importance[name] for name in budget.costs}
                within_reach = {name: SURE_MOVE * gate_lr * self.importance[name] for name in budget.costs}
                self._applied[budget.name] = quantile_threshold(values, budget, wanted, within_reach)
            else:
                found = next_lambda(self.lambdas[budget.name], kept[budget.name], wanted, budget.full)
                self.lambdas[budget.name] = found
                # Steps without a prox revive slots, so consensus always cuts from above.
                self._applied[budget.name] = 0.0 if kept[budget.name] < budget.params else found
        return dict(self._applied)

    def _agreed(self, gates: Mapping[str, Tensor], engine: Engine) -> dict[str, int]:
        """Kept parameters per budget: every process must lead the gates by the same numbers."""
        counts = kept_ranks(gates)
        own = [budget.kept(counts) for budget in self.budgets]
        for process, other in enumerate(found := gather_integers(own, engine.device)):
            if other != found[0]:
                raise RunFailed(
                    f"process {process} counts {other} kept parameters and process 0 {found[0]}; restart from the last "
                    "checkpoint and look at the memory of the machine named"
                )
        return {budget.name: kept for budget, kept in zip(self.budgets, own, strict=True)}

    @property
    def fields(self) -> dict[str, Any]:
        """What metrics.jsonl says of the step chosen last: λ or the threshold, and what the budget asked for."""
        if not self.budgets:
            return {"lambda": self._sparse_lambda}
        total_cost = sum(sum(budget.costs.values()) for budget in self.budgets)
        adaptive = self._threshold == ADAPTIVE
        name = "threshold" if adaptive else "lambda"
        line: dict[str, Any] = {
            "target_mean_rank": sum(self._wanted.values()) / total_cost,
            "budget_params": sum(budget.params for budget in self.budgets),
        }
        if len(self.budgets) == 1:
            line[name] = next(iter(self._applied.values()))
        else:
            line[f"{name}s"] = dict(self._applied)
        return line

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {"lambdas": self.lambdas}

    def load(self, state: Mapping[str, Any], importance: Mapping[str, Tensor]) -> None:
        """Put back `state` and `importance`."""
        self.lambdas.update(state["lambdas"])
        self.importance = importance
