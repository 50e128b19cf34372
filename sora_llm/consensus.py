"""Agreement between processes and the cut to what is kept: factors in, factors and verdicts out, no process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sora_llm.sora import keep_live_slots

Factors = Mapping[str, tuple[Tensor, Tensor, Tensor | None]]  # module → A (R, I), B (O, R), g (R,) or None


def tensor_hash(*tensors: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of the tensors: equal only for equal bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def disagreements(hashes: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Which tensors differ between processes, and on which.

    `hashes` holds one {name: hash} per process.  Returns {name: processes whose hash is not the most frequent one
    (the lowest process wins a tie)}; empty if all agree.
    """
    found = {}
    for name in sorted(set().union(*hashes)):
        seen = [per_process.get(name, "missing") for per_process in hashes]
        majority = max(seen, key=lambda value: (seen.count(value), -seen.index(value)))
        odd = [process for process, value in enumerate(seen) if value != majority]
        if odd:
            found[name] = odd
    return found


def kept_ranks(gates: Mapping[str, Tensor]) -> dict[str, int]:
    """{module: number of gates that are not exactly 0}."""
    return {name: int(torch.count_nonzero(gate)) for name, gate in gates.items()}


def mean_rank(ranks: Mapping[str, int], costs: Mapping[str, int]) -> float:
    """Σ rank·(I+O) / Σ (I+O) over all target modules; `costs` is {module: I+O}."""
    return sum(ranks[name] * cost for name, cost in costs.items()) / sum(costs.values())


def kept_params(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Σ (I+O)·min(rank, I, O), an exact integer; `shapes` is {module: (I, O)}."""
    return sum((i + o) * min(ranks[name], i, o) for name, (i, o) in shapes.items())


def cut_slots(factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """Consensus by slots: every module keeps the slots whose gate is not 0, gates folded into both factors."""
    return {name: keep_live_slots(*adapter) for name, adapter in factors.items()}


def product_distance(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    """‖B1 A1 − B2 A2‖_F / ‖B1 A1‖_F in float64, without forming an O × I matrix (QR of the stacked factors).

    0 where both products are 0; infinite where only the first is.
    """
    difference = _product_norm(torch.cat([A1.double(), A2.double()]), torch.cat([B1.double(), -B2.double()], dim=1))
    size = _product_norm(A1.double(), B1.double())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def _product_norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖_F of A (R, I), B (O, R)."""
    if A.shape[0] == 0:
        return 0.0
    r_B = torch.linalg.qr(B, mode="r").R
    r_A = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_B @ r_A.T))
