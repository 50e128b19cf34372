"""A rank budget and how a run reaches it: pure arithmetic on counts, values and costs.

A component of module m costs c_m = I_m + O_m parameters, so that
    kept = Σ c_m · min(#{g ≠ 0}, I_m, O_m)        F = Σ c_m · min(r, I_m, O_m)
are exact integers.  Over the sparsify window, with progress u ∈ (0, 1], kept is steered along
    R*(u) = goal + (F − goal)(1 − u)³
to a goal a little above the budget: consensus cuts to the budget itself, and only from above.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sora_llm.errors import UserError
from sora_llm.factors import Shapes, costs_of

CONTROLLED_GOAL, QUANTILE_GOAL = 1.1, 1.01
"""The goal in units of the budget: feedback swings by a few percent, a quantile by single components."""
GAIN = 1.5
LAMBDA_START, LAMBDA_MIN, LAMBDA_MAX = 0.1, 1e-3, 1.0
"""At λ = 1 the decoupled threshold prunes all noise; above, gates shrink whatever their gradient."""
EVERY_MODULE = "all"
ADAPTIVE = "adaptive"
"""The threshold that needs a budget: a quantile of the gates' importance."""
SPARED = 1e9
"""Importance, in units of the median, of slots that no quantile reaches."""
_NOTHING = 1e-30
"""A threshold passed by every slot that has a component."""


@dataclass(frozen=True)
class RankBudget:
    """The budget of a group of modules: it may keep at most `params` parameters.

    `costs` is {module: I + O}, `caps` {module: min(r, I, O)}; `name` is the pattern that chose the modules.
    """

    name: str
    costs: Mapping[str, int]
    caps: Mapping[str, int]
    params: int
    min_rank: int = 0

    @property
    def full(self) -> int:
        """F: the cost of the group with every slot alive."""
        return sum(cost * self.caps[name] for name, cost in self.costs.items())

    def kept(self, counts: Mapping[str, int]) -> int:
        """Parameters of `counts` {module: live slots}."""
        return sum(cost * min(counts[name], self.caps[name]) for name, cost in self.costs.items())

    def mean_rank(self, params: float) -> float:
        """The cost-weighted mean rank equivalent to `params` parameters."""
        return params / sum(self.costs.values())

    def wanted(self, progress: float, goal_factor: float) -> float:
        """R*(u) at `progress` u; the goal is at least the most expensive component above the budget."""
        goal = min(self.full, max(goal_factor * self.params, self.params + max(self.costs.values())))
        return goal + (self.full - goal) * (1.0 - progress) ** 3


def params_of(mean_rank: float, cost: int) -> int:
    """The parameters that a mean rank allows modules with a total cost of `cost` = Σ (I + O), exact as written."""
    return math.floor(Fraction(str(mean_rank)) * cost)


def make_budgets(
    shapes: Shapes,
    r: int,
    target_rank: float | None,
    target_params: int | None,
    budgets: Mapping[str, float],
    min_rank: int,
    *,
    may_be_empty: bool = False,
    section: str = "sora.",
) -> list[RankBudget]:
    """One budget per pattern of `budgets` (its mean rank), and one for the modules that none of them matches.

    `shapes` is {module: (I, O)}.  The latter share `target_rank`, or what the patterns leave of `target_params`; with
    `may_be_empty` that may be less than one rank.  Errors put `section` before settings that callers without a config
    also have; only configs have patterns.

    Raises:
        UserError: a module that two patterns match, a pattern without modules, or a budget that is less than `min_rank`
            of every module, less than one rank, or more than r of every module.
    """
    owners = _owners_of(budgets, shapes)
    made = []
    for pattern, mean_rank in budgets.items():
        own = {name: shapes[name] for name, owner in owners.items() if owner == pattern}
        made.append(_group(pattern, own, r, params_of(mean_rank, _cost_of(own)), min_rank))
        _check(made[-1], f"sora.budgets {pattern!r}", section)
    rest = {name: shape for name, shape in shapes.items() if name not in owners}
    params, key = _params_of_rest(rest, made, target_rank, target_params, section)
    if rest:
        made.append(_group(EVERY_MODULE, rest, r, params, min_rank))
        _check(made[-1], key, section, may_be_empty=may_be_empty)
    return made


