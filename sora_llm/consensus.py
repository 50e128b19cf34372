"""Cutting adapters, by slots or singular components: factors in, factors and a report out, no process group.

Shape suffixes: I in, O out, R slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_llm.allocation import Components, allocate, balanced, components, within_tolerance
from sora_llm.errors import NotFinite
from sora_llm.factors import (
    Factors,
    PlainFactors,
    Scaling,
    Shapes,
    costs_of,
    kept_params,
    live_slots,
    product_energy,
    scaling_of,
    shapes_of,
)
from sora_llm.sora import keep_live_slots


@dataclass(frozen=True)
class CutReport:
    """The result of a cut: what it kept and lost.

    `ranks` are kept slots or components per module; `energy` is Σ ‖ΔW‖_F² over all modules before the cut (Σ σ²) and
    `dropped_energy` that of the dropped part, before the result is rounded to its dtype; `kept_params` is
    Σ c_m · min(rank, I_m, O_m).  With a budget, `unspent` is the rest of it, and `shortfall` its excess over the cost
    of everything alive (0 if it had to choose); None without one.
    """

    ranks: dict[str, int]
    energy: float
    dropped_energy: float
    kept_params: int
    unspent: int | None
    shortfall: int | None

    @property
    def dropped_share(self) -> float:
        """The share of Σ ‖ΔW‖² that was dropped; 0 if there was nothing."""
        return self.dropped_energy / self.energy if self.energy else 0.0

    @property
    def relative_error(self) -> float:
        """‖ΔW − kept part‖_F / ‖ΔW‖_F over all modules together."""
        return math.sqrt(self.dropped_share)


def joined(reports: Sequence[CutReport]) -> CutReport:
    """Cuts of different modules as one; all with a budget or all without."""
    return CutReport(
        ranks={name: rank for report in reports for name, rank in report.ranks.items()},
        energy=sum(report.energy for report in reports),
        dropped_energy=sum(report.dropped_energy for report in reports),
        kept_params=sum(report.kept_params for report in reports),
        unspent=_sum_of_budgets([report.unspent for report in reports]),
        shortfall=_sum_of_budgets([report.shortfall for report in reports]),
    )


def _sum_of_budgets(values: Sequence[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    assert len(found) in (0, len(values)), "some were cut under a budget, and some without"
    return sum(found) if found else None


def cut_slots(
    factors: Factors, scaling: Scaling = 1.0, budget: int | None = None, min_rank: int = 0
) -> tuple[PlainFactors, CutReport]:
    """Cut every module to a subset of its slots, with gates folded half into each factor (`keep_live_slots`).

    Without a budget every slot with a non-zero gate is kept.  With one, `allocate` picks slots by
    (s·|g|·‖a‖·‖b‖)² / c_m, and a module pays for at most min(I, O) of them; s only weighs the modules against each
    other and stays outside the result: ΔW = s · B A.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
        NotFinite: a live value is not finite.
    """
    shapes = shapes_of(factors)
    live = {name: live_slots(A, gate) for name, (A, _, gate) in factors.items()}
    kept = live
    energies = {
        name: _slot_energies(*factors[name], scaling_of(scaling, name))[live_R] for name, live_R in live.items()
    }
    for name, energies_R in energies.items():
        if not bool(energies_R.isfinite().all()):
            raise NotFinite(f"{name} has slots that are not finite")
    if budget is not None:
        caps = {name: min(shape) for name, shape in shapes.items()}
        chosen = allocate(energies, costs_of(shapes), budget, min_rank, caps)
        kept = {name: _only(live_R, chosen[name]) for name, live_R in live.items()}
    dropped = {name: live[name] & ~kept[name] for name in factors}

    def energy(slots: Mapping[str, Tensor]) -> float:
        return math.fsum(
            product_energy(*_masked(*adapter, slots[name]), scaling_of(scaling, name))
            for name, adapter in factors.items()
        )

    cut = {name: _keep_slots(*adapter, kept[name]) for name, adapter in factors.items()}
    return cut, _report(_counts(kept), _counts(live), shapes, energy(live), energy(dropped), budget)


def cut_svd(
    factors: Factors,
    scaling: Scaling,
    budget: int | None = None,
    min_rank: int = 0,
    tolerance: float | None = None,
) -> tuple[PlainFactors, CutReport]:
    """Cut every module to the largest singular components of its ΔW = s · B diag(g) A, in balanced form.

    With a budget, components of all modules are kept by σ²/c_m (`allocate`); with a tolerance, they are dropped up to
    that relative error (`within_tolerance`); with neither, the cut is lossless.  s stays outside the result:
    ΔW = s · B A.  Computed in float64 and rounded once to the dtype of A; all modules' components are held at once,
    twice the size of live float32 factors.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
        NotFinite: a live value is not finite.
        ValueError: both a budget and a tolerance are given.
    """
    parts = {name: components(*adapter, scaling_of(scaling, name), name) for name, adapter in factors.items()}
    dtypes = {name: A.dtype for name, (A, _, _) in factors.items()}
    return keep_components(
        parts, shapes_of(factors), scaling, dtypes, budget=budget, tolerance=tolerance, min_rank=min_rank
    )


def keep_components(
    parts: Mapping[str, Components],
    shapes: Shapes,
    scaling: Scaling,
    dtypes: Mapping[str, torch.dtype],
    *,
    budget: int | None,
    tolerance: float | None,
    min_rank: int,
) -> tuple[PlainFactors, CutReport]:
    """Choose among the components of all modules and make plain factors from those kept, as in `cut_svd`."""
    if budget is not None and tolerance is not None:
        raise ValueError("a budget and a tolerance are two ways to choose: give one of them")
    energies = {name: part.energies for name, part in parts.items()}
    live = {name: len(values) for name, values in energies.items()}
    ranks = live
    if budget is not None:
        ranks = {name: len(kept) for name, kept in allocate(energies, costs_of(shapes), budget, min_rank).items()}
    elif tolerance is not None:
        kept_within = within_tolerance(energies, costs_of(shapes), tolerance, min_rank)
        ranks = {name: len(kept) for name, kept in kept_within.items()}
    cut = {}
    for name, part in parts.items():
        # σ is descending, so the components kept are the first ones.
        A, B = balanced(part.first(ranks[name]), scaling_of(scaling, name))
        cut[name] = A.to(dtypes[name]), B.to(dtypes[name])
    energy = math.fsum(value for values in energies.values() for value in values)
    dropped = math.fsum(value for name, values in energies.items() for value in values[ranks[name] :])
    return cut, _report(ranks, live, shapes, energy, dropped, budget)


def _report(
    ranks: dict[str, int],
    live: Mapping[str, int],
    shapes: Shapes,
    energy: float,
    dropped_energy: float,
    budget: int | None,
) -> CutReport:
    cost = kept_params(ranks, shapes)
    if budget is None:
        return CutReport(ranks, energy, dropped_energy, cost, None, None)
    return CutReport(ranks, energy, dropped_energy, cost, budget - cost, max(0, budget - kept_params(live, shapes)))


def _slot_energies(A: Tensor, B: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    """(s·|g|·‖a‖·‖b‖)² of every slot (R,): the energy of its part of ΔW, whatever the gauge."""
    size_R = scaling * A.detach().double().norm(dim=1) * B.detach().double().norm(dim=0)
    return (size_R if gate is None else size_R * gate.detach().double()) ** 2


def _only(live_R: Tensor, chosen: Sequence[int]) -> Tensor:
    """The mask of the live slots whose index among the live ones is in `chosen`."""
    kept_R = torch.zeros_like(live_R)
    kept_R[live_R.nonzero()[:, 0][list(chosen)]] = True
    return kept_R


def _masked(A: Tensor, B: Tensor, gate: Tensor | None, mask_R: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return A[mask_R], B[:, mask_R], None if gate is None else gate[mask_R]


def _keep_slots(A: Tensor, B: Tensor, gate: Tensor | None, kept_R: Tensor) -> tuple[Tensor, Tensor]:
    if gate is None and bool(kept_R.all()):
        return A, B
    return keep_live_slots(*_masked(A, B, gate, kept_R))


def _counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}
