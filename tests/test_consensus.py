"""Cuts keep what the budget's rule names and lose what they say."""

import numpy as np
import pytest
import torch
from helpers import gaussian, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import allocate_reference, fold_slots, outer_products

from sora_llm.consensus import cut_slots, cut_svd, joined
from sora_llm.errors import UserError

# ----- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [[1.0, 0.0, -0.3, 2.0], [0.0] * 4, [1.0] * 4, [0.0, 0.0, 0.0, -5.0]])
def test_cutting_by_slots_is_the_references_pruning(gate):
    A, B, g = gaussian(4, 6), gaussian(5, 4, seed=1), torch.tensor(gate, dtype=torch.float64)
    (found_A, found_B), (expected_A, expected_B) = cut_slots({"m": (A, B, g)})[0]["m"], fold_slots(A, B, g)
    assert found_A.shape == expected_A.shape and found_B.shape == expected_B.shape
    # √|g| is rounded once on either side; one more rounding in the product
    torch.testing.assert_close(found_A, expected_A, rtol=1e-15, atol=0)
    torch.testing.assert_close(found_B, expected_B, rtol=1e-15, atol=0)
    torch.testing.assert_close(found_B @ found_A, B @ torch.diag(g) @ A, rtol=1e-12, atol=1e-13)


def test_cutting_treats_modules_apart_and_leaves_ungated_ones_as_they_are():
    A, B = gaussian(2, 3), gaussian(4, 2, seed=1)
    cut, _ = cut_slots({"gated": (A, B, torch.tensor([0.0, 1.0]).double()), "plain": (A, B, None)})
    assert list(cut) == ["gated", "plain"]
    assert torch.equal(cut["gated"][0], A[1:]) and torch.equal(cut["gated"][1], B[:, 1:])
    assert torch.equal(cut["plain"][0], A) and torch.equal(cut["plain"][1], B)


# ----- cutting to a budget, a tolerance, or what is alive -------------------------------------------------------------

properties = settings(max_examples=60)
METHODS = {"slots": cut_slots, "svd": cut_svd}
methods = pytest.mark.parametrize("method", METHODS)
S = {"first": 0.5, "second": 2.0, "narrow": 1.0}


@st.composite
def adapters(draw):
    """Up to three modules; "narrow" has more slots than its layer has rank."""
    names = draw(st.lists(st.sampled_from(sorted(S)), min_size=1, max_size=3, unique=True))
    shapes = {"first": (4, 7, 5), "second": (5, 6, 6), "narrow": (8, 3, 9)}
    return random_factors(draw(st.integers(0, 10**6)), {name: shapes[name] for name in names})


def costs_of(factors):
    return {name: A.shape[1] + B.shape[0] for name, (A, B, _) in factors.items()}


def caps_of(factors):
    return {name: min(A.shape[1], B.shape[0]) for name, (A, B, _) in factors.items()}


def products(factors):
    return {name: outer_products(*adapter, S[name]) for name, adapter in factors.items()}


def plain_products(cut):
    return {name: outer_products(A, B, None, S[name]) for name, (A, B) in cut.items()}


def squared_error(one, two):
    return sum(float(((one[name] - two[name]) ** 2).sum()) for name in one)


def kept_cost(cut, factors):
    caps = caps_of(factors)
    return sum(cost * min(len(cut[name][0]), caps[name]) for name, cost in costs_of(factors).items())


def slot_worth(factors, name):
    """Of every live slot, the energy of its own product; and its index."""
    A, B, g = factors[name]
    live = [i for i in range(len(g)) if g[i] != 0]
    return [
        float((outer_products(A[i : i + 1], B[:, i : i + 1], g[i : i + 1], S[name]) ** 2).sum()) for i in live
    ], live