def _owners_of(patterns: Iterable[str], shapes: Shapes) -> dict[str, str]:
    """{module: the pattern that matches it}, for matched modules only; UserError for invalid patterns."""
    owners: dict[str, str] = {}
    if EVERY_MODULE in patterns:
        raise UserError(
            f"sora.budgets: {EVERY_MODULE!r} is the name of the budget for all other modules; as a pattern, write it "
            f"'({EVERY_MODULE})'"
        )
    for pattern in patterns:
        found = [name for name in shapes if _matches(pattern, name)]
        if not found:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            first = next(iter(shapes))
            raise UserError(
                f"sora.budgets: {pattern!r} matches no target module; they end in {ends}, and the first is {first}"
            )
        for name in found:
            if name in owners:
                raise UserError(
                    f"sora.budgets: {name} is matched by {owners[name]!r} and by {pattern!r}; a module belongs to one "
                    "budget, so make one of the patterns narrower"
                )
            owners[name] = pattern
    return owners


def _params_of_rest(
    rest: Shapes, made: Sequence[RankBudget], target_rank: float | None, target_params: int | None, section: str
) -> tuple[int, str]:
    """The parameters for the modules that no pattern matches, given the budgets `made` for the others, and the key that
    sets them; UserError if nothing sets them, or none are left."""
    if target_params is not None:
        taken = sum(budget.params for budget in made)
        if taken > target_params or (rest and taken == target_params):
            raise UserError(
                f"sora.budgets takes {taken:,} of the {target_params:,} parameters of sora.target_params"
                f"{' and leaves none for the other modules' if rest else ''}; raise target_params, or lower the budgets"
            )
        key = f"{section}target_params"
        return target_params - taken, f"what sora.budgets leaves of {key} {target_params:,}" if made else key
    if target_rank is None and rest:
        raise UserError(
            f"sora.budgets does not cover {next(iter(rest))} ({len(rest)} such modules); set {section}target_rank for "
            "them, or add a pattern"
        )
    return params_of(target_rank or 0, _cost_of(rest)), f"{section}target_rank"


def _group(name: str, shapes: Shapes, r: int, params: int, min_rank: int) -> RankBudget:
    caps = {module: min(r, *shape) for module, shape in shapes.items()}
    return RankBudget(name, costs_of(shapes), caps, params, min_rank)


def _cost_of(shapes: Shapes) -> int:
    """Σ (I + O)."""
    return sum(costs_of(shapes).values())


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"sora.budgets: {pattern!r} is not a regular expression ({error})") from None


def _check(group: RankBudget, key: str, section: str, *, may_be_empty: bool = False) -> None:
    """UserError for an invalid budget; `key` is where it was set."""
    if group.params > group.full:
        raise UserError(
            f"{key} is {group.params:,} parameters (mean rank {group.mean_rank(group.params):.4g}), more than the "
            f"{group.full:,} that its modules have before pruning (mean rank {group.mean_rank(group.full):.4g}); lower "
            f"it, or raise {section}r if layers are wider than that"
        )
    floor = sum(cost * min(group.min_rank, group.caps[name]) for name, cost in group.costs.items())
    if group.params < floor:
        raise UserError(
            f"{key} is {group.params:,} parameters, less than the {floor:,} that {section}min_rank {group.min_rank} "
            f"keeps in its modules; raise it, or lower {section}min_rank"
        )
    if group.params < min(group.costs.values()) and not may_be_empty:
        allowed = ", or set output.allow_empty_adapter: true" if section and group.name == EVERY_MODULE else ""
        raise UserError(
            f"{key} is {group.params:,} parameters, less than the {min(group.costs.values()):,} that one rank of its "
            f"smallest module takes, so that nothing would be left; raise it{allowed}"
        )


# ----------------------------------------------------------------------------------------------------- two ways there


def next_lambda(sparse_lambda: float, kept: int, wanted: float, full: int, num_steps: int = 1) -> float:
    """The feedback of `decoupled`: λ ← clip(λ · exp(κ n (kept − R*)/F)), for the next n steps."""
    exponent = GAIN * num_steps * (kept - wanted) / full
    farther_than_the_bounds = math.log(LAMBDA_MAX / LAMBDA_MIN)
    exponent = min(farther_than_the_bounds, max(-farther_than_the_bounds, exponent))
    return min(LAMBDA_MAX, max(LAMBDA_MIN, sparse_lambda * math.exp(exponent)))


