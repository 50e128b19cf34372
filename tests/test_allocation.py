"""The components are the dense SVD's, and a budget or a tolerance keeps exactly those that the rules name."""

import math

import numpy as np
import pytest
import torch
from helpers import random_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import allocate_reference, outer_products

from sora_llm.allocation import allocate, balanced, components, within_tolerance
from sora_llm.errors import UserError

S = 0.75
properties = settings(max_examples=200)
# (R, I, O); wide, tall, more slots than the layer's own rank, one slot, none
SHAPES = [(3, 7, 5), (4, 5, 9), (9, 4, 6), (9, 6, 4), (5, 5, 5), (1, 3, 2), (2, 1, 1), (0, 4, 3)]


def adapter(shape, seed=0, dead=0.3):
    return random_factors(seed, {"m": shape}, dead)["m"]


def dense(found):
    return (found.U * found.sigma @ found.Vt).numpy()


# ----- components -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_components_are_the_dense_svd_of_the_product(shape, dead):
    factors = adapter(shape, seed=sum(shape), dead=dead)
    product = outer_products(*factors, S)
    found, sigma = components(*factors, S), np.linalg.svd(product, compute_uv=False)
    num_live = int((sigma > 1e-9 * sigma[0]).sum())
    assert num_live == min(int((factors[2] != 0).sum()), *shape[1:])
    assert found.sigma.shape == (num_live,) and found.sigma.dtype == torch.float64
    # float64 over a handful of slots: errors of some 1e-16 of the largest value
    atol = 1e-13 * max(1.0, sigma[0])
    np.testing.assert_allclose(found.sigma.numpy(), sigma[:num_live], rtol=0, atol=atol)
    np.testing.assert_allclose(dense(found), product, rtol=0, atol=atol)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(num_live), atol=1e-13)
    np.testing.assert_allclose(found.Vt @ found.Vt.T, np.eye(num_live), atol=1e-13)
    assert found.energies == [value**2 for value in found.sigma.tolist()]


def test_without_gates_all_slots_count():
    A, B, _ = adapter((3, 7, 5))
    np.testing.assert_allclose(dense(components(A, B, None, S)), S * (B @ A).numpy(), atol=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_entry_of_every_left_vector_is_positive(seed):
    A, B, g = adapter((4, 5, 6), seed, dead=0.0)
    found, flipped = components(A, B, g, S), components(A, -B, g, S)
    for vectors in (found.U, flipped.U):
        assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    np.testing.assert_allclose(flipped.U, found.U, atol=1e-13)
    np.testing.assert_allclose(flipped.Vt, -found.Vt, atol=1e-12)


def test_what_adds_nothing_is_no_component():
    """B at 0 as at the start of training, slots that repeat each other, slots that cancel."""
    A, B, g = adapter((4, 6, 5), dead=0.0)
    assert components(A, torch.zeros_like(B), g, S).sigma.shape == (0,)
    twice = components(torch.cat([A, A]), torch.cat([B, B], dim=1), torch.cat([g, g]), S)
    np.testing.assert_allclose(twice.sigma, 2 * components(A, B, g, S).sigma, rtol=1e-13)
    cancelling = components(torch.cat([A, A[:2]]), torch.cat([B, B[:, :2]], dim=1), torch.cat([g, -g[:2]]), S)
    assert cancelling.sigma.shape == (2,)
    for seed in range(20):  # nothing but rounding is left
        A, B, g = adapter((4, 6, 5), seed, dead=0.0)
        A, B = A * 10 ** (seed - 10), B * 10 ** (seed - 10)
        nothing = components(torch.cat([A, 3 * A]), torch.cat([B, B / 3], dim=1), torch.cat([g, -g]), S)
        assert nothing.sigma.shape == (0,)


def test_a_component_lives_above_a_billionth_of_the_largest():
    eye, sizes = torch.eye(4).double(), torch.tensor([5.0, 1.0, 1e-8, 4e-9]).double()
    torch.testing.assert_close(components(eye, eye, sizes, S).sigma, S * sizes[:3], rtol=1e-6, atol=0)
    tiny = torch.tensor([1e-30, 0.0, 1e-31, 0.0]).double()
    assert components(eye, eye, tiny, S).sigma.shape == (2,), "the bar is relative"


def test_no_matrix_of_the_layers_size_is_formed():
    size = 400_000  # dense it would take 1.2 TiB
    A, B = adapter((2, size, 1))[0], adapter((2, 1, size), seed=1)[1]
    found = components(A, B, None, S)
    expected = S * float(torch.linalg.matrix_norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T))
    assert math.sqrt(sum(found.energies)) == pytest.approx(expected, rel=1e-12)


