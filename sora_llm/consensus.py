"""Agreement between processes and the cut to what is kept: factors in, factors and verdicts out, no process group.

Shape suffixes: I in, O out, R slots.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_llm.allocation import Components, allocate, balanced, components, within_tolerance
from sora_llm.sora import keep_live_slots

ModuleFactors = tuple[Tensor, Tensor, Tensor | None]  # A (R, I), B (O, R), g (R,) or None
Factors = Mapping[str, ModuleFactors]  # by module
PlainFactors = Mapping[str, tuple[Tensor, Tensor]]  # module → A (R, I), B (O, R)
Shapes = Mapping[str, tuple[int, int]]  # module → (I, O)
Scaling = float | Mapping[str, float]  # s: of all modules, or of each

# ------------------------------------------------------------------------------------------ hashes, ranks, distance


def tensor_hash(*tensors: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of the tensors: equal only for equal bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor its dtype, its shape and 64 bits of its bytes, computed where it lies: for checks while training.

    The bytes, as 64-bit words x, become Σ w_i m(x_i) mod 2⁶⁴ with fixed odd weights w and a mixing bijection m, so that
    one wrong word always changes it, and wrong words that have a pattern do not cancel.  Made against faults, not
    forgers: those need `tensor_hash`.
    """
    words = [_weighted_words(tensor) for tensor in tensors.values()]
    sums = torch.stack(words).tolist() if words else []
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {value & (2**64 - 1):016x}"
        for (name, tensor), value in zip(tensors.items(), sums, strict=True)
    }


_BLOCK, _MIX = 1 << 16, -7046029254386353131  # 2⁶⁴ over the golden ratio, odd, as a signed number


def _weighted_words(tensor: Tensor) -> Tensor:
    """Σ w_i x_i of one tensor's words, a scalar int64 on its device; w of a block times w of the place in it."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    short = -len(data) % 8
    words = torch.nn.functional.pad(data, (0, short)).view(torch.int64) if short else data.view(torch.int64)
    words = words * _MIX
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    whole = len(words) // _BLOCK * _BLOCK
    places = _odd_weights(min(len(words), _BLOCK), words.device, first=1)
    blocks = [(words[:whole].view(-1, _BLOCK) * places).sum(1)] if whole else []
    if whole < len(words):
        rest = words[whole:]
        blocks.append((rest * places[: len(rest)]).sum()[None])
    if not blocks:
        return torch.zeros((), dtype=torch.int64, device=words.device)
    sums = torch.cat(blocks)
    return (sums * _odd_weights(len(sums), words.device, first=1 << 40)).sum()


def _odd_weights(count: int, device: torch.device, first: int) -> Tensor:
    """Fixed odd 64-bit numbers without a pattern: the counter through splitmix64's multiplications and shifts
    (Steele et al., "Fast splittable pseudorandom number generators", 2014)."""
    mixed = torch.arange(first, first + count, dtype=torch.int64, device=device) * _MIX
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return mixed | 1


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


def kept_params(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Σ (I+O)·min(rank, I, O), an exact integer; `shapes` is {module: (I, O)}."""
    return sum((i + o) * min(ranks[name], i, o) for name, (i, o) in shapes.items())