def importances(sigmas: Mapping[str, Tensor], budget: RankBudget) -> dict[str, Tensor]:
    """σ_i/√c_m of every slot {module: (R,)}, in units of their median over all slots that are not 0.

    The reciprocal of `adaptive`'s weights w: a slot without a component has importance 0, as does one that alone costs
    more than the budget; otherwise nothing that fits the budget might be left.  The `min_rank` largest of each module's
    descending `sigmas` are spared.
    """
    most = max(budget.params, min(budget.costs.values()))  # for a budget of nothing, which the cut will enforce
    found = {name: sigmas[name].double() / math.sqrt(cost) * (cost <= most) for name, cost in budget.costs.items()}
    live = torch.cat([values[values > 0] for values in found.values()])
    median = float(live.median()) if len(live) else 1.0
    found = {name: values / median for name, values in found.items()}
    for values in found.values():
        values[: budget.min_rank][values[: budget.min_rank] > 0] = SPARED
    return found


def quantile_threshold(
    values: Mapping[str, Tensor], budget: RankBudget, wanted: float, moves: Mapping[str, Tensor] | None = None
) -> float:
    """τ such that the slots with value > τ cost `wanted`, or less than one component more; slots of equal value stay or
    go together, and stay if some of them have to.

    `values` is {module: (R,)}, |g| · importance of each slot.  If all live slots together cost less than `wanted`, none
    of them is cut.  If they cost less than the budget itself, τ lets dead slots come back: `moves` {module: (R,)} is
    the standard deviation of the value that the next step gives a dead slot, and those that exceed τ are expected to
    cost two standard deviations (of their number, at their mean cost) more than is missing, because consensus cuts from
    above.  The living have priority: τ is at most half the value of the weakest.
    """
    flat, cost = _flat(values, budget)
    order = torch.argsort(flat, descending=True, stable=True)
    sorted_values, spent = flat[order], torch.cumsum(cost[order], 0)
    num_live = int((sorted_values > 0).sum())
    live_cost = int(spent[num_live - 1]) if num_live else 0
    weakest_alive = float(sorted_values[num_live - 1]) if num_live else math.inf
    if live_cost < budget.params and moves is not None:
        dead, missing = flat == 0, wanted - live_cost
        ample = missing + 2 * math.sqrt(missing * float(cost[dead].double().mean()))
        return min(weakest_alive / 2, _exceeded_by(_flat(moves, budget)[0][dead], cost[dead], ample))
    num_kept = int(torch.searchsorted(spent, torch.tensor(math.ceil(wanted), dtype=spent.dtype))) + 1
    if num_kept >= num_live:
        return weakest_alive / 2 if num_live else _NOTHING
    weakest_kept, strongest_cut = sorted_values[num_kept - 1 : num_kept + 1].tolist()
    if weakest_kept > strongest_cut:
        return float(strongest_cut)
    weaker = sorted_values[sorted_values < weakest_kept]
    return (weakest_kept + (float(weaker[0]) if len(weaker) else 0.0)) / 2


def _flat(values: Mapping[str, Tensor], budget: RankBudget) -> tuple[Tensor, Tensor]:
    """The values of all slots of a budget's modules in one vector, and the cost of each."""
    flat = torch.cat([values[name].double().cpu() for name in budget.costs])
    cost = torch.cat([torch.full((len(values[name]),), each, dtype=torch.int64) for name, each in budget.costs.items()])
    return flat, cost


def _exceeded_by(deviations: Tensor, cost: Tensor, total_cost: float) -> float:
    """τ such that those |x_i| > τ, x_i ~ N(0, deviations_i²), are expected to cost `total_cost`: by bisection."""
    deviations, cost = deviations[deviations > 0], cost[deviations > 0]
    if int(cost.sum()) <= total_cost:
        return _NOTHING
    low, high = 0.0, 10 * float(deviations.max())
    for _ in range(50):
        tau = (low + high) / 2
        expected = float((cost * torch.erfc(tau / (math.sqrt(2) * deviations))).sum())
        low, high = (tau, high) if expected > total_cost else (low, tau)
    return high
