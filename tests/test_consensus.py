"""Hashes see every bit, the odd process is named, ranks are counted as defined, cutting by slots is plain pruning."""

import pytest
import torch
from reference import fold_slots

from sora_llm.consensus import (
    cut_slots,
    disagreements,
    kept_params,
    kept_ranks,
    mean_rank,
    product_distance,
    tensor_hash,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----- hashes ---------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_tensor_changes_its_hash():
    tensor = torch.tensor([1.0, -0.5, 0.0])
    bits = tensor.view(torch.int32)
    hashes = {tensor_hash(tensor)}
    for element in range(3):
        for bit in range(32):
            flipped = bits.clone()
            flipped[element] ^= -(2**31) if bit == 31 else 1 << bit
            hashes.add(tensor_hash(flipped.view(torch.float32)))
    assert len(hashes) == 1 + 3 * 32


def test_shape_dtype_order_and_grouping_change_the_hash():
    flat = torch.arange(6.0)
    different = [
        (flat,),
        (flat.reshape(2, 3),),
        (flat.reshape(3, 2),),
        (flat.view(torch.int32),),
        (flat.flip(0),),
        (flat[:3], flat[3:]),
        (flat[3:], flat[:3]),
        (flat[:3],),
        (),
    ]
    assert len({tensor_hash(*tensors) for tensors in different}) == len(different)


def test_equal_values_have_equal_hashes_whatever_their_memory_layout_and_gradient():
    tensor = random(4, 3)
    copies = [tensor.clone(), tensor.T.contiguous().T, tensor.clone().requires_grad_(), torch.cat([tensor, tensor])[:4]]
    assert {tensor_hash(copy) for copy in copies} == {tensor_hash(tensor)}
    assert tensor_hash(torch.tensor([float("nan")])) == tensor_hash(torch.tensor([float("nan")]))
    for odd in (torch.tensor(1.0), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)):
        assert tensor_hash(odd) == tensor_hash(odd.clone())


# ----- disagreements --------------------------------------------------------------------------------------------------


def test_processes_that_agree_have_no_disagreements():
    assert disagreements([{"a": "1", "b": "2"}] * 3) == {}
    assert disagreements([{"a": "1"}]) == {}
    assert disagreements([{}, {}]) == {}


def test_the_minority_is_named_per_tensor():
    hashes = [{"a": "x", "b": "1"}, {"a": "x", "b": "1"}, {"a": "y", "b": "1"}, {"a": "x", "b": "2"}]
    assert disagreements(hashes) == {"a": [2], "b": [3]}
    assert disagreements([{"a": "odd"}, {"a": "x"}, {"a": "x"}]) == {"a": [0]}


def test_in_a_tie_the_lowest_process_is_believed():
    assert disagreements([{"a": "x"}, {"a": "y"}]) == {"a": [1]}
    assert disagreements([{"a": "x"}, {"a": "y"}, {"a": "y"}, {"a": "x"}]) == {"a": [1, 2]}
    assert disagreements([{"a": "z"}, {"a": "y"}, {"a": "x"}]) == {"a": [1, 2]}


def test_a_missing_tensor_is_a_disagreement():
    assert disagreements([{"a": "x", "b": "1"}, {"a": "x"}]) == {"b": [1]}
    assert disagreements([{}, {"b": "1"}, {"b": "1"}]) == {"b": [0]}


# ----- ranks ----------------------------------------------------------------------------------------------------------


def test_a_rank_counts_the_gates_that_are_not_exactly_zero():
    gates = {"a": torch.tensor([0.0, -0.0, 1e-40, -3.0]), "b": torch.zeros(3), "c": torch.ones(2)}
    assert kept_ranks(gates) == {"a": 2, "b": 0, "c": 2}


def test_the_mean_rank_is_weighted_by_cost_over_all_target_modules():
    assert mean_rank({"small": 4, "large": 1, "pruned": 0}, {"small": 10, "large": 30, "pruned": 60}) == 0.7


def test_kept_parameters_count_no_rank_beyond_a_layers_own():
    ranks, shapes = {"a": 3, "narrow": 8, "pruned": 0}, {"a": (5, 7), "narrow": (2, 10), "pruned": (4, 4)}
    assert kept_params(ranks, shapes) == 3 * 12 + 2 * 12


# ----- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [[1.0, 0.0, -0.3, 2.0], [0.0] * 4, [1.0] * 4, [0.0, 0.0, 0.0, -5.0]])
def test_cutting_by_slots_is_the_references_pruning(gate):
    A, B, g = random(4, 6), random(5, 4, seed=1), torch.tensor(gate, dtype=torch.float64)
    (found_A, found_B), (expected_A, expected_B) = cut_slots({"m": (A, B, g)})["m"], fold_slots(A, B, g)
    assert found_A.shape == expected_A.shape and found_B.shape == expected_B.shape
    # √|g| is rounded once on either side; one more rounding in the product
    torch.testing.assert_close(found_A, expected_A, rtol=1e-15, atol=0)
    torch.testing.assert_close(found_B, expected_B, rtol=1e-15, atol=0)
    torch.testing.assert_close(found_B @ found_A, B @ torch.diag(g) @ A, rtol=1e-12, atol=1e-13)


def test_cutting_treats_modules_apart_and_leaves_ungated_ones_as_they_are():
    A, B = random(2, 3), random(4, 2, seed=1)
    cut = cut_slots({"gated": (A, B, torch.tensor([0.0, 1.0]).double()), "plain": (A, B, None)})
    assert list(cut) == ["gated", "plain"]
    assert torch.equal(cut["gated"][0], A[1:]) and torch.equal(cut["gated"][1], B[:, 1:])
    assert torch.equal(cut["plain"][0], A) and torch.equal(cut["plain"][1], B)


# ----- distance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r1", "r2"), [(3, 3), (2, 5), (9, 1), (3, 0)])
def test_the_distance_of_two_products_is_that_of_the_dense_matrices(r1, r2):
    A1, B1, A2, B2 = random(r1, 6), random(5, r1, seed=1), random(r2, 6, seed=2), random(5, r2, seed=3)
    expected = torch.linalg.matrix_norm(B1 @ A1 - B2 @ A2) / torch.linalg.matrix_norm(B1 @ A1)
    assert product_distance(A1, B1, A2, B2) == pytest.approx(float(expected), rel=1e-12)


def test_equal_products_in_other_factors_have_distance_zero_and_a_small_error_is_seen():
    A, B = random(3, 6), random(5, 3, seed=1)
    order = [2, 0, 1]
    # 2⁻⁵² times a few: the QR of the stacked factors cancels
    assert product_distance(A, B, 4 * A[order], B[:, order] / 4) < 1e-14
    assert product_distance(A, B, A * (1 + 1e-9), B) == pytest.approx(1e-9, rel=1e-4)


def test_zero_products_agree_and_nothing_else_is_near_them():
    A, B, nothing = random(3, 6), random(5, 3, seed=1), (torch.zeros(0, 6), torch.zeros(5, 0))
    assert product_distance(*nothing, *nothing) == 0
    assert product_distance(*nothing, torch.zeros(2, 6), random(5, 2)) == 0
    assert product_distance(A, torch.zeros_like(B), *nothing) == 0
    assert product_distance(*nothing, A, B) == float("inf")
    assert product_distance(A, B, *nothing) == pytest.approx(1)


def test_float32_factors_are_compared_in_float64():
    A, B = random(3, 6).float(), random(5, 3, seed=1).float()
    assert product_distance(A, B, A, B) < 1e-14