def product_distance(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    """‖B1 A1 − B2 A2‖_F / ‖B1 A1‖_F in float64, without forming an O × I matrix (QR of the stacked factors).

    0 where both products are 0; infinite where only the first is.
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


def _product_energy(A: Tensor, B: Tensor, gate: Tensor | None, scaling: float) -> float:
    """‖s · B diag(g) A‖_F² in float64."""
    A_RI = A.detach().double() if gate is None else gate.detach().double()[:, None] * A.detach().double()
    return (scaling * product_norm(A_RI, B.detach().double())) ** 2


# ------------------------------------------------------------------------------------------------------------- cuts


@dataclass(frozen=True)
class CutReport:
    """What a cut kept and what it cost.

    `ranks` are kept slots or components per module; `energy` is Σ ‖ΔW‖_F² over all modules before the cut (Σ σ²) and
    `dropped_energy` that of what was dropped, before the result is rounded to its dtype; `kept_cost` is
    Σ c_m · min(rank, I_m, O_m).  With a budget `unspent` is what is left of it, and `shortfall` what it has beyond the
    cost of everything that is alive (0 where it had to choose); None without one.
    """

    ranks: dict[str, int]
    energy: float
    dropped_energy: float
    kept_cost: int
    unspent: int | None
    shortfall: int | None


def cut_slots(
    factors: Factors, scaling: Scaling = 1.0, budget: int | None = None, min_rank: int = 0
) -> tuple[PlainFactors, CutReport]:
    """Cut every module to slots it has, gates folded half into either factor (`keep_live_slots`).

    Without a budget every slot whose gate is not 0 is kept.  With one, `allocate` takes slots by
    (s·|g|·‖a‖·‖b‖)² / c_m, and a module pays for at most min(I, O) of them; s only weighs the modules against each
    other and stays outside the result: ΔW = s · B A.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
        ValueError: with a budget, a live value is not finite.
    """
    shapes = shapes_of(factors)
    live = {name: _live_slots(A, gate) for name, (A, _, gate) in factors.items()}
    kept = live
    if budget is not None:
        importance = {
            name: _slot_importance(*factors[name], scaling_of(scaling, name))[live_R] for name, live_R in live.items()
        }
        caps = {name: min(shape) for name, shape in shapes.items()}
        chosen = allocate(importance, _costs(shapes), budget, min_rank, caps)
        kept = {name: _only(live_R, chosen[name]) for name, live_R in live.items()}
    dropped = {name: live[name] & ~kept[name] for name in factors}

    def energy(slots: Mapping[str, Tensor]) -> float:
        return math.fsum(
            _product_energy(*_masked(*adapter, slots[name]), scaling_of(scaling, name))
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

    With a budget components of all modules are kept by σ²/c_m (`allocate`), with a tolerance they are dropped up to
    that relative error (`within_tolerance`), with neither the cut is lossless.  s stays outside the result:
    ΔW = s · B A.  Computed in float64 and rounded once to the dtype of A; all modules' components are held at once,
    twice the size of live float32 factors.

    Raises:
        UserError: `min_rank` alone costs more than the budget.
        ValueError: a live value is not finite, or both a budget and a tolerance are given.
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
    """Choose among the components of all modules and make plain factors of those kept, as `cut_svd` says."""
    if budget is not None and tolerance is not None:
        raise ValueError("a budget and a tolerance are two ways to choose: give one of them")
    importance = {name: part.importance for name, part in parts.items()}
    live = {name: len(values) for name, values in importance.items()}
    ranks = live
    if budget is not None:
        ranks = {name: len(kept) for name, kept in allocate(importance, _costs(shapes), budget, min_rank).items()}
    elif tolerance is not None:
        kept_within = within_tolerance(importance, _costs(shapes), tolerance, min_rank)
        ranks = {name: len(kept) for name, kept in kept_within.items()}
    cut = {}
    for name, part in parts.items():
        # σ falls, so the components kept are the first ones.
        A, B = balanced(part.first(ranks[name]), scaling_of(scaling, name))
        cut[name] = A.to(dtypes[name]), B.to(dtypes[name])
    energy = math.fsum(value for values in importance.values() for value in values)
    dropped = math.fsum(value for name, values in importance.items() for value in values[ranks[name] :])
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


def _live_slots(A: Tensor, gate: Tensor | None) -> Tensor:
    """(R,) of bool."""
    return torch.ones(A.shape[0], dtype=torch.bool, device=A.device) if gate is None else gate.detach() != 0


def _slot_importance(A: Tensor, B: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    """(s·|g|·‖a‖·‖b‖)² of every slot (R,): the energy of what it adds to ΔW, whatever the gauge."""
    size_R = scaling * A.detach().double().norm(dim=1) * B.detach().double().norm(dim=0)
    return (size_R if gate is None else size_R * gate.detach().double()) ** 2


def _only(live_R: Tensor, chosen: Sequence[int]) -> Tensor:
    """The mask of those live slots whose place among the live ones is in `chosen`."""
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


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """{module: (I, O)}."""
    return {name: (A.shape[1], B.shape[0]) for name, (A, B, _) in factors.items()}


def empty_factors(num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """A (0, I) and B (O, 0): those of a module that was pruned."""
    return torch.zeros(0, num_in), torch.zeros(num_out, 0)


def _costs(shapes: Shapes) -> dict[str, int]:
    return {name: i + o for name, (i, o) in shapes.items()}


def scaling_of(scaling: Scaling, name: str) -> float:
    """The s of one module."""
    return scaling[name] if isinstance(scaling, Mapping) else scaling
