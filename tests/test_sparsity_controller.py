"""What steers a run to its sparsity: the λ or τ of each step, what is said about it, and what a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch

from sora_llm import sparsity_controller
from sora_llm.budget import (
    ADAPTIVE,
    CONTROLLED_GOAL,
    LAMBDA_START,
    QUANTILE_GOAL,
    RankBudget,
    next_lambda,
    quantile_threshold,
)
from sora_llm.errors import RunFailed
from sora_llm.sparsity_controller import DEAD_GATE_MOVE, SparsityController

ATTENTION = RankBudget("attn", {"q": 10, "k": 10}, {"q": 4, "k": 4}, params=40)
MLP = RankBudget("all", {"up": 30}, {"up": 4}, params=60)
GATES = {
    "q": torch.tensor([1.0, -0.8, 0.6, 0.0]),
    "k": torch.tensor([0.9, 0.7, -0.5, 0.3]),
    "up": torch.tensor([1.0, 1.0, -0.5, 0.2]),
}
IMPORTANCE = {
    "q": torch.tensor([4.0, 3.0, 2.0, 0.5]).double(),
    "k": torch.tensor([1.0, 0.5, 0.25, 0.125]).double(),
    "up": torch.tensor([8.0, 4.0, 2.0, 1.0]).double(),
}


def controller(threshold, *budgets, sparse_lambda=None):
    made = SparsityController(threshold, budgets, sparse_lambda)
    made.importance = IMPORTANCE
    return made


def choose(made, progress=0.5, **options):
    return made.choose(GATES, progress, "cpu", **options)


@pytest.mark.parametrize("threshold", ["decoupled", "proxgen", "constant"])
def test_without_a_budget_lambda_is_the_given_one_throughout(threshold):
    made = controller(threshold, sparse_lambda=0.3)
    assert choose(made) == choose(made, progress=1.0) == made.chosen == 0.3
    assert made.fields == {"lambda": 0.3} and not made.is_adaptive


def test_a_run_that_never_prunes_has_a_lambda_of_zero():
    assert SparsityController("decoupled", (), None).chosen == 0.0


def test_lambda_follows_the_kept_parameters_of_each_budget():
    made, before = controller("decoupled", ATTENTION, MLP), dict.fromkeys(("attn", "all"), LAMBDA_START)
    assert made.chosen == {"attn": 0.0, "all": 0.0}, "nothing was chosen yet"
    for progress in (0.2, 0.4, 0.6):
        expected = {
            budget.name: next_lambda(
                before[budget.name], kept, budget.wanted(progress, CONTROLLED_GOAL), budget.full, num_steps=3
            )
            for budget, kept in ((ATTENTION, 70), (MLP, 120))
        }
        assert choose(made, progress, num_steps=3) == made.chosen == made.lambdas == expected
        before = expected
    assert expected["attn"] > LAMBDA_START


def test_below_the_budget_nothing_is_pruned_although_the_feedback_goes_on():
    """Slots have to come back: consensus cuts from above."""
    at_it = RankBudget("all", {"up": 30}, {"up": 4}, params=120)
    above = RankBudget("all", {"up": 30}, {"up": 5}, params=121)
    assert choose(controller("decoupled", at_it), 1.0)["all"] > 0.0
    made = controller("decoupled", above)
    assert choose(made, 1.0) == {"all": 0.0} and made.lambdas["all"] > 0.0


def test_the_threshold_is_the_quantile_of_gates_by_importance():
    made = controller(ADAPTIVE, ATTENTION, MLP)
    chosen = choose(made)
    assert made.is_adaptive
    for budget in (ATTENTION, MLP):
        values = {name: GATES[name].abs() * IMPORTANCE[name] for name in budget.costs}
        assert chosen[budget.name] == quantile_threshold(values, budget, budget.wanted(0.5, QUANTILE_GOAL))
    cut = made.cut(GATES)
    for name, gate in GATES.items():
        alive = gate.abs() * IMPORTANCE[name] > chosen["all" if name == "up" else "attn"]
        assert torch.equal(cut[name], gate * alive), "survivors are not shrunk"
    assert 0 < sum(int((gate == 0).sum()) for gate in cut.values()) < 12


def test_within_a_step_dead_gates_may_come_back_as_far_as_it_moves_them():
    """Below the budget the threshold lies under what the gate's rate can reach from 0."""
    short = RankBudget("attn", {"q": 10, "k": 10}, {"q": 4, "k": 4}, params=80)
    made = controller(ADAPTIVE, short)
    (threshold,) = choose(made, 1.0, gate_lr=0.01).values()
    values = {name: GATES[name].abs() * IMPORTANCE[name] for name in short.costs}
    moves = {name: DEAD_GATE_MOVE * 0.01 * IMPORTANCE[name] for name in short.costs}
    assert 0 < threshold == quantile_threshold(values, short, short.wanted(1.0, QUANTILE_GOAL), moves) < 0.01
    (without,) = choose(made, 1.0).values()
    assert without == pytest.approx(0.3 * 0.125 / 2), "half of the weakest that lives"


