"""Rank budgets: who shares which, how kept is led to them, and whom a threshold leaves alive."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_llm.budget import (
    CONTROLLED_GOAL,
    LAMBDA_MAX,
    LAMBDA_MIN,
    QUANTILE_GOAL,
    SPARED,
    RankBudget,
    importances,
    make_budgets,
    next_lambda,
    quantile_threshold,
)
from sora_llm.errors import UserError

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (64, 32),
    "model.layers.0.mlp.up_proj": (64, 172),
    "model.layers.1.self_attn.q_proj": (64, 64),
    "model.layers.1.self_attn.k_proj": (64, 32),
    "model.layers.1.mlp.up_proj": (64, 172),
}
COST = sum(map(sum, SHAPES.values()))


def budgets(r=8, target_rank=2.0, target_params=None, patterns=None, min_rank=0):
    return make_budgets(SHAPES, r, target_rank, target_params, patterns or {}, min_rank)


def test_a_mean_rank_is_weighted_by_the_parameters_of_a_rank():
    (budget,) = budgets()
    assert budget.params == 2 * COST and budget.full == 8 * COST
    assert budget.mean_rank(budget.params) == 2.0
    assert budgets(target_rank=0.123)[0].params == 113, "of 113.16: never more than was asked for"
    assert budgets(target_rank=None, target_params=1000)[0].params == 1000


def test_the_least_budget_is_one_rank_of_the_cheapest_module():
    cheapest = min(map(sum, SHAPES.values()))
    assert budgets(target_rank=None, target_params=cheapest)[0].params == cheapest
    with pytest.raises(UserError, match="nothing would be left"):
        budgets(target_rank=None, target_params=cheapest - 1)


def test_patterns_for_all_modules_need_no_other_budget():
    made = budgets(target_rank=None, patterns={"attn": 2, "mlp": 3.5})
    assert [(budget.name, len(budget.costs)) for budget in made] == [("attn", 4), ("mlp", 2)]
    with pytest.raises(UserError, match=r"does not cover model.layers.0.mlp.up_proj \(2 such modules\)"):
        budgets(target_rank=None, patterns={"attn": 2})


def test_a_module_never_counts_for_more_ranks_than_it_can_have():
    (budget,) = budgets(r=40, target_rank=8)
    assert budget.caps["model.layers.0.self_attn.k_proj"] == 32
    assert budget.full == sum((i + o) * min(40, i, o) for i, o in SHAPES.values())
    assert budget.kept(dict.fromkeys(SHAPES, 40)) == budget.full


def test_patterns_have_budgets_of_their_own_and_the_rest_shares_the_target():
    attention, rest = budgets(patterns={r"self_attn\.[qk]_proj": 1})
    assert set(attention.costs) == {name for name in SHAPES if "attn" in name} and attention.name.startswith(
        "self_attn"
    )
    assert attention.params == sum(attention.costs.values())
    assert set(rest.costs) == {name for name in SHAPES if "mlp" in name} and rest.params == 2 * sum(rest.costs.values())
    attention, rest = budgets(target_rank=None, target_params=2000, patterns={r"self_attn": 1})
    assert attention.params + rest.params == 2000, "target_params is the whole adapter's"
    (only,) = budgets(patterns={"layers": 3})
    assert set(only.costs) == set(SHAPES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patterns": {"q_proj": 1, r"layers\.0": 1}}, r"layers\.0\.self_attn\.q_proj is matched by 'q_proj' and by"),
        ({"patterns": {"nothing": 1}}, "'nothing' matches no target module"),
        ({"patterns": {"(": 1}}, "not a regular expression"),
        ({"target_rank": None, "target_params": 10**9}, "more than the"),
        ({"r": 100, "target_rank": 90.0}, "more than the"),  # k_proj has but 32
        ({"min_rank": 3}, "less than the .* that sora.min_rank 3 keeps"),
        ({"target_rank": 0.01}, "less than the 96 that one rank"),
        ({"target_rank": None, "target_params": 500, "patterns": {"q_proj": 8}}, "takes 2,048 of the 500 parameters"),
        ({"target_rank": None, "target_params": 1024, "patterns": {"q_proj": 4}}, "leaves none for the other modules"),
        ({"target_rank": None, "target_params": 700, "patterns": {"self_attn": 8, "mlp": 8}}, "of the 700 parameters"),
        (
            {"target_rank": None, "target_params": 1100, "patterns": {"q_proj": 4}},
            "what sora.budgets leaves",
        ),
    ],
)
def test_budgets_that_cannot_be_are_a_sentence(options, said):
    with pytest.raises(UserError, match=said):
        budgets(**options)


def test_less_than_one_rank_is_a_budget_where_an_empty_adapter_is_one():
    (budget,) = make_budgets(SHAPES, 8, 0.01, None, {}, 0, may_be_empty=True)
    assert 0 <= budget.params < min(budget.costs.values())


def test_the_way_down_starts_near_everything_and_ends_above_the_budget():
    (budget,) = budgets()
    for factor in (CONTROLLED_GOAL, QUANTILE_GOAL):
        wanted = [budget.wanted(step / 50, factor) for step in range(1, 51)]
        assert wanted == sorted(wanted, reverse=True) and wanted[0] < budget.full
        assert (
            budget.params + max(budget.costs.values())
            <= wanted[-1]
            <= factor * budget.params + max(budget.costs.values())
        )
    assert budgets(target_rank=8.0)[0].wanted(1.0, CONTROLLED_GOAL) == 8 * COST, "never above what there is"


def test_the_feedback_raises_lambda_while_too_much_is_kept_and_stays_within_its_bounds():
    assert next_lambda(0.1, 900, 500.0, 1000) == pytest.approx(0.1 * math.exp(1.5 * 0.4))
    assert next_lambda(0.1, 100, 500.0, 1000) == pytest.approx(0.1 * math.exp(-1.5 * 0.4))
    assert next_lambda(LAMBDA_MAX, 1000, 0.0, 1000) == LAMBDA_MAX
    assert next_lambda(LAMBDA_MIN, 0, 1000.0, 1000) == LAMBDA_MIN


def test_importance_is_the_singular_value_per_root_of_its_cost_in_units_of_the_median():
    def found(sigmas: dict[str, list[float]], params: int = 100, min_rank: int = 0) -> dict[str, list[float]]:
        costs = {name: {"a": 4, "b": 9}[name] for name in sigmas}
        budget = RankBudget("all", costs, dict.fromkeys(costs, 3), params, min_rank)
        tensors = {name: torch.tensor(values) for name, values in sigmas.items()}
        return {name: values.tolist() for name, values in importances(tensors, budget).items()}

    some = {"a": [4.0, 2.0, 0.0], "b": [3.0]}
    assert found(some) == {"a": [2.0, 1.0, 0.0], "b": [1.0]}, "the median is 1"
    assert found({"a": [0.0, 0.0]}) == {"a": [0.0, 0.0]}
    spared = found({"a": [4.0, 2.0, 0.0], "b": [0.0]}, min_rank=1)
    assert spared == {"a": [SPARED, 1.0, 0.0], "b": [0.0]}, "what is there is spared"
    assert found(some, params=8)["b"] == [0.0], "a component that alone is more than the budget is for nobody"
    assert any(found(some, params=0)["a"]), "where nothing may stay there is still something to weigh"


@given(data=st.data())
@settings(max_examples=200)
def test_a_threshold_leaves_what_is_wanted_or_less_than_a_component_more(data):
    costs = {f"m{index}": data.draw(st.integers(2, 50)) for index in range(data.draw(st.integers(1, 5)))}
    r = data.draw(st.integers(1, 6))
    value = st.floats(1e-6, 1e3)
    values = {
        name: torch.tensor(data.draw(st.lists(value, min_size=r, max_size=r)), dtype=torch.float64) for name in costs
    }
    everything = torch.cat(list(values.values()))
    if len(everything.unique()) < len(everything):
        return  # equal values stay together
    budget = RankBudget("all", costs, dict.fromkeys(costs, r), params=min(costs.values()))
    wanted = data.draw(st.floats(budget.params, budget.full))
    threshold = quantile_threshold(values, budget, wanted)
    alive = {name: int((values[name] > threshold).sum()) for name in costs}
    kept = budget.kept(alive)
    assert kept >= math.ceil(wanted) or kept == budget.full
    weakest = min((float(values[n][values[n] > threshold].min()), costs[n]) for n in costs if alive[n])
    assert kept - weakest[1] < wanted, "without the weakest of them it would be too little"


@pytest.mark.parametrize("missing", [1, 3, 20])
def test_if_slots_move_as_assumed_hardly_more_come_back_than_are_missing_however_many_are_dead(missing):
    """Fewer would be lost at the cut; once 250 came back for three."""
    generator = torch.Generator().manual_seed(0)
    alive = 100 - missing
    values = {"m": torch.cat([torch.ones(alive), torch.zeros(500)])}
    moves = {"m": torch.rand(alive + 500, generator=generator, dtype=torch.float64)}
    budget = RankBudget("all", {"m": 10}, {"m": alive + 500}, params=1000)
    threshold = quantile_threshold(values, budget, 1000.0, {"m": 1e-3 * moves["m"]})
    draws = 1e-3 * moves["m"][alive:] * torch.randn(1000, 500, generator=generator, dtype=torch.float64)
    revived = (draws.abs() > threshold).sum(1).double()
    assert revived.mean().item() == pytest.approx(missing + 2 * missing**0.5, rel=0.1)
    assert (revived >= missing).double().mean() > 0.9


def test_what_comes_back_is_counted_by_its_cost():
    """Modules of other sizes that move otherwise; n + 2√n slots of the mean cost of the dead."""
    generator = torch.Generator().manual_seed(1)
    costs, dead = {"small": 10, "large": 40}, {"small": 300, "large": 100}
    values = {name: torch.cat([torch.ones(20), torch.zeros(dead[name])]) for name in costs}
    moves = {"small": torch.full((320,), 1e-3, dtype=torch.float64), "large": torch.full((120,), 2e-3).double()}
    live, missing = 20 * 50, 200
    budget = RankBudget("all", costs, {name: len(values[name]) for name in costs}, params=live + missing)
    threshold = quantile_threshold(values, budget, live + missing, moves)
    came_back = sum(
        cost
        * (moves[name][20:] * torch.randn(2000, dead[name], generator=generator).double()).abs().gt(threshold).sum(1)
        for name, cost in costs.items()
    )
    mean_cost = (300 * 10 + 100 * 40) / 400
    assert came_back.double().mean().item() == pytest.approx(missing + 2 * (missing * mean_cost) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("values", "wanted", "kept"),
    [([3, 2, 2, 1], 20, 3), ([3, 2, 2, 0], 20, 3), ([2, 2, 2, 2], 20, 4), ([3, 2, 1, 1], 20, 2)],
)
def test_slots_of_equal_values_stay_together_rather_than_leave_less_than_the_budget(values, wanted, kept):
    """Consensus cuts from above; what a tie cuts below the budget is lost."""
    slots = {f"m{index}": torch.tensor([float(value)]) for index, value in enumerate(values)}
    budget = RankBudget("all", dict.fromkeys(slots, 10), dict.fromkeys(slots, 1), params=20)
    threshold = quantile_threshold(slots, budget, wanted)
    assert sum(int(value > threshold) for (value,) in slots.values()) == kept


def test_below_what_is_wanted_nobody_else_dies_and_below_the_budget_those_come_back_that_are_missing():
    costs, caps = {"a": 10, "b": 10}, {"a": 4, "b": 4}
    values = {"a": torch.tensor([3.0, 2.0, 0.0, 0.0]), "b": torch.tensor([2.5, 0.0, 0.0, 0.0])}
    moves = {"a": torch.tensor([0.3, 0.2, 0.1, 0.04]), "b": torch.tensor([0.3, 0.08, 0.02, 0.0])}
    threshold = quantile_threshold(values, RankBudget("all", costs, caps, params=25), 40.0, moves)
    assert 0.1 < threshold < 2.0, "the living stay, the dead stay dead"
    threshold = quantile_threshold(values, RankBudget("all", costs, caps, params=79), 80.0, moves)
    assert 0 < threshold < 1e-20, "where all are missing a gate that moves is alive; one of importance 0 is not"
