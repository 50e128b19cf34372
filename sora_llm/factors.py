"""The factors of adapters by module: types, ranks, sizes, and distances between ΔW.

Shape suffixes: I in, O out, R slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ModuleFactors = tuple[Tensor, Tensor, Tensor | None]  # A (R, I), B (O, R), g (R,) or None
Factors = Mapping[str, ModuleFactors]  # by module
PlainFactors = Mapping[str, tuple[Tensor, Tensor]]  # module → A (R, I), B (O, R)
Shapes = Mapping[str, tuple[int, int]]  # module → (I, O)
Scaling = float | Mapping[str, float]  # s: one for all modules, or one for each


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 copies on the CPU of tensors of one shape, in one transfer."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    together = torch.stack([tensor.detach().float().to(device) for tensor in tensors.values()]).cpu()
    return dict(zip(tensors, together.unbind(), strict=True))


def kept_ranks(gates: Mapping[str, Tensor]) -> dict[str, int]:
    """{module: number of gates that are not exactly 0}."""
    return {name: int(torch.count_nonzero(gate)) for name, gate in gates.items()}


def mean_rank(ranks: Mapping[str, int], shapes: Shapes) -> float:
    """Σ (I+O)·rank / Σ (I+O) over all target modules; `shapes` is {module: (I, O)}."""
    costs = costs_of(shapes)
    return sum(ranks[name] * cost for name, cost in costs.items()) / sum(costs.values())


def kept_params(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Σ (I+O)·min(rank, I, O), an exact integer; `shapes` is {module: (I, O)}."""
    return sum((i + o) * min(ranks[name], i, o) for name, (i, o) in shapes.items())


def slot_params(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Σ (I+O)·rank, exact: the number of values in the factors.  More than `kept_params` if a module has more slots
    than its ΔW can have ranks."""
    return sum((i + o) * ranks[name] for name, (i, o) in shapes.items())


def product_distance(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    """‖B1 A1 − B2 A2‖_F / ‖B1 A1‖_F in float64, without forming an O × I matrix (QR of the stacked factors).

    0 if both products are 0; infinite if only the first is.
    """
    difference = product_norm(torch.cat([A1.double(), A2.double()]), torch.cat([B1.double(), -B2.double()], dim=1))
    size = product_norm(A1.double(), B1.double())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖_F of A (R, I), B (O, R)."""
    if A.shape[0] == 0:
        return 0.0
    r_B = torch.linalg.qr(B, mode="r").R
    r_A = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_B @ r_A.T))


def product_energy(A: Tensor, B: Tensor, gate: Tensor | None, scaling: float) -> float:
    """‖s · B diag(g) A‖_F² in float64."""
    A_RI = A.detach().double() if gate is None else gate.detach().double()[:, None] * A.detach().double()
    return (scaling * product_norm(A_RI, B.detach().double())) ** 2


def live_slots(A: Tensor, gate: Tensor | None) -> Tensor:
    """Which slots have a non-zero gate, (R,) bool; all slots of ungated factors."""
    return torch.ones(A.shape[0], dtype=torch.bool, device=A.device) if gate is None else gate.detach() != 0


def shapes_of(factors: Factors | PlainFactors) -> dict[str, tuple[int, int]]:
    """{module: (I, O)}."""
    return {name: (A.shape[1], B.shape[0]) for name, (A, B, *_) in factors.items()}


def empty_factors(num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """A (0, I) and B (O, 0): the factors of a pruned module."""
    return torch.zeros(0, num_in), torch.zeros(num_out, 0)


def costs_of(shapes: Shapes) -> dict[str, int]:
    """{module: I + O}: the parameters of one rank."""
    return {name: i + o for name, (i, o) in shapes.items()}


def scaling_of(scaling: Scaling, name: str) -> float:
    """s of one module; `scaling` is one number for all modules or one for each."""
    return scaling[name] if isinstance(scaling, Mapping) else scaling
