"""The merged adapter is the mean of products, whatever the order, copies and gauges of the replicas; the statistics are
those of the dense matrices; PEFT's exact combinations agree."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_factors, relative_error, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import allocate_reference, outer_products

from sora_llm.consensus import cut_svd
from sora_llm.errors import UserError
from sora_llm.merge import WeightedAdapter, merge

properties = settings(max_examples=60)
SHAPES = {"b": (7, 5), "a": (6, 6), "narrow": (3, 9)}  # I, O; not in the order of the names
S = {"a": 0.5, "b": 2.0, "narrow": 1.0}


@st.composite
def replicas(draw, max_size=4):
    """Different replicas: ranks, s, dead gates and missing modules differ."""
    found = []
    for _ in range(draw(st.integers(1, max_size))):
        names = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=3, unique=True))
        modules = {name: (draw(st.integers(0, 5)), *SHAPES[name]) for name in names}
        seed, weight = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.1, 0.3, 1.0, 7.0]))
        found.append(WeightedAdapter(weight, random_factors(seed, modules), draw(st.sampled_from([1.0, 0.25, S]))))
    return found


def scale_of(replica, name):
    return replica.scaling if isinstance(replica.scaling, float) else replica.scaling[name]


def dense(replica):
    return {
        name: outer_products(*replica.factors[name], scale_of(replica, name))
        if name in replica.factors
        else np.zeros(SHAPES[name][::-1])
        for name in SHAPES
    }


def mean(replicas):
    total = math.fsum(replica.weight for replica in replicas)
    products = [dense(replica) for replica in replicas]
    return {
        name: sum(replica.weight / total * product[name] for replica, product in zip(replicas, products, strict=True))
        for name in SHAPES
    }


def products(merged, scaling=1.0):
    return {name: outer_products(A, B, None, scaling) for name, (A, B) in merged.factors.items()}


def flat(matrices, names=SHAPES):
    """All modules' entries as one vector; a module that is not there is 0."""
    nothing = {name: np.zeros(SHAPES[name][::-1]) for name in names}
    return np.concatenate([(nothing | matrices)[name].ravel() for name in names])


def same_bits(one, two):
    names = list(one.factors) == list(two.factors)
    return names and all(
        map(torch.equal, itertools.chain(*one.factors.values()), itertools.chain(*two.factors.values()))
    )


def assert_close(found, expected, rel=1e-10):
    assert np.linalg.norm(found - expected) <= rel * np.linalg.norm(expected)


# ----- the mean of products -------------------------------------------------------------------------------------------


@properties
@given(replicas(), st.sampled_from([1.0, 0.3, S]))
def test_without_a_budget_the_merge_is_the_mean_of_products(given_replicas, scaling):
    merged = merge(given_replicas, scaling=scaling)
    expected = mean(given_replicas)
    found = {
        name: outer_products(A, B, None, scaling if isinstance(scaling, float) else scaling[name])
        for name, (A, B) in merged.factors.items()
    }
    assert_close(flat(found), flat(expected))
    assert list(merged.factors) == sorted({name for replica in given_replicas for name in replica.factors})
    assert merged.report.energy == pytest.approx(float(flat(expected) @ flat(expected)), rel=1e-10)


def test_it_is_not_the_product_of_means():
    one = WeightedAdapter(1, {"a": (torch.eye(1, 2).double(), torch.eye(2, 1).double(), None)}, 1.0)
    other = WeightedAdapter(1, {"a": (*(-t for t in one.factors["a"][:2]), None)}, 1.0)
    A, B = merge([one, other]).factors["a"]
    torch.testing.assert_close(B @ A, torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double())