def test_values_of_dead_slots_do_not_matter_and_live_ones_must_be_finite():
    A, B, g = adapter((3, 5, 4), dead=0.0)
    g[1] = 0
    expected = components(A, B, g, S)
    A[1], B[:, 1] = float("nan"), float("inf")
    assert torch.equal(components(A, B, g, S).U, expected.U)
    g[1] = 1e-3
    with pytest.raises(ValueError, match=r"layer\.q_proj holds values that are not finite"):
        components(A, B, g, S, "layer.q_proj")


def test_low_precision_factors_are_computed_with_in_float64():
    A, B, g = (tensor.bfloat16() for tensor in adapter((3, 7, 5), dead=0.0))
    product = outer_products(A, B, g, S)
    assert np.abs(dense(components(A, B, g, S)) - product).max() < 1e-13 * np.abs(product).max() * 10


@pytest.mark.parametrize("shape", [(4, 6, 5), (9, 5, 6)])
def test_gauge_and_slot_order_do_not_change_the_components(shape):
    A, B, g = adapter(shape, dead=0.0)
    expected = components(A, B, g, S)
    scale = torch.logspace(-6, 6, shape[0]).double() * (-1) ** torch.arange(shape[0])
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
    for other in (
        (A * scale[:, None], B / scale, g),
        (A[order], B[:, order], g[order]),
        (A * g[:, None], B, torch.ones_like(g)),
        (A, B / 8, 8 * g),
    ):
        found = components(*other, S)
        np.testing.assert_allclose(found.sigma, expected.sigma, rtol=1e-11)
        np.testing.assert_allclose(dense(found), dense(expected), rtol=0, atol=1e-10 * float(expected.sigma[0]))


def test_equal_bits_give_equal_bits():
    factors = adapter((6, 9, 8))
    one, two = components(*factors, S), components(*(tensor.clone() for tensor in factors), S)
    assert all(torch.equal(getattr(one, field), getattr(two, field)) for field in ("sigma", "U", "Vt"))


# ----- balanced form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3, 8])
def test_balanced_factors_are_the_product_with_equal_halves_and_empty_slots(rank):
    factors = adapter((3, 7, 5), dead=0.0)
    found = components(*factors, S)
    A, B = balanced(found, S, rank)
    slots = 3 if rank is None else rank
    assert A.shape == (slots, 7) and B.shape == (5, slots) and A.is_contiguous() and B.is_contiguous()
    np.testing.assert_allclose(S * (B @ A), outer_products(*factors, S), atol=1e-12)
    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-12)
    np.testing.assert_allclose((A @ A.T).diagonal()[:3], found.sigma / S, rtol=1e-12)
    assert not A[3:].any() and not B[:, 3:].any()


def test_balanced_factors_of_nothing_have_no_slots_or_empty_ones():
    nothing = components(*adapter((3, 7, 5), dead=1.0), S)
    assert [t.shape for t in balanced(nothing, S)] == [(0, 7), (5, 0)]
    A, B = balanced(nothing, S, 2)
    assert A.shape == (2, 7) and B.shape == (5, 2) and not A.any() and not B.any()


def test_balanced_factors_need_room_and_a_positive_scale():
    found = components(*adapter((3, 7, 5), dead=0.0), S)
    with pytest.raises(ValueError, match="3 components do not fit into 2 slots"):
        balanced(found, S, 2)
    for scaling in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive number"):
            balanced(found, scaling)