def test_the_fields_of_a_line_name_the_target_and_what_was_chosen():
    both, alone = controller(ADAPTIVE, ATTENTION, MLP), controller("decoupled", MLP)
    assert both.fields == {"budget_params": 100} and alone.fields == {"budget_params": 60}, "before the first choice"
    chosen, sparse_lambda = choose(both), choose(alone)
    wanted = ATTENTION.wanted(0.5, QUANTILE_GOAL) + MLP.wanted(0.5, QUANTILE_GOAL)
    assert both.fields == {"budget_params": 100, "target_mean_rank": wanted / 50, "thresholds": chosen}
    target = MLP.wanted(0.5, CONTROLLED_GOAL) / 30
    assert alone.fields == {"budget_params": 60, "target_mean_rank": target, "lambda": sparse_lambda["all"]}


@pytest.mark.parametrize(("threshold", "goal"), [("decoupled", 22.0), (ADAPTIVE, 21.0)])
def test_feedback_stops_a_tenth_above_the_budget_and_a_quantile_a_component(threshold, goal):
    made = SparsityController(threshold, [RankBudget("all", {"m": 10}, {"m": 40}, params=200)], None)
    made.importance = {"m": torch.ones(40)}
    made.choose({"m": torch.linspace(0.1, 1, 40)}, 1.0, "cpu")
    assert made.fields["target_mean_rank"] == pytest.approx(goal)


@pytest.mark.parametrize("threshold", ["decoupled", ADAPTIVE])
def test_a_loaded_state_goes_on_where_the_saved_one_was(threshold):
    first = controller(threshold, ATTENTION, MLP)
    choose(first, 0.3)
    again = SparsityController(threshold, (ATTENTION, MLP), None)
    again.load(first.state(), IMPORTANCE)
    assert again.chosen == first.chosen and again.fields == first.fields
    assert choose(again, 0.6) == choose(first, 0.6)


def test_processes_that_hold_different_gates_are_told_apart(monkeypatch):
    monkeypatch.setattr(sparsity_controller, "gather_integers", lambda own, device: [own, own, [own[0] - 10, own[1]]])
    with pytest.raises(RunFailed, match=r"process 2 counts 180 kept parameters and process 0 190: they hold different"):
        choose(controller("decoupled", ATTENTION, MLP))


def test_noise_alone_would_move_a_gate_less_than_is_assumed():
    """The standard deviation of m̂/√v̂, of gradients that are noise, with Adam's default betas."""
    generator = torch.Generator().manual_seed(0)
    mean, square = torch.zeros(20_000), torch.zeros(20_000)
    for gradient in torch.randn(400, 20_000, generator=generator):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    moves = mean / (square / (1 - 0.999**400)).sqrt()
    assert float(moves.std()) == pytest.approx(0.23, rel=0.05) and float(moves.std()) < DEAD_GATE_MOVE