@properties
@given(replicas(), st.floats(0, 1), st.integers(0, 1))
def test_a_budget_keeps_the_best_low_rank_form_and_tells_its_error(given_replicas, share, min_rank):
    expected = mean(given_replicas)
    names = sorted({name for replica in given_replicas for name in replica.factors})
    svds = {name: np.linalg.svd(expected[name]) for name in names}
    energies = {name: [float(v) ** 2 for v in sigma if v > 1e-9 * sigma[0]] for name, (_, sigma, _) in svds.items()}
    costs = {name: sum(SHAPES[name]) for name in names}
    served = sum(costs[name] for name in names if energies[name]) * min_rank
    budget = max(served, int(share * sum(costs[name] * len(energies[name]) for name in names)))
    merged = merge(given_replicas, budget, min_rank=min_rank)

    ranks = {name: len(kept) for name, kept in allocate_reference(energies, costs, budget, min_rank).items()}
    assert merged.report.ranks == ranks == {name: len(A) for name, (A, _) in merged.factors.items()}
    dropped = sum(sum(values[ranks[name] :]) for name, values in energies.items())
    error = flat(products(merged)) - flat(expected)
    total = merged.report.energy
    assert merged.report.dropped_energy == pytest.approx(dropped, rel=1e-9, abs=1e-14 * total)
    assert float(error @ error) == pytest.approx(dropped, rel=1e-9, abs=1e-14 * total)
    assert merged.report.kept_params + merged.report.unspent == budget


@properties
@given(replicas(), st.floats(0, 0.99))
def test_a_tolerance_bounds_the_relative_error(given_replicas, tolerance):
    merged, expected = merge(given_replicas, tolerance=tolerance), flat(mean(given_replicas))
    error = np.linalg.norm(flat(products(merged)) - expected)
    assert error <= (tolerance * (1 + 1e-9) + 1e-10) * np.linalg.norm(expected)


@properties
@given(replicas(max_size=1), st.floats(0, 1))
def test_one_replica_is_its_truncated_svd_bit_for_bit(given_replicas, share):
    (one,) = given_replicas
    in_order = {name: one.factors[name] for name in sorted(one.factors)}
    budget = int(share * sum(3 * sum(SHAPES[name]) for name in one.factors))
    cut, report = cut_svd(in_order, one.scaling, budget)
    merged = merge([one], budget, scaling=one.scaling)
    assert merged.report == report
    assert all(map(torch.equal, itertools.chain(*merged.factors.values()), itertools.chain(*cut.values())))


def test_a_merged_rank_may_exceed_that_of_every_replica_but_not_the_layers():
    many = [WeightedAdapter(1, random_factors(seed, {"a": (2, *SHAPES["a"])}, dead=0.0), 1.0) for seed in range(5)]
    assert merge(many[:2]).report.ranks == {"a": 4}
    assert merge(many).report.ranks == {"a": 6}


def test_replicas_that_cancel_leave_nothing():
    factors = random_factors(0, {"a": (2, *SHAPES["a"])}, dead=0.0)
    opposite = {"a": (-factors["a"][0], *factors["a"][1:])}
    merged = merge([WeightedAdapter(1, factors, 1.0), WeightedAdapter(1, opposite, 1.0)])
    # What rounding leaves of the sum must not look alive for want of anything larger.
    assert merged.report.ranks == {"a": 0} and merged.report.energy == 0
    assert [(r.cosine, r.distance) for r in merged.replicas] == [(None, None)] * 2
    assert all(r.energy > 1 for r in merged.replicas)


# ----- bits -----------------------------------------------------------------------------------------------------------


