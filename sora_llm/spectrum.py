"""Singular values of an adapter's ΔW by module, computed from the factors.

effective rank = exp(−Σ p log p), p = σ / Σσ        (Roy & Vetterli, "The effective rank", EUSIPCO 2007)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sora_llm.allocation import allocate, components, within_tolerance
from sora_llm.factors import Factors, Scaling, costs_of, live_slots, scaling_of, shapes_of


@dataclass(frozen=True)
class Spectrum:
    """ΔW (O, I) of one module: its `shape` (I, O), `slots` of its factors with non-zero gates, and its singular values,
    descending."""

    shape: tuple[int, int]
    slots: int
    scaling: float
    sigma: Tensor

    @property
    def rank(self) -> int:
        """The number of singular values above rounding."""
        return len(self.sigma)

    @property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return float((self.sigma**2).sum())

    @property
    def effective_rank(self) -> float:
        """The number of equal singular values that would be as spread out as those of ΔW; 0 for ΔW = 0."""
        if not self.rank:
            return 0.0
        share = self.sigma / self.sigma.sum()
        return math.exp(-float((share * share.log()).sum()))

    def share_of_first(self, count: int) -> float:
        """The share of the energy that the `count` largest components hold; 1 for ΔW = 0."""
        return float((self.sigma[:count] ** 2).sum()) / self.energy if self.rank else 1.0


def spectra(factors: Factors, scaling: Scaling) -> dict[str, Spectrum]:
    """{module: spectrum}.

    Raises:
        NotFinite: a live value is not finite.
    """
    found = {}
    shapes = shapes_of(factors)
    for name, (A, B, gate) in factors.items():
        slots = int(live_slots(A, gate).sum())
        own = scaling_of(scaling, name)
        found[name] = Spectrum(shapes[name], slots, own, components(A, B, gate, own, name).sigma)
    return found


def ranks_within(
    found: Mapping[str, Spectrum], *, budget: int | None = None, tolerance: float | None = None, min_rank: int = 0
) -> dict[str, int]:
    """{module: rank} that keeps the most valuable components by σ²/(I + O): within `budget` parameters, or up to the
    relative error `tolerance` of all ΔW together; with neither, all of them.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
    """
    assert budget is None or tolerance is None, "two ways to say one thing"
    energies = {name: spectrum.sigma**2 for name, spectrum in found.items()}
    costs = costs_of({name: spectrum.shape for name, spectrum in found.items()})
    if budget is not None:
        kept = allocate(energies, costs, budget, min_rank)
    else:
        kept = within_tolerance(energies, costs, tolerance or 0.0, min_rank)
    return {name: len(indices) for name, indices in kept.items()}


def lora_options(ranks: Mapping[str, int], scaling: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of a PEFT LoraConfig whose modules have exactly these ranks above 0 and these scales (alpha / r).

    Modules of rank 0, which PEFT refuses, are not targets.  Names are full, also in the patterns: PEFT uses the first
    pattern that the end of a module's name matches, and sorts them on saving.
    """
    live = {name: rank for name, rank in ranks.items() if rank}
    alphas = {name: _plain(scaling[name] * rank) for name, rank in live.items()}
    r, lora_alpha = _commonest(live.values()), _commonest(alphas.values())
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": list(live),
        "rank_pattern": {name: rank for name, rank in live.items() if rank != r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora_alpha},
        "use_rslora": False,
    }


def _plain(value: float) -> float | int:
    """The value, as an integer if it is one up to rounding."""
    return round(value) if abs(value - round(value)) <= 1e-9 * abs(value) else value


def _commonest(values: Collection[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