def test_a_truncated_svd_is_the_first_components():
    factors = adapter((4, 7, 5), dead=0.0)
    product = outer_products(*factors, S)
    U, sigma, Vt = np.linalg.svd(product)
    kept = components(*factors, S).first(2)
    np.testing.assert_allclose(dense(kept), U[:, :2] * sigma[:2] @ Vt[:2], atol=1e-12)
    assert ((dense(kept) - product) ** 2).sum() == pytest.approx((sigma[2:] ** 2).sum(), rel=1e-12)


# ----- a budget -------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, equal_costs=False, with_caps=False):
    """Small integers, so that ties happen: energies, costs, budget, min_rank that the budget allows, caps."""
    names = ["b", "a", "c", "d"][: draw(st.integers(1, 4))]
    energies = {name: draw(st.lists(st.integers(0, 12), max_size=6)) for name in names}
    one = draw(st.integers(1, 9))
    costs = {name: one if equal_costs else draw(st.integers(1, 9)) for name in names}
    caps = {name: draw(st.integers(1, 4)) for name in names} if with_caps else None
    min_rank = draw(st.integers(0, 3))
    served = cost({name: values[:min_rank] for name, values in energies.items()}, costs, caps)
    everything = cost(energies, costs, caps)
    budget = draw(st.integers(served, everything + 5))
    return energies, costs, budget, min_rank, caps


def cost(kept, costs, caps=None):
    return sum(costs[name] * min(len(indices), caps[name] if caps else 99) for name, indices in kept.items())


def left_out(kept, energies):
    return [name for name, values in energies.items() if len(kept[name]) < len(values)]


@properties
@given(st.one_of(problems(), problems(with_caps=True)))
def test_a_budget_keeps_what_the_reference_keeps(problem):
    assert allocate(*problem) == allocate_reference(*problem)


@properties
@given(st.one_of(problems(), problems(with_caps=True)))
def test_a_budget_is_never_exceeded_and_what_stays_unspent_would_buy_nothing(problem):
    energies, costs, budget, min_rank, caps = problem
    kept = allocate(*problem)
    unspent = budget - cost(kept, costs, caps)
    assert unspent >= 0
    assert all(unspent < costs[name] for name in left_out(kept, energies))
    for name, values in energies.items():
        assert len(kept[name]) >= min(min_rank, len(values))
        assert kept[name] == sorted(set(kept[name]))
        worst = min((values[i] for i in kept[name]), default=math.inf)
        assert all(values[i] <= worst for i in set(range(len(values))) - set(kept[name]))


@properties
@given(problems(equal_costs=True))
def test_a_budget_is_met_exactly_where_all_costs_are_equal(problem):
    energies, costs, budget, _, _ = problem
    one = next(iter(costs.values()))
    live = sum(map(len, energies.values()))
    assert sum(map(len, allocate(*problem).values())) == min(live, budget // one)


@properties
@given(problems())
def test_tensors_and_lists_are_allocated_alike(problem):
    energies, *rest = problem
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in energies.items()}
    assert allocate(tensors, *rest) == allocate(energies, *rest)


def test_what_does_not_fit_is_passed_over_and_the_visit_goes_on():
    energies, costs = {"large": [100.0, 90.0], "small": [4.0, 3.0]}, {"large": 10, "small": 3}
    assert allocate(energies, costs, 17) == {"large": [0], "small": [0, 1]}
    assert allocate(energies, costs, 9) == {"large": [], "small": [0, 1]}


def test_energy_counts_per_parameter():
    energies, costs = {"large": [10.0], "small": [4.0]}, {"large": 10, "small": 2}
    assert allocate(energies, costs, 10) == {"large": [], "small": [0]}


def test_ties_go_to_the_earlier_module_then_to_the_lower_index():
    energies, costs = {"z": [1.0, 2.0, 2.0], "a": [2.0]}, {"z": 1, "a": 1}
    assert allocate(energies, costs, 2) == {"z": [1, 2], "a": []}
    assert allocate(energies, costs, 3) == {"z": [1, 2], "a": [0]}


def test_min_rank_is_served_before_everything_else():
    energies, costs = {"loud": [9.0, 8.0, 7.0], "quiet": [0.1, 0.2], "dead": []}, {"loud": 2, "quiet": 2, "dead": 2}
    assert allocate(energies, costs, 6) == {"loud": [0, 1, 2], "quiet": [], "dead": []}
    assert allocate(energies, costs, 6, min_rank=1) == {"loud": [0, 1], "quiet": [1], "dead": []}