@properties
@given(adapters(), st.floats(0, 1.1), st.integers(0, 2))
def test_a_budget_keeps_the_truncated_svds_that_the_reference_names(factors, share, min_rank):
    """Against dense SVDs: who is kept, the factors' product, the error, the bookkeeping."""
    svds = {name: np.linalg.svd(product) for name, product in products(factors).items()}
    num_live = {name: int((sigma > 1e-9 * sigma[0]).sum()) for name, (_, sigma, _) in svds.items()}
    energies = {name: [float(value) ** 2 for value in svds[name][1][: num_live[name]]] for name in factors}
    costs = costs_of(factors)
    served = sum(costs[name] * min(min_rank, num_live[name]) for name in factors)
    live_cost = sum(costs[name] * num_live[name] for name in factors)
    budget = max(served, int(share * live_cost))
    cut, report = cut_svd(factors, S, budget, min_rank)

    expected = {name: len(kept) for name, kept in allocate_reference(energies, costs, budget, min_rank).items()}
    assert report.ranks == expected == {name: len(A) for name, (A, _) in cut.items()}
    best = {
        name: U[:, : expected[name]] * sigma[: expected[name]] @ Vt[: expected[name]]
        for name, (U, sigma, Vt) in svds.items()
    }
    total = sum(map(sum, energies.values()))
    # float64; a near tie of singular values costs some digits of the vectors
    assert squared_error(plain_products(cut), best) <= 1e-20 * total
    dropped = sum(sum(values[expected[name] :]) for name, values in energies.items())
    assert report.energy == pytest.approx(total, rel=1e-12)
    assert report.dropped_energy == pytest.approx(dropped, rel=1e-10, abs=1e-14 * total)
    assert squared_error(plain_products(cut), products(factors)) == pytest.approx(dropped, rel=1e-9, abs=1e-14 * total)
    assert report.kept_params == kept_cost(cut, factors) == budget - report.unspent
    assert report.shortfall == max(0, budget - live_cost)


@properties
@given(adapters(), st.floats(0, 1.1), st.integers(0, 2))
def test_a_budget_keeps_the_slots_that_the_reference_names(factors, share, min_rank):
    worth = {name: slot_worth(factors, name) for name in factors}
    costs, caps = costs_of(factors), caps_of(factors)
    energies = {name: values for name, (values, _) in worth.items()}

    def cost(counts):
        return sum(costs[name] * min(count, caps[name]) for name, count in counts.items())

    live_cost = cost({name: len(values) for name, values in energies.items()})
    served = cost({name: min(min_rank, len(values)) for name, values in energies.items()})
    budget = max(served, int(share * live_cost))
    cut, report = cut_slots(factors, S, budget, min_rank)

    chosen = allocate_reference(energies, costs, budget, min_rank, caps)
    for name, (A, B, g) in factors.items():
        kept = [worth[name][1][i] for i in chosen[name]]
        expected_A, expected_B = fold_slots(A[kept], B[:, kept], g[kept])
        torch.testing.assert_close(cut[name][0], expected_A, rtol=1e-15, atol=0)
        torch.testing.assert_close(cut[name][1], expected_B, rtol=1e-15, atol=0)
    total = squared_error(products(factors), dict.fromkeys(factors, 0.0))
    error = squared_error(plain_products(cut), products(factors))
    assert report.energy == pytest.approx(total, rel=1e-12)
    assert report.dropped_energy == pytest.approx(error, rel=1e-9, abs=1e-14 * total)
    assert report.ranks == {name: len(A) for name, (A, _) in cut.items()}
    assert report.kept_params == kept_cost(cut, factors) == budget - report.unspent <= budget
    assert report.shortfall == max(0, budget - live_cost)


@properties
@given(adapters())
def test_slots_with_enough_budget_and_without_one_are_plain_pruning_bit_for_bit(factors):
    pruned, report = cut_slots(factors, S)
    live_cost = report.kept_params
    for name, (A, B, g) in factors.items():
        alive = [i for i in range(len(g)) if g[i] != 0]
        root = g[alive].abs().sqrt()
        assert torch.equal(pruned[name][0], root[:, None] * A[alive])
        assert torch.equal(pruned[name][1], B[:, alive] * (g[alive].sign() * root))
    assert (report.dropped_energy, report.unspent, report.shortfall) == (0.0, None, None)
    for budget in (live_cost, live_cost + 3):
        cut, report = cut_slots(factors, S, budget)
        assert all(map(torch.equal, sum(cut.values(), ()), sum(pruned.values(), ())))
        assert (report.dropped_energy, report.unspent, report.shortfall) == (
            0.0,
            budget - live_cost,
            budget - live_cost,
        )


