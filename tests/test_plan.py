"""The numbers of a plan: when adapters take another form, how far gates can travel, how many evaluations count."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from torch import nn

from sora_llm import schedule
from sora_llm.config import Config, Output, Sora, Train
from sora_llm.errors import UserError
from sora_llm.running.config_warnings import config_warnings
from sora_llm.running.plan import Plan, Stage, make_plan
from sora_llm.running.summary import pruning_in_words
from sora_llm.topology import ALONE


def stage(
    steps: int, dense: float = 0.1, cut: float = 0.4, warmup: float = 0.03, kind: str = "cosine", **others: Any
) -> Stage:
    settings = Train(warmup_ratio=warmup, lr_scheduler_type=kind)  # type: ignore[arg-type]
    options: dict[str, Any] = {"gate_lr": 0.01, "is_adaptive": True, **others}
    return Stage(None, schedule.phases(steps, dense, cut), Fraction(str(warmup)), settings, **options)


@pytest.mark.parametrize(
    ("steps", "first_pruning_step", "changes", "can_prune"),
    [
        (3, 1, (1,), False),  # the only step before the cut has the rate 0
        (4, 1, (1,), False),
        (5, 2, (2,), True),  # what step 2 learns is cut at once
        (7, 2, (2,), True),
        (8, 2, (2, 3), True),
        (100, 10, (10, 40), True),
    ],
)
def test_gates_are_weighed_when_something_is_learned_and_the_cut_comes_once(
    steps: int, first_pruning_step: int, changes: tuple[int, ...], can_prune: bool
) -> None:
    planned = stage(steps, starts_blank=True)
    assert (planned.first_pruning_step, planned.form_changes) == (first_pruning_step, changes)
    assert planned.can_prune == can_prune
    assert stage(steps).can_prune, "an adapter that was trained before has components"
    assert [step for step in range(steps) if planned.is_pruning(step)] == list(
        range(first_pruning_step, int(0.4 * steps))
    )


def test_without_quantiles_gates_are_pruned_from_the_phase_s_first_step_and_cut_where_a_finetune_phase_follows() -> (
    None
):
    fixed = stage(20, is_adaptive=False)
    assert (fixed.first_pruning_step, fixed.form_changes) == (2, (8,))
    to_the_end = stage(20, cut=1.0)
    assert to_the_end.form_changes == (2,) and not to_the_end.cuts_early
    assert stage(1, 0, 1.0, 0, starts_blank=True).can_prune
    assert not stage(1, 0, 1.0, starts_blank=True).can_prune, "its one step has the rate 0"


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1), (0.03, 2), (0.3, 2)])
def test_no_gate_is_pruned_while_the_product_is_0(warmup: float, first: int) -> None:
    """None has a gradient then, and all would shrink alike; B of a warm start, or of a path's later stage, is not 0."""
    options: dict[str, Any] = {"dense": 0.0, "cut": 1.0, "warmup": warmup, "is_adaptive": False}
    blank, warm = (stage(10, starts_blank=is_blank, **options) for is_blank in (True, False))
    assert [step for step in range(10) if blank.is_pruning(step)] == list(range(first, 10))
    assert [step for step in range(10) if warm.is_pruning(step)] == list(range(10))


def test_gates_travel_by_their_rate_over_the_window() -> None:
    assert stage(100, warmup=0, kind="constant", gate_lr=0.05).gate_travel == pytest.approx(0.05 * 30)
    assert stage(100, dense=0, cut=1, warmup=0, kind="linear", gate_lr=2.0).gate_travel == pytest.approx(2 * 50.5)


@pytest.mark.parametrize(
    ("stages", "eval_steps", "expected"),
    [
        ([stage(100)], 10, 5),  # after 50, 60 … 90: at 40 the cut is still to come, at 100 there is nothing to end
        ([stage(100)], 100, 0),
        ([stage(100)], 7, 9),
        ([stage(20, 0.5, 1.0), stage(20, 0.0, 1.0)], 5, 3),  # of a path from each stage's window on: 25, 30, 35
    ],
)
def test_evaluations_that_patience_can_end_something_after(stages: list[Stage], eval_steps: int, expected: int) -> None:
    plan = Plan(Config(), "none", 1, tuple(stages), ())
    assert plan.most_evaluations(eval_steps) == expected


@pytest.mark.parametrize(
    ("options", "when", "what"),
    [
        ({"sparse_lambda": 0.1}, "pruning in no step", "this run prunes nothing"),
        (
            {"sparse_lambda": 0.1, "lambda_schedule": "linear", "lambda_num": 2, "max_lambda": 0.2},
            "pruning in no step",
            "the first stage prunes nothing",
        ),
        ({"target_rank": 4}, "pruned by the cut alone, at step 1", "only the cut brings the adapters to the budget"),
        (
            {"target_rank": 4, "threshold": "decoupled"},
            "pruned by the cut alone, at step 1",
            "only the cut brings the adapters to the budget",
        ),
    ],
)
def test_a_window_of_one_step_in_which_nothing_was_learned_is_said(
    options: dict[str, Any], when: str, what: str
) -> None:
    """Two steps, the first of which is the window; a third one would be pruned in."""
    short, long = planned(2, consensus_at=0.5, **options), planned(4, consensus_at=0.5, **options)
    assert pruning_in_words(short.stages[0]) == when and pruning_in_words(long.stages[0]) == "pruning in steps 2–2"
    assert [what in line for line in said(short)] == [True] and said(long) == []


