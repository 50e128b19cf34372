"""Ranks and sizes of adapters are counted as defined, and the distance of two is that of their products."""

import pytest
import torch
from helpers import gaussian

from sora_llm.factors import (
    kept_params,
    kept_ranks,
    mean_rank,
    product_distance,
)


def test_a_rank_counts_the_gates_that_are_not_exactly_zero():
    gates = {"a": torch.tensor([0.0, -0.0, 1e-40, -3.0]), "b": torch.zeros(3), "c": torch.ones(2)}
    assert kept_ranks(gates) == {"a": 2, "b": 0, "c": 2}


def test_the_mean_rank_is_weighted_by_cost_over_all_target_modules():
    shapes = {"small": (4, 6), "large": (10, 20), "pruned": (30, 30)}
    assert mean_rank({"small": 4, "large": 1, "pruned": 0}, shapes) == 0.7


def test_kept_parameters_count_no_rank_beyond_a_layers_own():
    ranks, shapes = {"a": 3, "narrow": 8, "pruned": 0}, {"a": (5, 7), "narrow": (2, 10), "pruned": (4, 4)}
    assert kept_params(ranks, shapes) == 3 * 12 + 2 * 12


@pytest.mark.parametrize(("r1", "r2"), [(3, 3), (2, 5), (9, 1), (3, 0)])
def test_the_distance_of_two_products_is_that_of_the_dense_matrices(r1, r2):
    A1, B1, A2, B2 = gaussian(r1, 6), gaussian(5, r1, seed=1), gaussian(r2, 6, seed=2), gaussian(5, r2, seed=3)
    expected = torch.linalg.matrix_norm(B1 @ A1 - B2 @ A2) / torch.linalg.matrix_norm(B1 @ A1)
    assert product_distance(A1, B1, A2, B2) == pytest.approx(float(expected), rel=1e-12)


def test_equal_products_in_other_factors_have_distance_zero_and_a_small_error_is_seen():
    A, B = gaussian(3, 6), gaussian(5, 3, seed=1)
    order = [2, 0, 1]
    # 2⁻⁵² times a few: the QR of the stacked factors cancels
    assert product_distance(A, B, 4 * A[order], B[:, order] / 4) < 1e-14
    assert product_distance(A, B, A * (1 + 1e-9), B) == pytest.approx(1e-9, rel=1e-4)


def test_zero_products_agree_and_nothing_else_is_near_them():
    A, B, nothing = gaussian(3, 6), gaussian(5, 3, seed=1), (torch.zeros(0, 6), torch.zeros(5, 0))
    assert product_distance(*nothing, *nothing) == 0
    assert product_distance(*nothing, torch.zeros(2, 6), gaussian(5, 2)) == 0
    assert product_distance(A, torch.zeros_like(B), *nothing) == 0
    assert product_distance(*nothing, A, B) == float("inf")
    assert product_distance(A, B, *nothing) == pytest.approx(1)


def test_float32_factors_are_compared_in_float64():
    A, B = gaussian(3, 6).float(), gaussian(5, 3, seed=1).float()
    assert product_distance(A, B, A, B) < 1e-14