@properties
@given(replicas(), st.integers(1, 5), st.floats(0, 1))
def test_copies_order_and_weight_zero_change_no_bit(given_replicas, copies, share):
    budget = int(share * sum(3 * sum(shape) for shape in SHAPES.values()))
    expected = merge(given_replicas, budget)
    idle = WeightedAdapter(0.0, random_factors(99, {"b": (2, *SHAPES["b"])}), 1.0)
    stranger = WeightedAdapter(0.0, random_factors(98, {"not there": (2, 3, 3)}), 1.0)
    for order in itertools.islice(itertools.permutations(given_replicas), 6):
        found = merge([*order[:1], idle, *order[1:], stranger], budget)
        assert same_bits(found, expected) and found.report == expected.report
    # Powers of two: dividing a weight among copies is exact.
    shared = [
        replace(r, weight=r.weight / 4, factors=dict(reversed(r.factors.items())))
        for r in given_replicas
        for _ in "four"
    ]
    assert same_bits(merge(shared, budget), expected)
    one = given_replicas[0]
    assert same_bits(merge([replace(one, weight=0.1)] * copies, budget), merge([one], budget))


def test_weights_of_copies_are_summed_exactly():
    """1e16 + 1 + 1 is 1e16 from the left and 1e16 + 2 from the right."""
    one, other = with_gates({"a": [1.0, 0.0]}), with_gates({"a": [1.0, 2.0]})
    expected = merge([replace(one, weight=1e16 + 2), replace(other, weight=3.0)])
    for weights in itertools.permutations([1e16, 1.0, 1.0]):
        found = merge([*(replace(one, weight=weight) for weight in weights), replace(other, weight=3.0)])
        assert same_bits(found, expected)


def test_copies_are_told_by_their_bits_not_by_their_objects():
    one = WeightedAdapter(0.3, random_factors(0, {"a": (3, *SHAPES["a"])}), 1.0)
    clone = WeightedAdapter(0.2, {"a": tuple(t.clone() for t in one.factors["a"])}, 1.0)
    A, B, g = clone.factors["a"]
    near = replace(clone, factors={"a": (torch.nextafter(A, A + 1), B, g)})
    assert same_bits(merge([one, clone]), merge([one]))
    assert not same_bits(merge([one, near]), merge([one]))
    assert not same_bits(merge([one, replace(clone, scaling=2.0)]), merge([one]))


@properties
@given(replicas(max_size=3))
def test_the_same_call_gives_the_same_bits(given_replicas):
    assert same_bits(merge(given_replicas), merge(given_replicas))


# ----- to rounding ----------------------------------------------------------------------------------------------------


@properties
@given(replicas(), st.integers(0, 10**6))
def test_gauge_and_slot_order_change_the_merge_by_rounding_only(given_replicas, seed):
    generator = torch.Generator().manual_seed(seed)
    others = []
    for replica in given_replicas:
        factors = {}
        for name, (A, B, g) in replica.factors.items():
            order = torch.randperm(len(g), generator=generator)
            scale = torch.exp(3 * torch.randn(len(g), generator=generator, dtype=torch.float64))
            factors[name] = ((A * scale[:, None])[order], (B / scale)[:, order], g[order])
        others.append(replace(replica, factors=factors))
    expected, found = merge(given_replicas), merge(others)
    assert found.report.ranks == expected.report.ranks
    assert_close(flat(products(found)), flat(products(expected)))


@properties
@given(replicas(), replicas())
def test_merging_a_merge_is_merging_all(first, second):
    weight = math.fsum(replica.weight for replica in first)
    merged = merge(first, scaling=0.5)
    plain = {name: (A, B, None) for name, (A, B) in merged.factors.items()}
    at_once = merge([*first, *second])
    assert_close(flat(products(merge([WeightedAdapter(weight, plain, 0.5), *second]))), flat(products(at_once)))


@properties
@given(replicas(), st.floats(1e-3, 1e3))
def test_only_the_ratio_of_weights_matters(given_replicas, factor):
    scaled = [replace(replica, weight=factor * replica.weight) for replica in given_replicas]
    assert_close(flat(products(merge(scaled))), flat(products(merge(given_replicas))))


# ----- statistics -----------------------------------------------------------------------------------------------------