def test_a_min_rank_that_costs_more_than_the_budget_is_refused_with_its_cost():
    energies, costs = {"a": [1.0, 1.0], "b": [1.0]}, {"a": 10, "b": 7}
    assert allocate(energies, costs, 27, min_rank=2) == {"a": [0, 1], "b": [0]}
    with pytest.raises(UserError, match="min_rank 2 keeps 27 parameters, more than the budget of 26"):
        allocate(energies, costs, 26, min_rank=2)
    with pytest.raises(UserError, match="min_rank 0 keeps 0 parameters, more than the budget of -1"):
        allocate(energies, costs, -1)


def test_slots_beyond_a_layers_own_rank_are_free():
    energies, costs, caps = (
        {"narrow": [5.0, 4.0, 3.0, 2.0], "wide": [1.0]},
        {"narrow": 6, "wide": 5},
        {"narrow": 2, "wide": 4},
    )
    assert allocate(energies, costs, 12, caps=caps) == {"narrow": [0, 1, 2, 3], "wide": []}
    assert allocate(energies, costs, 11, caps=caps) == {"narrow": [0], "wide": [0]}
    assert allocate(energies, costs, 12, min_rank=3, caps={"narrow": 1, "wide": 1}) == {
        "narrow": [0, 1, 2, 3],
        "wide": [0],
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_an_energy_that_is_no_size_is_refused(bad):
    for choose in (lambda worth: allocate(worth, {"a": 1}, 5), lambda worth: within_tolerance(worth, {"a": 1}, 0.1)):
        with pytest.raises(ValueError, match="a: component 1 has energy"):
            choose({"a": [1.0, bad]})


# ----- a tolerance ----------------------------------------------------------------------------------------------------


@properties
@given(problems(), st.floats(0, 0.999))
def test_a_tolerance_drops_the_least_as_long_as_the_error_allows_it(problem, tolerance):
    energies, costs, _, min_rank, _ = problem
    kept = within_tolerance(energies, costs, tolerance, min_rank)
    total = sum(map(sum, energies.values()))
    dropped = [
        (values[i] / costs[name], values[i])
        for name, values in energies.items()
        for i in set(range(len(values))) - set(kept[name])
    ]
    spared = [
        (values[i] / costs[name], values[i])
        for name, values in energies.items()
        for i in sorted(kept[name], key=lambda i, values=values: (-values[i], i))[min_rank:]
    ]
    energy = sum(value for _, value in dropped)
    assert energy <= tolerance**2 * total
    assert max(dropped, default=(0, 0))[0] <= min(spared, default=(math.inf, 0))[0]
    if spared:  # one more of the cheapest would be too much
        least = min(spared)[0]
        assert energy + max(value for worth, value in spared if worth == least) > tolerance**2 * total
    assert all(len(kept[name]) >= min(min_rank, len(values)) for name, values in energies.items())


def test_no_tolerance_drops_nothing_but_zeros():
    energies = {"a": [3.0, 1e-30], "b": [1.0, 0.0]}
    assert within_tolerance(energies, {"a": 2, "b": 1}, 0.0) == {"a": [0, 1], "b": [0]}


def test_a_tolerance_is_a_relative_error_over_all_modules():
    energies = {"a": [90.0, 4.0], "b": [5.0, 1.0]}
    costs = {"a": 1, "b": 1}
    assert within_tolerance(energies, costs, 0.0999) == {"a": [0, 1], "b": [0, 1]}
    assert within_tolerance(energies, costs, 0.1) == {"a": [0, 1], "b": [0]}
    assert within_tolerance(energies, costs, 0.23) == {"a": [0], "b": [0]}
    assert within_tolerance(energies, costs, 0.999) == {"a": [0], "b": []}
    assert within_tolerance(energies, costs, 0.999, min_rank=1) == {"a": [0], "b": [0]}


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, math.nan])
def test_a_tolerance_that_is_no_relative_error_is_refused(tolerance):
    with pytest.raises(ValueError, match="0 or more and below 1"):
        within_tolerance({"a": [1.0]}, {"a": 1}, tolerance)
