"""Merging diverged replicas of an adapter: the best low-rank approximation of the mean of their products.

    ΔW̄ = Σ_k w_k s_k B_k diag(g_k) A_k,  Σ w_k = 1        (the mean of products, not the product of means)

Shape suffixes: I in, O out, R slots (of all replicas together), N slots of all modules, K replicas.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from sora_llm.allocation import components
from sora_llm.consensus import CutReport, keep_components
from sora_llm.errors import UserError
from sora_llm.factors import (
    Factors,
    PlainFactors,
    Scaling,
    live_slots,
    product_distance,
    scaling_of,
    shapes_of,
)
from sora_llm.hashes import tensor_hash

MOST_WEIGHT = 1e300


@dataclass(frozen=True)
class WeightedAdapter:
    """One of several adapters of the same base: its weight in the mean (≥ 0, any scale), its factors and its s.

    A module that it does not name, or has no live slot for, adds 0 to the mean; its weight still counts.
    """

    weight: float
    factors: Factors
    scaling: Scaling


@dataclass(frozen=True)
class ReplicaReport:
    """How one replica relates to the mean of products ΔW̄, over all modules together.

    `weight` is its share in the mean, `energy` ‖ΔW_k‖_F², `cosine` ⟨ΔW_k, ΔW̄⟩ / (‖ΔW_k‖ ‖ΔW̄‖) (None if either is 0),
    `distance` ‖ΔW_k − ΔW̄‖ / ‖ΔW̄‖ (None if ΔW̄ is 0).  Computed from inner products in float64: a distance between
    different replicas is accurate to about 1e-8, that of a single replica is exactly 0.
    """

    weight: float
    energy: float
    cosine: float | None
    distance: float | None


@dataclass(frozen=True)
class Merged:
    """The merged adapter and the agreement of the replicas, without those of weight 0.

    Attributes:
        factors: {module: (A (R', I), B (O, R'))}, modules sorted by name; R' = 0 if nothing is kept.
        report: ranks, energy of ΔW̄, dropped energy.
        jaccard: |S_k ∩ S_l| / |S_k ∪ S_l| of the supports (live slots) over the modules whose slots correspond: all
            replicas that have the module have gates of one length.  Mean over all pairs of replicas (1 for two empty
            supports); None without a pair or without such modules.
        replicas: in the order given.
        num_distinct: the number of bitwise distinct ones.
    """

    factors: PlainFactors
    report: CutReport
    jaccard: float | None
    replicas: list[ReplicaReport]
    num_distinct: int


class _Distinct(NamedTuple):
    """Bitwise distinct replicas, in the order of their hashes; `shares` sum to 1, `copies` are counts."""

    replicas: list[WeightedAdapter]
    shares: list[float]
    copies: list[int]
    place: list[int | None]  # for each given replica: its index here, None if its weight is 0


class _Stack(NamedTuple):
    """The live slots of one module in all replicas, float64: A (R, I), B (O, R), s·g (R,), which replica's (R,)."""

    A_RI: Tensor
    B_OR: Tensor
    g_R: Tensor
    owner_R: Tensor

    def in_mean(self, shares: Sequence[float]) -> Tensor:
        """w_k · s · g of every slot (R,): it adds this times b aᵀ to ΔW̄."""
        return self.g_R.new_tensor(shares)[self.owner_R] * self.g_R