@properties
@given(replicas())
def test_energies_cosines_and_distances_are_those_of_the_dense_matrices(given_replicas):
    merged = merge(given_replicas, budget=0)  # they are about the mean, not about the cut
    centre = flat(mean(given_replicas))
    size = np.linalg.norm(centre)
    total = math.fsum(replica.weight for replica in given_replicas)
    assert len(merged.replicas) == len(given_replicas)
    for replica, found in zip(given_replicas, merged.replicas, strict=True):
        vector = flat(dense(replica))
        length = np.linalg.norm(vector)
        assert found.weight == pytest.approx(replica.weight / total)
        assert found.energy == pytest.approx(length**2, rel=1e-10)
        if size == 0:
            assert found.cosine is None and found.distance is None
            continue
        # from inner products: half the digits where replica and mean are close
        assert found.distance == pytest.approx(np.linalg.norm(vector - centre) / size, rel=1e-6, abs=1e-6)
        assert found.cosine == (None if length == 0 else pytest.approx(vector @ centre / (length * size), abs=1e-6))


def test_an_only_replica_is_at_distance_zero_and_weight_zero_is_left_out():
    one = WeightedAdapter(0.3, random_factors(0, {"a": (3, *SHAPES["a"])}), 1.0)
    merged = merge([replace(one, weight=0.0), one, one])
    assert [(r.weight, r.distance) for r in merged.replicas] == [(0.5, 0.0), (0.5, 0.0)]
    assert merged.replicas[0].cosine == pytest.approx(1.0)


def with_gates(gates, weight=1.0):
    """Replicas of like slots, one row of gates each: {module: gates}."""
    factors = {}
    for name, gate in gates.items():
        A, B, _ = random_factors(0, {name: (len(gate), *SHAPES[name])})[name]
        factors[name] = (A, B, torch.tensor(gate).double())
    return WeightedAdapter(weight, factors, 1.0)


def test_overlap_is_that_of_the_pairs():
    one = with_gates({"a": [1.0, 0.5, 0.0], "b": [0.0, 1.0]})
    two = with_gates({"a": [2.0, 0.0, 0.0], "b": [0.0, 1.0]})
    idle = with_gates({"a": [0.0, 0.0, 1.0], "b": [1.0, 1.0]}, weight=0.0)
    merged = merge([one, two, idle, one])
    # supports {a0, a1, b1}, {a0, b1}, {a0, a1, b1}: 2/3, 1 and 2/3
    assert merged.jaccard == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert merge([one]).jaccard is None
    assert merge([one, one]).jaccard == 1.0


def test_a_module_that_a_replica_lacks_has_no_slots_in_it_and_two_empty_supports_agree():
    one, two = with_gates({"a": [1.0, 1.0], "b": [1.0]}), with_gates({"b": [1.0]})
    assert merge([one, two]).jaccard == pytest.approx(1 / 3)
    assert merge([with_gates({"a": [0.0]}), with_gates({"a": [0.0], "b": [0.0]})]).jaccard == 1.0


def test_slots_that_do_not_correspond_are_not_compared():
    one = with_gates({"a": [1.0, 1.0], "b": [1.0, 0.0]})
    longer = with_gates({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0]})
    assert merge([one, longer]).jaccard == 1 / 2
    plain = replace(one, factors={name: (A, B, None) for name, (A, B, _) in one.factors.items()})
    assert merge([one, plain]).jaccard is None


# ----- input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e308])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(UserError, match="finite numbers from 0"):
        merge([with_gates({"a": [1.0]}), with_gates({"a": [2.0]}, weight)])


@pytest.mark.parametrize("nothing", [[], [with_gates({"a": [1.0]}, 0.0)]])
def test_nothing_to_merge_is_refused(nothing):
    with pytest.raises(UserError, match="at least one replica of positive weight"):
        merge(nothing)


def test_replicas_of_different_bases_are_refused():
    other = WeightedAdapter(1, random_factors(0, {"a": (2, 6, 7)}), 1.0)
    with pytest.raises(UserError, match=r"a is 6 → [67] in one replica and 6 → [67] in another"):
        merge([with_gates({"a": [1.0]}), other])


