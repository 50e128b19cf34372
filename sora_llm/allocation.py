"""The value of a rank and which ranks are kept: ΔW as singular components, chosen under a budget or a tolerance.

    ΔW = s · B diag(g) A = U diag(σ) Vᵀ        energy of a component: σ²        cost of a rank: c_m = I_m + O_m

Shape suffixes: I in, O out, R slots, K live components.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sora_llm.errors import NotFinite, UserError
from sora_llm.factors import live_slots

LIVE = 1e-9  # a component is live above this share of its module's largest singular value
ROUNDING = 1e-14  # and above this share of its slots' sizes: anything below is float64 residue of slots that cancel

Energies = Mapping[str, Sequence[float] | Tensor]  # module → the energy of each of its components or slots, ≥ 0
Kept = dict[str, list[int]]  # module → kept indices, ascending
Order = list[tuple[str, int]]  # (module, index), most valuable first

# ---------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Components:
    """The live part of a ΔW (O, I) = U diag(σ) Vᵀ in float64: σ (K,) descending, U (O, K), Vᵀ (K, I).

    The entry of largest magnitude in each column of U is positive.
    """

    sigma: Tensor
    U: Tensor
    Vt: Tensor

    @property
    def energies(self) -> list[float]:
        """σ² of every component: the increase of ‖error‖_F² if it is dropped."""
        return (self.sigma**2).tolist()

    def first(self, count: int) -> Components:
        """The `count` largest ones: the truncated SVD."""
        return Components(self.sigma[:count], self.U[:, :count], self.Vt[:count])


def components(A: Tensor, B: Tensor, gate: Tensor | None, scaling: float, name: str = "the adapter") -> Components:
    """The exact SVD of ΔW = s · B diag(g) A, without forming an O × I matrix.

    Thin QR of the live slots' Aᵀ = Q_A R_A and B = Q_B R_B, then the SVD of the core R_B diag(s·g) R_Aᵀ, which has at
    most min(R, I) columns and min(R, O) rows.  Components with σ > 1e-9 · σ₁ are kept; K = 0 if ΔW is 0, also if live
    slots cancel up to rounding (σ ≤ 1e-14 of the norm of all s·|g|·‖a‖·‖b‖).

    Args:
        A, B, gate: (R, I), (O, R), (R,) or None for ungated factors, of any dtype; R may exceed min(I, O).
        scaling: s.
        name: of the module, for the error.

    Raises:
        NotFinite: a live value is not finite.
    """
    g_R = torch.ones(A.shape[0], dtype=torch.float64, device=A.device) if gate is None else gate.detach().double()
    live_R = live_slots(A, gate)
    A_RI, B_OR = A.detach()[live_R].double(), B.detach()[:, live_R].double()
    qA_IP, rA_PR = torch.linalg.qr(A_RI.T)
    qB_OQ, rB_QR = torch.linalg.qr(B_OR)
    rB_QR = rB_QR * (scaling * g_R[live_R])
    core_QP = rB_QR @ rA_PR.T
    if not bool(torch.isfinite(core_QP).all()):
        raise NotFinite(f"{name} holds values that are not finite, so it has no singular components")
    u_QK, sigma_K, vt_KP = torch.linalg.svd(core_QP, full_matrices=False)
    slot_R = rB_QR.norm(dim=0) * rA_PR.norm(dim=0)
    alive_K = (sigma_K > LIVE * sigma_K[:1]) & (sigma_K > ROUNDING * slot_R.norm())
    U_OK, Vt_KI = qB_OQ @ u_QK[:, alive_K], vt_KP[alive_K] @ qA_IP.T
    sign_K = torch.sign(U_OK.gather(0, U_OK.abs().argmax(0, keepdim=True)))[0]
    return Components(sigma_K[alive_K], U_OK * sign_K, Vt_KI * sign_K[:, None])


def balanced(parts: Components, scaling: float, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Plain factors of the components: A (K, I) = diag(√(σ/s))·Vᵀ, B (O, K) = U·diag(√(σ/s)), so ΔW = s · B A.

    With `rank`, both factors are padded with zero components to that many slots.  float64, like the components.

    Raises:
        ValueError: s is not a positive number, or there are more than `rank` components.
    """
    if not 0 < scaling < math.inf:
        raise ValueError(f"scaling is {scaling}; balanced factors need a positive number")
    num_live, missing = parts.sigma.shape[0], 0
    if rank is not None:
        missing = rank - num_live
        if missing < 0:
            raise ValueError(f"{num_live} components do not fit into {rank} slots")
    root_K = (parts.sigma / scaling).sqrt()
    A_RI = torch.nn.functional.pad(root_K[:, None] * parts.Vt, (0, 0, 0, missing))
    B_OR = torch.nn.functional.pad(parts.U * root_K, (0, missing))
    return A_RI.contiguous(), B_OR.contiguous()