@properties
@given(adapters())
def test_svd_without_a_budget_is_lossless_and_no_larger_than_the_slots(factors):
    cut, report = cut_svd(factors, S)
    expected = products(factors)
    total = squared_error(expected, dict.fromkeys(factors, 0.0))
    assert squared_error(plain_products(cut), expected) <= 1e-24 * total
    assert (report.dropped_energy, report.unspent, report.shortfall) == (0.0, None, None)
    for name, (A, B, g) in factors.items():
        assert report.ranks[name] == min(int((g != 0).sum()), A.shape[1], B.shape[0])


@properties
@given(adapters(), st.floats(0, 0.99))
def test_svd_within_a_tolerance_stays_within_it_and_keeps_no_component_too_many(factors, tolerance):
    cut, report = cut_svd(factors, S, tolerance=tolerance)
    total = squared_error(products(factors), dict.fromkeys(factors, 0.0))
    error = squared_error(plain_products(cut), products(factors))
    assert error == pytest.approx(report.dropped_energy, rel=1e-9, abs=1e-14 * total)
    assert error <= tolerance**2 * total * (1 + 1e-9) + 1e-14 * total
    spared = {
        name: np.linalg.svd(product, compute_uv=False)[: report.ranks[name]]
        for name, product in products(factors).items()
    }
    costs = costs_of(factors)
    if any(map(len, spared.values())):
        name = min((name for name in spared if len(spared[name])), key=lambda name: spared[name][-1] ** 2 / costs[name])
        assert error + spared[name][-1] ** 2 > tolerance**2 * total * (1 - 1e-9)


@properties
@given(adapters(), st.integers(0, 10**6), st.floats(0, 1))
def test_gauge_and_slot_order_do_not_change_what_svd_keeps(factors, seed, share):
    budget = int(share * sum(cost * 4 for cost in costs_of(factors).values()))
    generator = torch.Generator().manual_seed(seed)
    other = {}
    for name, (A, B, g) in factors.items():
        order = torch.randperm(len(g), generator=generator)
        scale = torch.exp(3 * torch.randn(len(g), generator=generator, dtype=torch.float64))
        other[name] = ((A * scale[:, None])[order], (B / scale)[:, order], g[order])
    (one, report), (two, again) = cut_svd(factors, S, budget), cut_svd(other, S, budget)
    assert report.ranks == again.ranks
    assert squared_error(plain_products(one), plain_products(two)) <= 1e-20 * report.energy


def test_slots_are_ranked_by_what_they_add_not_by_their_gates():
    """λ|g| can be cheated by growing A or B: the small gate here carries the large product."""
    A, B, g = torch.tensor([[1.0, 0.0], [0.0, 100.0]]), torch.eye(2), torch.tensor([1.0, 0.1])
    cut, _ = cut_slots({"m": (A, B, g)}, budget=4)
    assert not cut["m"][0][0, 0] and cut["m"][0][0, 1]


@methods
def test_the_scale_weighs_modules_against_each_other(method):
    A, B, g = gaussian(1, 3), gaussian(3, 1, seed=1), torch.ones(1).double()
    factors = {"a": (A, B, g), "b": (A, B, g)}
    for scaling, expected in (({"a": 1.0, "b": 2.0}, [0, 1]), ({"a": 2.0, "b": 1.0}, [1, 0]), (3.0, [1, 0])):
        cut, report = METHODS[method](factors, scaling, 6)
        assert list(report.ranks.values()) == [len(cut["a"][0]), len(cut["b"][0])] == expected


@methods
def test_every_module_counts_also_at_rank_zero(method):
    shapes = {"first": (4, 7, 5), "second": (2, 6, 6)}
    factors = random_factors(0, {"first": shapes["first"]}, dead=0.0) | random_factors(
        1, {"second": shapes["second"]}, dead=1.0
    )
    cut, report = METHODS[method](factors, S, 12 * 2, 1)
    assert report.ranks == {"first": 2, "second": 0}
    assert [t.shape for t in cut["second"]] == [(0, 6), (6, 0)]
    cut, report = METHODS[method](factors, S, 0)
    assert report.ranks == {"first": 0, "second": 0} and report.dropped_energy == pytest.approx(report.energy)