def test_a_replica_that_is_not_finite_is_refused_by_module():
    bad = with_gates({"a": [1.0], "b": [math.nan]})
    with pytest.raises(ValueError, match="b holds values that are not finite"):
        merge([with_gates({"a": [1.0]}), bad])


def test_values_of_dead_slots_do_not_matter():
    one, other = with_gates({"a": [1.0, 0.0]}), with_gates({"a": [1.0, 2.0]})
    expected = merge([one, other])
    A, B, _ = one.factors["a"]
    A[1], B[:, 1] = math.nan, math.inf
    found = merge([one, other])
    assert_close(flat(products(found)), flat(products(expected)), rel=1e-13)
    assert [r.energy for r in found.replicas] == pytest.approx([r.energy for r in expected.replicas])


def test_the_result_has_the_widest_dtype_of_what_counts():
    def as_type(dtype, weight=1.0):
        factors = {
            name: tuple(t.to(dtype) for t in adapter) for name, adapter in with_gates({"a": [1.0]}).factors.items()
        }
        return WeightedAdapter(weight, factors, 1.0)

    for dtypes, expected in (
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ):
        merged = merge([as_type(dtype) for dtype in dtypes] + [as_type(torch.float64, 0.0)])
        assert {t.dtype for t in merged.factors["a"]} == {expected}


# ----- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_s_exact_combinations_agree(kind):
    """`cat` is the mean itself, `svd` its best approximation of one rank in every module."""
    from peft import LoraConfig, get_peft_model

    weights, ranks = [0.5, 0.2, 0.3], [2, 3, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, rank in enumerate(ranks):
            config = LoraConfig(r=rank, lora_alpha=3 * rank + index, target_modules=["q_proj", "k_proj", "down_proj"])
            if index == 0:
                model = get_peft_model(tiny_llama(), config, adapter_name="0")
            else:
                model.add_adapter(str(index), config)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    torch.manual_seed(0)
    for layer in layers.values():
        for index in range(len(ranks)):
            torch.nn.init.normal_(layer.lora_A[str(index)].weight)
            torch.nn.init.normal_(layer.lora_B[str(index)].weight)

    def replica(index):
        factors = {
            name: (layer.lora_A[str(index)].weight, layer.lora_B[str(index)].weight, None)
            for name, layer in layers.items()
        }
        return WeightedAdapter(weights[index], factors, next(iter(layers.values())).scaling[str(index)])

    rank = sum(ranks) if kind == "cat" else 3
    model.add_weighted_adapter(["0", "1", "2"], weights, "merged", combination_type=kind, svd_rank=3)
    everything = [replica(index) for index in range(len(ranks))]
    merged = merge(everything)
    for name, layer in layers.items():
        A, B = merged.factors[name]
        assert A.dtype == torch.float32 and len(A) == sum(ranks)
        # float32 in PEFT, and in our rounding
        assert relative_error(B[:, :rank] @ A[:rank], layer.get_delta_weight("merged")) < 1e-5


@properties
@given(replicas(), st.integers(0, 3))
def test_a_limit_of_ranks_keeps_the_best_components_and_says_what_it_dropped(found, limit):
    merged = merge(found, max_ranks=dict.fromkeys(SHAPES, limit))
    whole = mean(found)
    assert all(A.shape[0] <= limit for A, _ in merged.factors.values())
    energy = flat(whole) @ flat(whole)
    kept = sum(float((np.linalg.svd(matrix, compute_uv=False)[:limit] ** 2).sum()) for matrix in whole.values())
    assert math.isclose(merged.report.energy, energy, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(merged.report.dropped_energy, energy - kept, rel_tol=1e-9, abs_tol=1e-9 * energy)
    left = flat(whole) - flat(products(merged))
    assert math.isclose(left @ left, energy - kept, rel_tol=1e-9, abs_tol=1e-9 * energy)