def test_a_run_that_is_too_short_is_told_of_a_length_that_prunes() -> None:
    with pytest.raises(UserError, match=r"the sparsify phase has no step: 3 steps, .*train for 7 steps"):
        planned(3, sparse_lambda=0.1, consensus_at=0.3)
    (told,) = planned(7, sparse_lambda=0.1, consensus_at=0.3).stages
    assert any(map(told.is_pruning, range(7)))


def test_a_warm_up_is_a_share_of_the_steps_or_a_number_of_them() -> None:
    in_float = 0.07 * 100  # 7.000000000000001
    assert in_float > 7 and warmed_up(100, warmup_ratio=0.07).warmup_steps == 7, "the ratio is the decimal as written"
    by_ratio, by_number = warmed_up(100, warmup_ratio=0.2), warmed_up(100, warmup_steps=20)
    assert by_ratio.warmup_steps == by_number.warmup_steps == 20
    rates = [[stage.rates(step) for step in range(100)] for stage in (by_ratio, by_number)]
    assert rates[0] == rates[1], "ramps after a change take the same share of what is left"
    assert warmed_up(100, warmup_steps=0).rates(0)["learning_rate"] == Train().learning_rate
    with pytest.raises(UserError, match=r"train\.warmup_steps 101 exceeds the 100 steps of training"):
        warmed_up(100, warmup_steps=101)


def test_after_each_change_of_form_the_rate_ramps_up_again() -> None:
    """By the warm-up's share of what is left: of 90 steps 9, of 60 steps 6."""
    planned, whole = stage(100, warmup=0.1, kind="constant"), Train().learning_rate
    assert planned.form_changes == (10, 40)
    rates = [planned.rates(step)["learning_rate"] / whole for step in range(100)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(10)])
    assert rates[10:19] == pytest.approx([(step + 1) / 10 for step in range(9)])
    assert rates[40:46] == pytest.approx([(step + 1) / 7 for step in range(6)])
    assert rates[19:40] + rates[46:] == [1.0] * 75


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_falling_rate_ends_where_it_is_told_to_and_gates_travel_as_far(kind: str) -> None:
    """Also in the sum that `gate_lr: auto` is made from."""
    untold = stage(100, cut=1.0, kind=kind, is_adaptive=False)
    told = replace(untold, settings=replace(untold.settings, min_lr_ratio=0.2))
    shares = [told.rates(step)["learning_rate"] / Train().learning_rate for step in range(100)]
    plain = [untold.rates(step)["learning_rate"] / Train().learning_rate for step in range(100)]
    assert shares[:4] == plain[:4], "the warm-up is the same"
    assert shares[3:] == pytest.approx([0.2 + 0.8 * share for share in plain[3:]])
    assert told.gate_travel == pytest.approx(0.01 * sum(shares[10:]))


def warmed_up(steps: int, **train: Any) -> Stage:
    """The only stage of a run to a budget."""
    (only,) = planned(steps, target_rank=4, consensus_at=0.4, train=Train(max_steps=steps, **train)).stages
    return only


@pytest.mark.parametrize(
    ("gate_lr", "threshold", "moves"),
    [(0.012, "decoupled", "0.90"), (0.014, "decoupled", None), (0.001, "proxgen", None)],
)
def test_gates_that_cannot_get_to_0_are_warned_of(gate_lr: float, threshold: str, moves: str | None) -> None:
    """Adam moves a gate by up to 0.6 or 0.7 in the 50 steps, the prox by half of that; proxgen's τ has no bound."""
    constant = Train(max_steps=50, warmup_ratio=0.0, lr_scheduler_type="constant")
    options = {"sparse_lambda": 0.5, "threshold": threshold, "gate_lr": gate_lr, "consensus_at": 1.0}
    found = said(planned(50, constant, **options), "none can get from 1 to 0")
    assert [f"gates can move by {moves} in this run" in line for line in found] == [True] * (moves is not None)


@pytest.mark.parametrize(("gate_lr", "is_warned"), [(0.019, True), (0.021, False)])
def test_gates_that_need_their_gradient_to_get_to_0_are_warned_of(gate_lr: float, is_warned: bool) -> None:
    """The prox alone moves a gate by half of 0.95 or 1.05; Adam can add all of it."""
    constant = Train(max_steps=50, warmup_ratio=0.0, lr_scheduler_type="constant")
    plan = planned(50, constant, sparse_lambda=0.5, threshold="decoupled", gate_lr=gate_lr, consensus_at=1.0)
    assert not said(plan, "none can get from 1 to 0")
    assert bool(said(plan, "the gates' learning rate adds up to 0.95")) == is_warned
    plan = planned(50, constant, sparse_lambda=3.0, threshold="decoupled", gate_lr=gate_lr, consensus_at=1.0)
    assert not said(plan, "the gates' learning rate adds up"), "the prox alone takes every gate there"


def test_a_run_without_a_penalty_does_not_say_that_it_prunes() -> None:
    plan = planned(50, sparse_lambda=0.0, consensus_at=1.0, gate_lr=1e-30)
    assert pruning_in_words(plan.stages[0]) == "pruning in no step (λ is 0)"


def planned(steps: int, train: Train | None = None, **sora: Any) -> Plan:
    """Of a run that learns, unless `train` says otherwise, and prunes from its first step on."""
    config = Config(
        sora=Sora(**{"r": 8, "dense_ratio": 0.0, "target_rank": None, **sora}),
        train=train or Train(max_steps=steps, warmup_ratio=0.0),
        output=Output(output_dir="run"),
    )
    return make_plan(config, "none", ALONE, lambda _: steps, {"layer": (16, 16)})


def said(plan: Plan, about: str = "the sparsify phase ends before pruning can begin") -> list[str]:
    return [line for line in config_warnings(plan, nn.Linear(1, 1)) if about in line]