# ---------------------------------------------------------------------------------------------------- what is kept


def allocate(
    energies: Energies,
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 0,
    caps: Mapping[str, int] | None = None,
) -> Kept:
    """Spend `budget` parameters on the components of all modules.

    They are visited by descending energy / cost (ties: the modules' order, then the index).  One that does not fit is
    skipped and the visit continues, so the kept cost never exceeds the budget, and the unspent rest is less than the
    cheapest component left out.  Before the visit every module gets its `min_rank` best ones, or all if it has fewer.

    Args:
        energies: the value of each component: σ², or a slot's (s·|g|·‖a‖·‖b‖)².
        costs: c_m = I_m + O_m, the parameters of one rank.
        caps: min(I_m, O_m).  A module pays for no more ranks than that, so further slots are free: kept cost =
            Σ c_m · min(#, cap_m).  Components need no caps, since there are never more.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
        NotFinite: an energy is negative or not finite.
    """
    first, rest = _served_first(_visit(energies, costs), min_rank)
    _check_served(first, costs, caps, budget, min_rank)
    kept: Kept = {name: [] for name in energies}
    left = budget
    for name, index in first + rest:
        is_free = caps is not None and len(kept[name]) >= caps[name]
        price = 0 if is_free else costs[name]
        if price <= left:
            kept[name].append(index)
            left -= price
    return {name: sorted(indices) for name, indices in kept.items()}


def within_tolerance(energies: Energies, costs: Mapping[str, int], tolerance: float, min_rank: int = 0) -> Kept:
    """Drop the components with the least energy / cost while Σ dropped σ² ≤ t² · Σ σ², both over all modules.

    So the relative error ‖ΔW − kept‖_F / ‖ΔW‖_F over all modules together is at most `tolerance` (up to rounding of the
    sums); 0 is lossless.  The `min_rank` best components of every module stay.

    Raises:
        NotFinite: an energy is negative or not finite.
        ValueError: `tolerance` is not in [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is a relative error, 0 or more and below 1")
    first, rest = _served_first(_visit(energies, costs), min_rank)
    rising = rest[::-1]
    dropped = list(accumulate(float(energies[name][index]) for name, index in rising))
    limit = tolerance**2 * math.fsum(float(energies[name][index]) for name, index in first + rest)
    kept: Kept = {name: [] for name in energies}
    for name, index in first + rising[bisect_right(dropped, limit) :]:
        kept[name].append(index)
    return {name: sorted(indices) for name, indices in kept.items()}


def _visit(energies: Energies, costs: Mapping[str, int]) -> Order:
    """All entries by descending energy / cost; ties in the order of the modules, then of the indices."""
    worth: list[tuple[float, str, int]] = []
    for name, values in energies.items():
        for index, value in enumerate(map(float, values)):
            if not 0 <= value < math.inf:
                raise NotFinite(f"{name}: component {index} has energy {value}; it must be finite and 0 or more")
            worth.append((value / costs[name], name, index))
    worth.sort(key=lambda entry: -entry[0])  # stable
    return [(name, index) for _, name, index in worth]


def _served_first(order: Order, min_rank: int) -> tuple[Order, Order]:
    """The `min_rank` best of every module, and all others; both in the order of the visit."""
    first: Order = []
    rest: Order = []
    seen: Counter[str] = Counter()
    for name, index in order:
        (first if seen[name] < min_rank else rest).append((name, index))
        seen[name] += 1
    return first, rest


def _check_served(
    first: Order, costs: Mapping[str, int], caps: Mapping[str, int] | None, budget: int, min_rank: int
) -> None:
    counts = Counter(name for name, _ in first)
    needed = sum(costs[name] * (count if caps is None else min(count, caps[name])) for name, count in counts.items())
    if needed > budget:
        raise UserError(
            f"min_rank {min_rank} keeps {needed:,} parameters, more than the budget of {budget:,}; "
            "lower min_rank or raise the budget"
        )