def merge(
    replicas: Sequence[WeightedAdapter],
    budget: int | None = None,
    tolerance: float | None = None,
    min_rank: int = 0,
    scaling: Scaling = 1.0,
    max_ranks: Mapping[str, int] | None = None,
) -> Merged:
    """The best low-rank form of the mean of products ΔW̄ = Σ_k w_k s_k B_k diag(g_k) A_k, Σ w_k = 1.

    Before any arithmetic, bit-identical replicas become one with the summed weight, weight 0 is dropped, and the rest
    is sorted by hash: K copies equal one copy, and neither order nor replicas of weight 0 change a bit of the factors.
    Then the components of the stacked slots are taken per module (`components`); no O × I matrix is formed.  A module's
    merged rank may exceed its rank in every replica.

    Args:
        budget, tolerance, min_rank: what to keep, as for `cut_svd`; everything with neither budget nor tolerance.
        max_ranks: the maximum number of components per module, whatever their weight; None is no limit.
        scaling: the s for the result, outside its factors: ΔW̄ = s · B A.

    The result has the widest dtype of the replicas' factors, rounded once.

    Raises:
        UserError: a weight that is negative or not finite, no positive weight, a module whose shape differs between
            replicas, or a `min_rank` that costs more than the budget.
        NotFinite: a live value is not finite.
        ValueError: both a budget and a tolerance are given.
    """
    distinct = _collapse(replicas)
    shapes = _common_shapes(distinct.replicas)
    gram_KK = torch.zeros(len(distinct.replicas), len(distinct.replicas), dtype=torch.float64)
    parts, dtypes, beyond = {}, {}, 0.0
    for name in shapes:
        stack = _stack(distinct.replicas, name)
        parts[name] = components(stack.A_RI, stack.B_OR, stack.in_mean(distinct.shares), 1.0, name)
        if max_ranks is not None:
            beyond += float((parts[name].sigma[max_ranks[name] :] ** 2).sum())
            parts[name] = parts[name].first(max_ranks[name])
        gram_KK += _inner_products(stack, len(distinct.replicas))
        dtypes[name] = _widest([replica.factors[name][0] for replica in distinct.replicas if name in replica.factors])
    factors, report = keep_components(
        parts, shapes, scaling, dtypes, budget=budget, tolerance=tolerance, min_rank=min_rank
    )
    report = replace(report, energy=report.energy + beyond, dropped_energy=report.dropped_energy + beyond)
    supports = _supports(distinct.replicas, shapes)
    return Merged(
        factors,
        report,
        jaccard=mean_jaccard(torch.cat(list(supports.values()), dim=1), distinct.copies) if supports else None,
        replicas=_replica_reports(replicas, distinct, gram_KK, report.energy),
        num_distinct=len(distinct.replicas),
    )


def merge_errors(replicas: Sequence[WeightedAdapter], merged: PlainFactors) -> dict[str, float]:
    """{module: ‖ΔW̄ − B A‖_F / ‖ΔW̄‖_F} of merged factors against the mean of products, in float64.

    0 if both are 0.  Computed from the stacked factors again, so it also covers factors that went through a file.
    """
    distinct = _collapse(replicas)
    errors = {}
    for name in _common_shapes(distinct.replicas):
        stack = _stack(distinct.replicas, name)
        A, B = merged[name]
        errors[name] = product_distance(stack.A_RI, stack.B_OR * stack.in_mean(distinct.shares), A, B)
    return errors


def _collapse(replicas: Sequence[WeightedAdapter]) -> _Distinct:
    for replica in replicas:
        if not 0 <= replica.weight <= MOST_WEIGHT:
            raise UserError(
                f"a replica has weight {replica.weight}; weights must be finite numbers from 0 to {MOST_WEIGHT:g} "
                "(they are summed)"
            )
    hashes = [_replica_hash(replica) if replica.weight > 0 else None for replica in replicas]
    order = sorted({value for value in hashes if value is not None})
    if not order:
        raise UserError("there is nothing to merge: give at least one replica of positive weight")
    members = [[index for index, value in enumerate(hashes) if value == wanted] for wanted in order]
    sums = [math.fsum(replicas[index].weight for index in group) for group in members]
    return _Distinct(
        replicas=[replicas[group[0]] for group in members],
        shares=[value / math.fsum(sums) for value in sums],
        copies=[len(group) for group in members],
        place=[None if value is None else order.index(value) for value in hashes],
    )


def _replica_hash(replica: WeightedAdapter) -> str:
    """Equal only for the same modules with equal bits and equal s."""
    digest = hashlib.sha256()
    for name in sorted(replica.factors):
        tensors = [tensor for tensor in replica.factors[name] if tensor is not None]
        digest.update(f"{name}\n{float(scaling_of(replica.scaling, name)).hex()}\n{tensor_hash(*tensors)}\n".encode())
    return digest.hexdigest()


