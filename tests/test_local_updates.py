"""Local updates: replicas that step apart and agree in rounds equal an independent float64 account of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from helpers import random_factors, relative_error
from reference import delta_weight, reference_rounds
from rounds_world import (
    DECAY,
    GATE_LRS,
    LEARNING_RATES,
    LORA_ALPHA,
    MAX_NORM,
    ROUND_ENDS,
    MicroBatch,
    R,
    everything_in_float64,
    injected,
    lambdas,
    make_batches,
    make_model,
)
from spawn import spawn

from sora_llm.inject import adapters
from sora_llm.local_updates import (
    OuterOptimizer,
    average,
    owners,
    round_bytes,
    shrink_gates,
    transfer_seconds,
)
from sora_llm.optim import ProxAdamW
from sora_llm.schedule import round_bounds
from sora_llm.sora import soft_threshold

S = LORA_ALPHA / R
TOLERANCE = 1e-9
"""Relative, of ΔW after 11 steps in float64: Adam divides by √v, which amplifies rounding (see test_reference_run)."""


# -------------------------------------------------------------------------------------------------- real processes

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {"seeds": [7]}, "proxgen": {"seeds": [7], "threshold": "proxgen"}},
    2: {
        "same rows": {"seeds": [7, 7]},
        "decoupled": {"seeds": [7, 8]},
        "proxgen": {"seeds": [7, 8], "threshold": "proxgen"},
        "nesterov": {"seeds": [7, 8], "outer": [0.7, 0.9]},
    },
    4: {"same rows": {"seeds": [7, 7, 7, 7]}, "decoupled": {"seeds": [7, 8, 9, 10]}},
}


@functools.cache
def world(num_processes: int, replica: str = "process") -> list[dict[str, Any]]:
    """What every process of a world reports; started once for all tests."""
    cases = {"decoupled": {"seeds": [7, 8, 9, 10]}} if replica == "node" else CASES[num_processes]
    arguments = {"cases": cases, "replica": replica, "faults": num_processes == 2 or replica == "node"}
    return spawn("rounds_world:rounds_world", num_processes, arguments, timeout=180)


@functools.cache
def expected(
    replicas: tuple[tuple[int, ...], ...], threshold: str = "decoupled", outer: tuple[float, float] = (1.0, 0.0)
) -> tuple[dict[str, Any], list[float]]:
    """The reference's factors and distances; `replicas` are the seeds of the rows that each of them has."""
    with everything_in_float64():
        start = {
            name: tuple(t.detach().clone() for t in (layer.lora_A, layer.lora_B, layer.gate))
            for name, layer in adapters(injected()).items()
        }
        return reference_rounds(
            make_model(),
            start,
            [rows_of(seeds) for seeds in replicas],
            s=S,
            round_ends=ROUND_ENDS,
            learning_rates=LEARNING_RATES,
            gate_learning_rates=GATE_LRS,
            lambdas=lambdas(threshold),
            threshold=threshold,
            weight_decay=DECAY,
            outer_learning_rate=outer[0],
            outer_momentum=outer[1],
            max_grad_norm=MAX_NORM,
        )


def rows_of(seeds: Sequence[int]) -> list[list[MicroBatch]]:
    """Per step the micro-batches of all `seeds`."""
    return [list(chain.from_iterable(step)) for step in zip(*map(make_batches, seeds), strict=True)]