@methods
def test_a_min_rank_beyond_the_budget_is_refused(method):
    factors = random_factors(0, {"first": (4, 7, 5), "second": (2, 6, 6)}, dead=0.0)
    with pytest.raises(UserError, match="min_rank 1 keeps 24 parameters, more than the budget of 23"):
        METHODS[method](factors, S, 23, 1)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cut_factors_have_the_dtype_of_those_given(method, dtype):
    factors = {
        name: tuple(t.to(dtype) for t in adapter)
        for name, adapter in random_factors(0, {"first": (4, 7, 5)}, dead=0.0).items()
    }
    for budget in (None, 24):
        cut, _ = METHODS[method](factors, S, budget)
        assert {t.dtype for t in cut["first"]} == {dtype} and all(t.is_contiguous() for t in cut["first"])


def test_svd_rounds_once():
    factors = {
        name: tuple(t.float() for t in adapter) for name, adapter in random_factors(0, {"first": (4, 7, 5)}).items()
    }
    wide = {name: tuple(t.double() for t in adapter) for name, adapter in factors.items()}
    for found, expected in zip(cut_svd(factors, S, 24)[0]["first"], cut_svd(wide, S, 24)[0]["first"], strict=True):
        assert torch.equal(found, expected.float())


@methods
def test_trained_parameters_are_cut_like_their_values(method):
    factors = random_factors(0, {"first": (4, 7, 5)})
    leaves = {name: tuple(torch.nn.Parameter(t.clone()) for t in adapter) for name, adapter in factors.items()}
    expected, _ = METHODS[method](factors, S, 24)
    found, _ = METHODS[method](leaves, S, 24)
    assert all(map(torch.equal, found["first"], expected["first"]))


def test_a_budget_and_a_tolerance_together_are_refused():
    with pytest.raises(ValueError, match="give one of them"):
        cut_svd(random_factors(0, {"first": (4, 7, 5)}), S, budget=24, tolerance=0.1)


def test_a_module_that_is_not_finite_is_named():
    factors = random_factors(0, {"first": (4, 7, 5), "second": (2, 6, 6)}, dead=0.0)
    factors["second"][1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="second"):
        cut_svd(factors, S)
    for budget in (100, None):
        with pytest.raises(ValueError, match="second"):
            cut_slots(factors, S, budget)
    A, B, _ = factors["second"]
    dead = {**factors, "second": (A, B, torch.zeros(len(A)))}
    assert cut_slots(dead, S)[1].ranks["second"] == 0, "what is dead may hold anything"


def test_cuts_of_several_groups_are_one_of_all_their_modules():
    """The error is that of all ΔW together, not a mean of the groups' own."""
    factors = random_factors(0, {"first": (4, 7, 5), "second": (5, 6, 6)})
    cut, reports = {}, []
    for name, budget in (("first", 25), ("second", 10**6)):
        group, report = cut_svd({name: factors[name]}, S, budget)
        cut |= group
        reports.append(report)
    whole, total = joined(reports), squared_error(products(factors), dict.fromkeys(factors, 0.0))
    error = squared_error(plain_products(cut), products(factors))
    assert whole.dropped_share == pytest.approx(error / total) and error > 0
    assert whole.relative_error == pytest.approx((error / total) ** 0.5)
    assert whole.ranks == {name: len(A) for name, (A, _) in cut.items()}
    assert (whole.kept_params, whole.unspent) == (kept_cost(cut, factors), 25 + 10**6 - kept_cost(cut, factors))
    assert whole.shortfall == reports[1].shortfall > reports[0].shortfall == 0
    assert joined([cut_svd(factors, S)[1]]) == cut_svd(factors, S)[1]


@methods
def test_nothing_is_cut_to_nothing(method):
    cut, report = METHODS[method]({}, S, 5)
    assert (cut, report.ranks, report.energy, report.unspent, report.shortfall) == ({}, {}, 0.0, 5, 5)
