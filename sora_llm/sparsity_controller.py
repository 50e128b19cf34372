"""Steers a run to its sparsity: a fixed λ, or the λ or threshold that a rank budget needs at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from sora_llm.distributed.collectives import gather_integers
from sora_llm.errors import RunFailed
from sora_llm.factors import kept_ranks
from sora_llm.sora import hard_threshold

DEAD_GATE_MOVE = 1 / 3
"""Standard deviation of the step of a dead gate, in units of its learning rate.  From noise alone Adam would make it
0.23; measured in four runs: 0.33 to 0.65 (benchmarks/LOG.md).  The least of them, as what comes back too much is tiny
and dropped by the cut, and what does not come back is missing there."""


class SparsityController:
    """Chooses λ (`decoupled`, by feedback) or τ (`adaptive`, by quantile) of each step of the sparsify window.

    `lambdas` is the feedback's memory, one λ per budget; `importance` {module: (R,)} is what `adaptive` weighs gates
    with.  Both belong in checkpoints.  Without budgets λ is `sparse_lambda` throughout.
    """

    def __init__(self, threshold: str, budgets: Sequence[RankBudget], sparse_lambda: float | None) -> None:
        self.budgets = tuple(budgets)
        self.lambdas = {budget.name: LAMBDA_START for budget in budgets}
        self.importance: Mapping[str, Tensor] = {}
        self._threshold, self._sparse_lambda = threshold, sparse_lambda
        self._wanted: dict[str, float] = {}
        self._applied: dict[str, float] = {}

    @property
    def is_adaptive(self) -> bool:
        """Whether gates are cut by a quantile of their own values, not by λ."""
        return bool(self.budgets) and self._threshold == ADAPTIVE

    def choose(
        self,
        gates: Mapping[str, Tensor],
        progress: float,
        device: torch.device | str,
        *,
        gate_lr: float | None = None,
        num_steps: int = 1,
    ) -> float | dict[str, float]:
        """λ of the step at `progress` ∈ (0, 1] of the window, as Engine.set_rates takes it (collective).

        `gates` are those before the step, and `gate_lr` is the step's: a gate at 0 moves by about that much in it.
        Without `gate_lr`, `gates` are the ones to be cut.  λ holds for `num_steps` steps, the last of which is at
        `progress`.

        Raises:
            RunFailed: processes count different numbers of kept parameters.
        """
        if not self.budgets:
            assert self._sparse_lambda is not None
            return self._sparse_lambda
        kept = self._agreed(gates, device)
        for budget in self.budgets:
            wanted = budget.wanted(progress, QUANTILE_GOAL if self.is_adaptive else CONTROLLED_GOAL)
            self._wanted[budget.name] = wanted
            if self.is_adaptive:
                self._applied[budget.name] = self._quantile(gates, budget, wanted, gate_lr)
            else:
                found = next_lambda(self.lambdas[budget.name], kept[budget.name], wanted, budget.full, num_steps)
                self.lambdas[budget.name] = found
                # Steps without a prox revive slots, so consensus always cuts from above.
                self._applied[budget.name] = 0.0 if kept[budget.name] < budget.params else found
        return self.chosen

    @property
    def chosen(self) -> float | dict[str, float]:
        """The last result of `choose`; 0 before its first call."""
        if not self.budgets:
            return self._sparse_lambda or 0.0
        return {budget.name: self._applied.get(budget.name, 0.0) for budget in self.budgets}

    def _quantile(self, gates: Mapping[str, Tensor], budget: RankBudget, wanted: float, gate_lr: float | None) -> float:
        values = {name: gates[name].abs().cpu() * self.importance[name] for name in budget.costs}
        moves = None
        if gate_lr is not None:
            moves = {name: DEAD_GATE_MOVE * gate_lr * self.importance[name] for name in budget.costs}
        return quantile_threshold(values, budget, wanted, moves)

    def cut(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`gates` {module: (R,)} cut by the thresholds chosen last (`adaptive`)."""
        cut = {}
        for budget in self.budgets:
            for name in budget.costs:
                importance = self.importance[name].to(gates[name].device)
                cut[name] = hard_threshold(gates[name], importance, self._applied[budget.name])
        return cut

    def _agreed(self, gates: Mapping[str, Tensor], device: torch.device | str) -> dict[str, int]:
        """Kept parameters per budget, which must be the same on all processes: they steer the gates by them."""
        counts = kept_ranks(gates)
        own = [budget.kept(counts) for budget in self.budgets]
        for process, other in enumerate(found := gather_integers(own, device)):
            if other != found[0]:
                raise RunFailed(
                    f"process {process} counts {sum(other):,} kept parameters and process 0 {sum(found[0]):,}: they "
                    "hold different gates; restart from the last checkpoint and check the memory of their machines"
                )
        return {budget.name: kept for budget, kept in zip(self.budgets, own, strict=True)}

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of metrics.jsonl for the step chosen last: λ or the threshold, and the budget's target."""
        if not self.budgets:
            return {"lambda": self._sparse_lambda}
        total_cost = sum(sum(budget.costs.values()) for budget in self.budgets)
        name = "threshold" if self.is_adaptive else "lambda"
        line: dict[str, Any] = {"budget_params": sum(budget.params for budget in self.budgets)}
        if not self._wanted:  # in the first round of local updates
            return line
        line["target_mean_rank"] = sum(self._wanted.values()) / total_cost
        if len(self.budgets) == 1:
            line[name] = next(iter(self._applied.values()))
        else:
            line[f"{name}s"] = dict(self._applied)
        return line

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores apart from the tensors."""
        return {"lambdas": self.lambdas, "applied": self._applied, "wanted": self._wanted}

    def load(self, state: Mapping[str, Any], importance: Mapping[str, Tensor]) -> None:
        """Restore `state` and `importance`."""
        self.lambdas.update(state["lambdas"])
        self._applied.update(state["applied"])
        self._wanted.update(state["wanted"])
        self.importance = importance