def triples(values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    """{module: (A, B, g)} of tensors by name."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in values)
    return {m: tuple(values[f"{m}.{kind}"] for kind in ("lora_A", "lora_B", "gate")) for m in modules}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, tuple[torch.Tensor, ...]]) -> None:
    dead = alive = 0
    for name, triple in triples(found).items():
        assert relative_error(delta_weight(triple, S), delta_weight(wanted[name], S)) < TOLERANCE, name
        zeros = triple[2] == 0
        assert torch.equal(zeros, wanted[name][2] == 0), name
        dead, alive = dead + int(zeros.sum()), alive + int((~zeros).sum())
    assert dead >= 5 and alive >= 5, f"{dead} gates dead, {alive} alive: a test of both needs both"


@pytest.mark.parametrize(
    ("num_processes", "case"),
    [
        pytest.param(n, case, marks=[pytest.mark.matrix] if n > 2 else [])
        for n, cases in CASES.items()
        for case in cases
    ],
    ids=str,
)
def test_rounds_equal_the_float64_reference_of_so_many_replicas(num_processes, case):
    arguments = CASES[num_processes][case]
    replicas = tuple((seed,) for seed in arguments["seeds"])
    factors, distances = expected(
        replicas, arguments.get("threshold", "decoupled"), tuple(arguments.get("outer", (1.0, 0.0)))
    )
    for report in world(num_processes):
        compare(report[case]["values"], factors)
        assert report[case]["distances"] == pytest.approx(distances, rel=1e-6, abs=1e-7)
    if len(set(arguments["seeds"])) > 1:
        assert min(distances) > 1e-4, "replicas that do not drift test nothing"


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_fed_the_same_rows_equal_one_process_with_the_same_rounds(num_processes):
    alone = world(1)[0]["alone"]["values"]
    for report in world(num_processes):
        for name, value in report["same rows"]["values"].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)
        assert report["same rows"]["overlaps"][1:] == [1.0, 1.0]


def test_nodes_average_their_gradients_inside_and_their_adapters_between():
    """Two nodes of two processes: each node is one replica with the rows of both."""
    factors, _ = expected(((7, 8), (9, 10)))
    for report in world(4, "node"):
        compare(report["decoupled"]["values"], factors)


def test_the_overlap_is_that_of_the_supports_which_replicas_would_have_alone():
    reports = [report["decoupled"] for report in world(2)]
    assert reports[0]["overlaps"][0] is None, "the first round is dense"
    inside = triples(reports[0]["apart"][1])
    assert all(bool((gate != 0).all()) for _, _, gate in inside.values()), "no prox inside a round that prunes"
    for overlaps in (report["overlaps"] for report in reports):
        assert overlaps == reports[0]["overlaps"] and all(0 < overlap < 1 for overlap in overlaps[1:])


def test_replicas_drift_inside_a_round_and_hold_the_same_bits_after_it():
    first, second = (report["decoupled"] for report in world(2))
    for name, value in first["values"].items():
        assert torch.equal(value, second["values"][name]), name
    gates = [value for name, value in first["apart"][-1].items() if name.endswith(".gate")]
    other = [value for name, value in second["apart"][-1].items() if name.endswith(".gate")]
    assert any(not torch.equal(one, two) for one, two in zip(gates, other, strict=True)), "replicas drift"


def test_a_wrong_element_after_a_round_is_named():
    for report in world(2):
        flips = report["flips"]
        assert flips["nothing"] is None
        assert flips["name"] in flips["parameter"] and "process 1" in flips["parameter"]


def test_inside_a_round_the_processes_of_a_node_are_compared_and_nodes_are_not():
    for report in world(4, "node"):
        flips = report["flips"]
        assert flips["nothing"] is None, "nodes drift, and that is no fault"
        assert f"{flips['name']}.exp_avg on process 3" in flips["moment"]


@pytest.mark.parametrize("case", ["cut", "budget"])
def test_the_cut_is_the_best_of_the_mean_of_products(case):
    """Not of one replica, nor of their averaged factors: against a dense SVD."""
    first, second = (report[case] for report in world(2))
    total = 0
    for name, factors in first["cut"].items():
        own = [triples(report["own"])[name] for report in (first, second)]
        mean = sum(delta_weight(triple, S) for triple in own) / 2
        found = torch.zeros_like(mean) if factors is None else S * (factors[1] @ factors[0])
        rank = 0 if factors is None else len(factors[0])
        U, sigma, Vt = torch.linalg.svd(mean)
        best = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(a[2] != 0, b[2] != 0) for a, b in [own]), "one support"
        if case == "cut":
            assert rank == first["alive"][name], "as many components as gates live"
        total += rank * sum(mean.shape)
    assert total == first["kept"] and 0 < first["spread"] < 1
    if case == "budget":
        assert 1500 - 64 < total <= 1500


def test_low_precision_adapters_meet_in_their_masters():
    first, second = (report["low precision"] for report in world(2))
    for name, master in first["masters"].items():
        assert torch.equal(master, second["masters"][name]) and master.dtype == torch.float32
        assert torch.equal(first["parameters"][name], master.bfloat16())
        if not name.endswith(".gate"):
            torch.testing.assert_close(master, (first["own"][name] + second["own"][name]) / 2, rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_finite_is_skipped_by_its_replica_alone():
    first, second = (report["poisoned"] for report in world(2))
    assert first["skipped"] == [False, False, False] and second["skipped"] == [False, True, False]
    assert (first["num_steps"], second["num_steps"]) == (3, 2)
    assert first["finite"] and first["verdict"] is None and second["verdict"] is None


def test_a_replica_without_rows_stands_still():
    first, second = (report["idle"] for report in world(2))
    assert first["moved"] and not second["moved"]
    assert first["verdict"] is None


def test_an_evaluation_inside_a_round_sees_the_mean_and_leaves_every_bit():
    first, second = (report["averaged"] for report in world(2))
    assert first["back"] and second["back"]
    for name, value in first["inside"].items():
        torch.testing.assert_close(value, (first["own"][name] + second["own"][name]) / 2, rtol=1e-12, atol=1e-15)
        assert torch.equal(value, second["inside"][name])


def test_a_round_moves_what_the_formula_says():
    """2 (K − 1)/K of the float32 values: A, B, gates and thresholds."""
    report = world(2)[0]["decoupled"]
    gates = sum(value.numel() for name, value in report["values"].items() if name.endswith(".gate"))
    num_values = sum(value.numel() for value in report["values"].values()) + gates
    assert report["bytes"] == 4 * num_values == round_bytes(num_values, 2)
    for report in (found["decoupled"] for found in world(2)):  # which counts in float64; who averages what varies a bit
        assert report["traffic"]["sent"] == report["traffic"]["received"] == pytest.approx(8 * num_values, rel=0.1)
    assert round_bytes(1000, 4) == 6000 and round_bytes(1000, 1) == 0
    assert transfer_seconds(125_000_000, 1) == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------- the mathematics


def adapter(seed: int, rank: int = 5, num_in: int = 13, num_out: int = 9) -> tuple[torch.Tensor, ...]:
    return random_factors(seed, {"m": (rank, num_in, num_out)}, dead=0.0)["m"]


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
@pytest.mark.parametrize("gated", [True, False])
def test_the_drift_is_that_of_dense_matrices(num_replicas, gated):
    replicas = [adapter(seed) for seed in range(num_replicas)]
    if not gated:
        replicas = [(A, B, None) for A, B, _ in replicas]
    (A, B, gate), drift = average(replicas)

    def dense(A, B, gate):
        return B @ A if gate is None else B @ torch.diag(gate) @ A

    products = torch.stack([dense(*replica) for replica in replicas]).mean(0)
    assert drift.energy == pytest.approx(float((products**2).sum()), rel=1e-10)
    error = float(((products - dense(A, B, gate)) ** 2).sum())
    assert drift.error_energy == pytest.approx(error, rel=1e-8, abs=1e-12 * drift.energy)
    assert drift.relative == pytest.approx((error / drift.energy) ** 0.5, rel=1e-6, abs=1e-7)
    for found, parts in zip((A, B), list(zip(*replicas, strict=True))[:2], strict=True):
        torch.testing.assert_close(found, torch.stack(parts).mean(0))


@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.0), (0.5, 0.0), (0.7, 0.9), (1.0, 0.5)])
def test_the_outer_step_is_torchs_nesterov_sgd_on_the_outer_gradient(learning_rate, momentum):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, dtype=torch.float64, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([theirs], lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    outer, ours = OuterOptimizer(learning_rate, momentum), start.clone()
    for _ in range(4):
        mean = ours + torch.randn(6, dtype=torch.float64, generator=generator)
        theirs.grad = theirs.detach() - mean
        sgd.step()
        ours = outer.step("m.lora_A", ours, mean)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)
    assert bool(outer.velocity) == (momentum > 0)


def test_by_default_replicas_go_to_their_mean_with_its_bits():
    start, mean = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OuterOptimizer().step("m.lora_A", start, mean), mean)


def test_gates_that_stay_apart_have_the_agreed_mean_its_zeros_and_their_own_signs():
    own = torch.tensor([[1.0, 0.3, -0.2], [0.6, -0.1, -0.8]], dtype=torch.float64)
    agreed = soft_threshold(own.mean(0), 0.25)
    shifted = torch.stack([shrink_gates(gate, own.mean(0), agreed) for gate in own])
    assert agreed.tolist()[1] == 0.0 and bool((shifted[:, 1] == 0).all())
    torch.testing.assert_close(shifted.mean(0), agreed)
    assert bool((shifted * own >= 0).all()), "no component is turned round"


def test_modules_are_shared_out_evenly_and_alike_everywhere():
    sizes = {f"m{index}": size for index, size in enumerate((7, 3, 3, 2, 2, 1, 9))}
    parts = owners(sizes, 3)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= 1
    assert owners(dict(reversed(sizes.items())), 3) == parts


def test_rounds_end_after_so_many_steps_and_at_every_boundary():
    bounds = [0, 3, 10, 24]
    rounds = []
    step = 0
    while step < 24:
        first, end = round_bounds(step, 5, bounds)
        assert all(round_bounds(inside, 5, bounds) == (first, end) for inside in range(first, end))
        rounds.append((first, end))
        step = end
    assert rounds == [(0, 3), (3, 8), (8, 10), (10, 15), (15, 20), (20, 24)]


def test_a_deferred_prox_leaves_the_gates_alone_and_sums_its_thresholds():
    gate = torch.nn.Parameter(torch.ones(3))
    group = {"params": [gate], "name": "gates", "lr": 0.1, "sparse_lambda": 0.5, "weight_decay": 0.0, "deferred": True}
    plain = torch.nn.Parameter(torch.ones(3))
    ours, adamw = ProxAdamW([group]), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for rate in (0.1, 0.05):
        ours.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = rate
        gate.grad, plain.grad = torch.full((3,), 0.3), torch.full((3,), 0.3)
        ours.step()
        adamw.step()
    assert torch.equal(gate, plain)
    torch.testing.assert_close(ours.state[gate]["tau_sum"], torch.full((3,), 0.5 * 0.15))
