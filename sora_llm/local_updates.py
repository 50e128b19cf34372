"""Local updates: replicas take some optimizer steps independently, then synchronise.  Factors in, factors out.

    A, B    θ ← θ₀ − η (Δ + μ v),  Δ = θ₀ − mean_k θ_k,  v ← μ v + Δ        (η = 1, μ = 0: plain averaging)
    g       g ← prox of mean_k g_k; soft: S_T with T = Σ of the round's τ_t, averaged over replicas (a replica that
            skipped a step has no τ for it); adaptive: the quantile of the mean gates' importance

θ₀ is the last agreed state.  Gates are not thresholded inside a round: a prox in each replica would shrink by each
replica's noise, and the mean of different supports is dense.

Sources: Stich, "Local SGD converges fast and communicates little", ICLR 2019; Douillard et al., "DiLoCo", 2023,
arXiv 2311.08105 (the outer Nesterov step).  Shape suffixes: I in, O out, R slots, K replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sora_llm.factors import ModuleFactors


@dataclass(frozen=True)
class Drift:
    """The distance of slot-by-slot averaging from the mean of products: ‖mean(B g A) − mean(B) mean(g) mean(A)‖_F² and
    ‖mean(B g A)‖_F², summed over modules of one scale."""

    error_energy: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.error_energy + other.error_energy, self.energy + other.energy)

    @property
    def relative(self) -> float:
        """The error's norm in units of the mean's; 0 if both are 0."""
        if self.error_energy <= 0.0:
            return 0.0
        return float("inf") if self.energy <= 0.0 else (self.error_energy / self.energy) ** 0.5


def average(replicas: Sequence[ModuleFactors]) -> tuple[ModuleFactors, Drift]:
    """The slot-wise mean of one module's factors over replicas, rounded once to their dtype, and its drift.

    No O × I matrix is formed; float64 inside, so the drift is accurate to about 1e-8 relative.
    """
    A_KRI = torch.stack([A for A, _, _ in replicas]).double()
    B_KOR = torch.stack([B for _, B, _ in replicas]).double()
    gates = [gate for _, _, gate in replicas if gate is not None]
    gate_KR = torch.stack(gates).double() if gates else A_KRI.new_ones(A_KRI.shape[:2])
    A, B, gate = A_KRI.mean(0), B_KOR.mean(0), gate_KR.mean(0)
    num_replicas = len(replicas)
    if num_replicas == 1:
        return replicas[0], Drift(0.0, _energy(A, B, gate))
    slots_A = torch.cat([*A_KRI, A])
    slots_B = torch.cat([*B_KOR, B], dim=1)
    drift = Drift(
        _energy(slots_A, slots_B, torch.cat([gate_KR.flatten() / num_replicas, -gate])),
        _energy(slots_A[: -len(A)], slots_B[:, : -len(A)], gate_KR.flatten() / num_replicas),
    )
    dtype = replicas[0][0].dtype
    return (A.to(dtype), B.to(dtype), gate.to(dtype) if gates else None), drift


def _energy(A_RI: Tensor, B_OR: Tensor, weight_R: Tensor) -> float:
    """‖B diag(w) A‖_F² = wᵀ ((A Aᵀ) ∘ (Bᵀ B)) w."""
    return float(weight_R @ ((A_RI @ A_RI.T) * (B_OR.T @ B_OR)) @ weight_R)


@dataclass
class OuterOptimizer:
    """SGD on Δ = θ₀ − mean θ with Nesterov momentum, as in DiLoCo; `velocity` v by name, empty without momentum."""

    learning_rate: float = 1.0
    momentum: float = 0.0
    velocity: dict[str, Tensor] = field(default_factory=dict)

    def step(self, name: str, start: Tensor, mean: Tensor) -> Tensor:
        """The new value of tensor `name` from `start` and the replicas' `mean`; the mean itself for η = 1, μ = 0."""
        if self.momentum == 0.0:
            return mean if self.learning_rate == 1.0 else start - self.learning_rate * (start - mean)
        gradient = start - mean
        velocity = self.velocity.get(name)
        velocity = gradient.clone() if velocity is None else self.momentum * velocity + gradient
        self.velocity[name] = velocity
        return start - self.learning_rate * (gradient + self.momentum * velocity)


def shrink_gates(gate: Tensor, mean: Tensor, agreed: Tensor) -> Tensor:
    """A replica's gate (R,) after the prox mapped the mean gate to `agreed`: shrunk in the same proportion.

    So the mean over replicas is `agreed`, no gate lives that is 0 in it, and none changes sign.  A gate that is already
    0 stays 0, even if others revived the mean.
    """
    return torch.where(agreed == 0, torch.zeros_like(gate), gate * (agreed / mean))


def owners(sizes: Mapping[str, int], num_owners: int) -> list[list[str]]:
    """The modules each of `num_owners` averages: in descending size, each to the least loaded; the same everywhere."""
    parts: list[list[str]] = [[] for _ in range(num_owners)]
    loads = [0] * num_owners
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += sizes[name]
    return parts


def round_bytes(num_values: int, num_replicas: int) -> int:
    """Bytes each replica sends, and receives, in a round: float32 values to their owners, and the averages back,
    2 (K − 1)/K of them.  An all-reduce moves as much, and DDP does one at every step."""
    return round(2 * 4 * num_values * (num_replicas - 1) / num_replicas)


def transfer_seconds(num_bytes: int, gbit_per_second: float) -> float:
    """Time on an otherwise idle link of `gbit_per_second` in each direction; latency is not counted."""
    return 8 * num_bytes / (gbit_per_second * 1e9)
