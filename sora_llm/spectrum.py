"""What the ΔW of an adapter are made of: singular values by module, from the factors alone.

effective rank = exp(−Σ p log p), p = σ / Σσ        (Roy & Vetterli, "The effective rank", EUSIPCO 2007)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sora_llm.allocation import components, within_tolerance
from sora_llm.consensus import Factors, Scaling, mean_rank, scaling_of


@dataclass(frozen=True)
class Spectrum:
    """ΔW (O, I) of one module: `slots` of its factors whose gates are not 0, and its singular values, falling."""

    num_in: int
    num_out: int
    slots: int
    scaling: float
    sigma: Tensor

    @property
    def rank(self) -> int:
        """Singular values that are more than rounding."""
        return len(self.sigma)

    @property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return float((self.sigma**2).sum())

    @property
    def effective_rank(self) -> float:
        """Of as many equal singular values ΔW would be as spread out; 0 for ΔW = 0."""
        if not self.rank:
            return 0.0
        share = self.sigma / self.sigma.sum()
        return math.exp(-float((share * share.log()).sum()))

    def share_of_first(self, count: int) -> float:
        """Of the energy, what the `count` largest components hold; 1 for ΔW = 0."""
        return float((self.sigma[:count] ** 2).sum()) / self.energy if self.rank else 1.0


def spectra(factors: Factors, scaling: Scaling) -> dict[str, Spectrum]:
    """{module: spectrum}.

    Raises:
        ValueError: a live value is not finite.
    """
    found = {}
    for name, (A, B, gate) in factors.items():
        slots = A.shape[0] if gate is None else int(gate.count_nonzero())
        own = scaling_of(scaling, name)
        found[name] = Spectrum(A.shape[1], B.shape[0], slots, own, components(A, B, gate, own, name).sigma)
    return found


def mean_rank_within(found: Mapping[str, Spectrum], costs: Mapping[str, int], tolerance: float) -> float:
    """The mean rank, over all modules of `costs` {module: I + O}, that keeps ΔW up to a relative error."""
    importance = {name: spectrum.sigma**2 for name, spectrum in found.items()}
    kept = within_tolerance(importance, costs, tolerance)
    return mean_rank({name: len(kept.get(name, ())) for name in costs}, costs)