def _common_shapes(replicas: Sequence[WeightedAdapter]) -> dict[str, tuple[int, int]]:
    """(I, O) of every module that any replica has, by name."""
    shapes: dict[str, tuple[int, int]] = {}
    for replica in replicas:
        for name, shape in shapes_of(replica.factors).items():
            if shapes.setdefault(name, shape) != shape:
                raise UserError(
                    f"{name} is {shapes[name][0]} → {shapes[name][1]} in one replica and {shape[0]} → {shape[1]} in "
                    "another; only adapters of the same base model can be merged"
                )
    return dict(sorted(shapes.items()))


def _stack(replicas: Sequence[WeightedAdapter], name: str) -> _Stack:
    A_RI, B_OR, g_R, owner_R = [], [], [], []
    for index, replica in enumerate(replicas):
        if name not in replica.factors:
            continue
        A, B, gate = replica.factors[name]
        ones_R = torch.ones(A.shape[0], dtype=torch.float64, device=A.device)
        gate_R = ones_R if gate is None else gate.detach().double()
        live_R = live_slots(A, gate)
        A_RI.append(A.detach()[live_R].double())
        B_OR.append(B.detach()[:, live_R].double())
        g_R.append(scaling_of(replica.scaling, name) * gate_R[live_R])
        owner_R.append(torch.full_like(g_R[-1], index, dtype=torch.long))
    return _Stack(torch.cat(A_RI), torch.cat(B_OR, dim=1), torch.cat(g_R), torch.cat(owner_R))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _inner_products(stack: _Stack, num_replicas: int) -> Tensor:
    """⟨ΔW_k, ΔW_l⟩ (K, K) of one module: Σ over slots i of k, j of l of g_i g_j (b_i·b_j) (a_i·a_j)."""
    slots_RR = (stack.A_RI @ stack.A_RI.T) * (stack.B_OR.T @ stack.B_OR) * stack.g_R * stack.g_R[:, None]
    member_RK = torch.nn.functional.one_hot(stack.owner_R, num_replicas).double()
    return (member_RK.T @ slots_RR @ member_RK).cpu()


def _supports(replicas: Sequence[WeightedAdapter], names: Iterable[str]) -> dict[str, Tensor]:
    """{module: live slots (K, R)} of the modules whose slots correspond; a replica without the module has none."""
    supports = {}
    for name in names:
        gates = {k: replica.factors[name][2] for k, replica in enumerate(replicas) if name in replica.factors}
        live = {k: gate.detach().cpu() != 0 for k, gate in gates.items() if gate is not None}
        if len(live) < len(gates) or len({len(row) for row in live.values()}) > 1:
            continue
        nothing = torch.zeros_like(next(iter(live.values())))
        supports[name] = torch.stack([live.get(k, nothing) for k in range(len(replicas))])
    return supports


def mean_jaccard(support_KN: Tensor, copies: Sequence[int]) -> float | None:
    """|S_k ∩ S_l| / |S_k ∪ S_l| of boolean supports, `copies` of each, mean over pairs; None without a pair."""
    num_replicas = sum(copies)
    if num_replicas < 2:
        return None
    overlaps = [count * (count - 1) / 2 for count in copies]  # copies agree fully
    for k, other in combinations(range(len(copies)), 2):
        union = int((support_KN[k] | support_KN[other]).sum())
        shared = int((support_KN[k] & support_KN[other]).sum())
        overlaps.append(copies[k] * copies[other] * (shared / union if union else 1.0))
    return math.fsum(overlaps) / (num_replicas * (num_replicas - 1) / 2)


def _replica_reports(
    replicas: Sequence[WeightedAdapter], distinct: _Distinct, gram_KK: Tensor, mean_energy: float
) -> list[ReplicaReport]:
    total = math.fsum(replica.weight for replica in replicas)
    shares_K = torch.tensor(distinct.shares, dtype=torch.float64)
    reports = []
    for replica, place in zip(replicas, distinct.place, strict=True):
        if place is None:
            continue
        energy = max(0.0, float(gram_KK[place, place]))
        away_K = -shares_K
        away_K[place] += 1
        distance = cosine = None
        if mean_energy > 0:
            distance = math.sqrt(max(0.0, float(away_K @ gram_KK @ away_K)) / mean_energy)
            if energy > 0:
                cosine = float(gram_KK[place] @ shares_K) / math.sqrt(energy * mean_energy)
        reports.append(ReplicaReport(replica.weight / total, energy, cosine, distance))
    return reports
