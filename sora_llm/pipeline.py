"""What happens around the loop: evaluate, estimate, agree on the support, cut, export with the self-check."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_llm import export
from sora_llm.activations import PROJECTIONS, activation_bytes, sizes_of
from sora_llm.allocation import balanced, components
from sora_llm.backbone import BackboneSpec, causal_loss_sum, packs_flat
from sora_llm.budget import RankBudget, importances, make_budgets
from sora_llm.consensus import (
    Adapter,
    CutReport,
    PlainFactors,
    cut_slots,
    cut_svd,
    kept_params,
    kept_ranks,
    mean_rank,
    tensor_hash,
)
from sora_llm.data.batches import collate
from sora_llm.data.dataset import TokenDataset, TokenRow
from sora_llm.distributed import (
    Replicas,
    agree,
    broadcast_tensors,
    gather_objects,
    on_every,
    on_main,
    refuse_old_wrappers,
    sum_over_processes,
)
from sora_llm.errors import Preempted, RunFailed, UserError
from sora_llm.inject import (
    adapter_parameters,
    adapters,
    cut_adapters,
    evaluating,
    refuse_new_parameters,
    target_linears,
    unwrapped,
)
from sora_llm.merge import Replica, merge
from sora_llm.optim import IMPORTANCE
from sora_llm.quantised import quantised_linears
from sora_llm.sora import SoraLinear
from sora_llm.topology import World

# ------------------------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class EvalResult:
    """`loss` = Σ cross-entropy / Σ supervised tokens over the whole data set, both weighted where the data is."""

    loss: float
    supervised_tokens: int


def evaluate(
    model: nn.Module,
    rows: TokenDataset,
    collate: Callable[[list[list[TokenRow]]], Mapping[str, Tensor]],
    *,
    batch_size: int,
    world: World,
    device: torch.device | str,
    before_batch: Callable[[], None] = lambda: None,
) -> EvalResult:
    """The loss of `model` over all rows, shared out over the processes (collective).

    `collate` makes a batch (the arguments of `causal_loss_sum`) of some rows, unpacked; of none it makes a batch
    without supervised tokens.  Rows of like length go together; every process runs the same number of batches (under
    ZeRO-3 each forward is a collective), and calls `before_batch` as often.  Every module comes back in the mode it was
    in, without a gradient touched.
    """
    by_length = sorted(range(len(rows)), key=lambda row: (-int(rows.lengths[row]), row))
    stride = batch_size * world.num_processes
    loss_sum, weight, num_tokens = torch.zeros((), dtype=torch.float64, device=device), 0.0, 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(by_length), stride):
            before_batch()
            mine = by_length[start + world.process_index : start + stride : world.num_processes]
            batch = collate([[rows[row]] for row in mine])
            supervised = batch["labels"][:, 1:] != -100
            num_tokens += int(supervised.sum())
            weights = batch.get("loss_weights")
            weight += float(supervised.sum() if weights is None else weights[:, 1:][supervised].double().sum())
            loss_sum += causal_loss_sum(model, **{name: part.to(device) for name, part in batch.items()}).double()
    total, total_weight, tokens = sum_over_processes(loss_sum, weight, num_tokens, device=device)
    return EvalResult(total / total_weight, int(tokens))


# -------------------------------------------------------------------------------------------------------- packing


def prove_packing(
    model: nn.Module, attn_implementation: str, device: torch.device | str, is_8bit: bool = False
) -> None:
    """Raise UserError unless rows packed into one sequence give the logits that each gives alone.

    Whether packed rows see each other depends on the model's code, its attention and the version of transformers, and
    a leak makes no error.  Random rows are run alone, packed, and packed behind a first row of other tokens: what
    reaches the later rows must be nothing beside what reaches them in one long row, and the logits those of each row
    alone up to rounding.  Call it with the bare model, in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    num_ids = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    rows = [torch.randint(num_ids, (length,), generator=generator).numpy() for length in (11, 17, 5)]
    other = torch.randint(num_ids, (11,), generator=generator).numpy()

    def logits(packed: Sequence[Any], isolated: bool = True) -> Tensor:
        """Of the last rows of a sequence (T, V), which stands beside another one where a batch can have several."""
        sequence = [(ids, np.zeros(len(ids), dtype=np.float32)) for ids in packed]
        flat = packs_flat(attn_implementation)
        batch = collate([sequence] if flat else [sequence, sequence[1:]], 0, packed=isolated, flat=flat)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch}
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits[0].float()
        return out[-sum(map(len, packed[1:])) :] if len(packed) > 1 else out

    alone = torch.cat([logits([row]) for row in rows[1:]])
    together = logits(rows)
    leak = (logits([other, *rows[1:]]) - together).norm()
    full_leak = (logits([other, *rows[1:]], isolated=False) - logits(rows, isolated=False)).norm()
    error = (together - alone).norm() / alone.norm()
    # LLM.int8 looks for outliers over the whole batch, so that rows share roundings without seeing each other.
    leaks = not is_8bit and bool(leak > 1e-3 * full_leak)
    # Measured on two small checkpoints: a leak of exactly 0, errors of 1e-7 (float32) to 4e-3 (bf16); without the
    # position ids the error is above 1e-1.
    if leaks or error > 5e-2:
        raise UserError(
            f"data.sample_packing: packed rows see each other in this model under attn_implementation "
            f"{attn_implementation} (logits off by {float(error):.1e}, {float(leak / full_leak):.1e} of a full leak); "
            "set data.sample_packing to false, or choose another model.attn_implementation"
        )


# ------------------------------------------------------------------------------------------------------- estimate


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process.  `activation_bytes` is None where the architecture is not one that they are known of."""

    trainable_parameters: int
    frozen_parameters: int
    weight_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Without the activations where they are not known."""
        fixed = self.weight_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes
        return fixed + (self.activation_bytes or 0)


def estimate(
    skeleton: nn.Module,
    spec: BackboneSpec,
    *,
    r: int,
    target_modules: str | Sequence[str],
    adapter_bytes_each: int,
    strategy: str,
    num_processes: int,
    batch: BatchShape | None = None,
) -> MemoryEstimate:
    """Memory of weights, adapters, gradients, optimizer state and, of a `batch`, activations per process, from the
    model's shapes alone.

    `skeleton` is the model on the meta device.  4-bit weights count half a byte each plus their block constants (64
    weights a block; 4 bytes a block, or 1 with double quantisation), 8-bit weights one byte plus 4 a row; what stays
    unquantised (embeddings, head, norms) counts in spec.dtype.  Adam keeps two float32 moments, and under ZeRO or
    with bf16 adapters a float32 master; ZeRO divides them by the number of processes (gradients from stage 2,
    weights and adapters in stage 3).
    """
    targets = target_linears(skeleton, target_modules)
    quantised = quantised_linears(skeleton) if spec.is_quantised else {}
    num_quantised = sum(linear.weight.numel() for linear in quantised.values())
    num_frozen = sum(parameter.numel() for parameter in skeleton.parameters())
    constants = 1 if spec.double_quant else 4
    if spec.load_in_4bit:
        quantised_bytes = num_quantised // 2 + num_quantised // 64 * constants
    else:
        quantised_bytes = num_quantised + 4 * sum(linear.out_features for linear in quantised.values())
    weight_bytes = quantised_bytes + (num_frozen - num_quantised) * _itemsize(spec.dtype)
    num_trainable = sum(r * (1 + linear.in_features + linear.out_features) for linear in targets.values())
    zero = int(strategy.removeprefix("zero")) if strategy.startswith("zero") else 0
    master_bytes = 4 if zero or adapter_bytes_each < 4 else 0

    def share(size: int, from_stage: int) -> int:
        return -(-size // num_processes) if zero >= from_stage else size

    return MemoryEstimate(
        trainable_parameters=num_trainable,
        frozen_parameters=num_frozen,
        weight_bytes=share(weight_bytes, 3),
        adapter_bytes=share(num_trainable * adapter_bytes_each, 3),
        gradient_bytes=share(num_trainable * adapter_bytes_each, 2),
        optimizer_bytes=share(num_trainable * (8 + master_bytes), 1),
        activation_bytes=None if batch is None else _activation_bytes(skeleton, spec, r, targets, batch),
    )


@dataclass(frozen=True)
class BatchShape:
    """What one forward pass of a process is given."""

    batch_size: int
    sequence_len: int
    is_packed: bool
    checkpointing: bool


def _activation_bytes(
    skeleton: Any, spec: BackboneSpec, r: int, targets: Mapping[str, nn.Linear], batch: BatchShape
) -> int | None:
    sizes = sizes_of(skeleton.config.get_text_config())
    linears = target_linears(skeleton)
    if sizes is None or {name.rpartition(".")[2] for name in linears} != PROJECTIONS:
        return None
    largest = max(linear.in_features * linear.out_features for linear in linears.values())
    return activation_bytes(
        sizes,
        batch_size=batch.batch_size,
        sequence_len=batch.sequence_len,
        itemsize=_itemsize(spec.dtype),
        targets={name.rpartition(".")[2] for name in targets},
        total_rank=r * len(targets) // sizes.num_layers,
        attn_implementation=spec.attn_implementation,
        is_packed=batch.is_packed,
        checkpointing=batch.checkpointing,
        dequantised_bytes=largest * _itemsize(spec.compute_dtype) if spec.is_quantised else 0,
    )


def memory_table(memory: MemoryEstimate) -> str:
    """The estimate as indented lines."""
    parts = (
        ("frozen weights", memory.weight_bytes),
        ("adapters", memory.adapter_bytes),
        ("gradients", memory.gradient_bytes),
        ("optimizer state", memory.optimizer_bytes),
        *([] if memory.activation_bytes is None else [("activations, at most", memory.activation_bytes)]),
        ("sum, + activations" if memory.activation_bytes is None else "sum", memory.total_bytes),
    )
    lines = [f"  {name:<21} {_readable(size)} per process" for name, size in parts]
    if memory.activation_bytes is None:
        lines.append(
            "  activations           not known: their arithmetic is of decoders with separate q, k, v, o, gate, up and "
            "down projections; the peak of a step: train --dry-run"
        )
    return "\n".join(lines)


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# ------------------------------------------------------------------------------------------------ ranks, consensus


@dataclass(frozen=True)
class RankReport:
    """`ranks` {module: kept slots}, their cost-weighted mean, and the parameters they stand for."""

    ranks: dict[str, int]
    mean_rank: float
    kept_params: int

    @property
    def fields(self) -> dict[str, float]:
        """As metrics.jsonl has them."""
        return {"mean_rank": self.mean_rank, "kept_params": self.kept_params}


def full_params(layers: Mapping[str, SoraLinear]) -> int:
    """What the adapters cost with every slot alive."""
    return sum((i + o) * min(layer.rank, i, o) for layer in layers.values() for i, o in [_shape(layer)])


def _shape(layer: SoraLinear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def rank_report(layers: Mapping[str, SoraLinear], gates: Mapping[str, Tensor] | None = None) -> RankReport:
    """Ranks by the gates given, or by the number of slots where there are none (after the cut)."""
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    if not gates:
        ranks = {name: layer.rank for name, layer in layers.items()}
    else:
        ranks = kept_ranks(gates)
    costs = {name: i + o for name, (i, o) in shapes.items()}
    return RankReport(ranks, mean_rank(ranks, costs), kept_params(ranks, shapes))


@dataclass(frozen=True)
class Cut:
    """What consensus left: the ranks, the share of Σ ‖ΔW‖² that went, and what a budget has left over.

    `shortfall` is what the budget has beyond all that was alive (0 where it had to choose); None without a budget.
    `spread` is the largest ‖ΔW_k − ΔW̄‖ / ‖ΔW̄‖ over replicas that had drifted apart; None where there were none.
    """

    ranks: RankReport
    dropped_share: float
    shortfall: int | None
    masters: dict[str, Tensor]
    """The float32 factors that are left, by "<module>.lora_A|lora_B"."""
    spread: float | None = None


def factors_of(layers: Mapping[str, SoraLinear], masters: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """{module: A (R, I), B (O, R), gate or None} of the float32 `masters`; a module without a branch has R = 0."""
    return {
        name: (
            masters.get(f"{name}.lora_A", torch.zeros(0, layer.in_features)),
            masters.get(f"{name}.lora_B", torch.zeros(layer.out_features, 0)),
            masters.get(f"{name}.gate"),
        )
        for name, layer in layers.items()
    }


def cut_by_consensus(
    model: nn.Module,
    masters: Mapping[str, Tensor],
    *,
    consensus: str,
    budgets: Sequence[RankBudget] = (),
    dtype: torch.dtype = torch.float32,
    world: World,
    device: torch.device | str,
    replicas: Replicas | None = None,
) -> Cut:
    """Cut `model` to what the agreed float32 `masters` keep; all processes end with the same bits.

    The main process cuts, its factors are broadcast, and their hashes are compared on every process (collective).
    Adapters without gates have been cut already and stay as they are.  With `replicas` the `masters` of each are its
    own, all of one support, and what is cut is the mean of their products; the main process holds all of them.

    Raises:
        RunFailed: the bits that arrived differ.
    """
    layers = adapters(model)
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    everyone = [masters]
    if replicas is not None:
        gathered = {
            name: [found.cpu() for found in replicas.gather_on_main(tensor.to(device))]
            for name, tensor in masters.items()
        }
        members = range(replicas.num) if world.is_main else []
        everyone = [{name: found[k] for name, found in gathered.items()} for k in members]

    def cut() -> tuple[float, int | None, float | None]:
        factors = [factors_of(layers, values) for values in everyone]
        scaling = {name: layer.scaling for name, layer in layers.items()}
        with _finite("cut"):
            found, report = cut_factors(factors, scaling, consensus, budgets)
        plain.update(found)
        return report

    dropped_share, shortfall, spread = on_main(cut, world)
    masters = _cut_everywhere(model, plain, dict.fromkeys(layers, dtype), device)
    return Cut(rank_report(layers), dropped_share, shortfall, masters, spread)


def _cut_everywhere(
    model: nn.Module,
    plain: Mapping[str, tuple[Tensor, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Cut `model` to the main process's `plain` factors: linear algebra may differ in a bit between machines, and with
    it a rank (collective).

    Returns: their values by name, of modules that have a rank left.
    Raises:
        RunFailed: the bits that arrived differ.
    """
    flat = {}
    for name, (A, B) in plain.items():
        flat[f"{name}.lora_A"], flat[f"{name}.lora_B"] = A, B
    received = broadcast_tensors(flat, device)
    cut = {
        name: (received[f"{name}.lora_A"].to(dtype), received[f"{name}.lora_B"].to(dtype))
        for name, dtype in dtypes.items()
    }
    cut_adapters(model, cut)
    agree({name: tensor_hash(p) for name, p in adapter_parameters(model).items()}, "the cut adapter")
    return {name: tensor for name, tensor in received.items() if tensor.numel()}


@contextlib.contextmanager
def _finite(what: str) -> Iterator[None]:
    """RunFailed for adapters whose values are not finite."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise RunFailed(f"the adapters cannot be {what}: {error}; lower train.learning_rate") from error


def cut_factors(
    replicas: Sequence[Mapping[str, Adapter]],
    scaling: Mapping[str, float],
    consensus: str,
    budgets: Sequence[RankBudget],
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[float, int | None, float | None]]:
    """Plain factors by `consensus`, group by group where there are budgets; share of Σ ‖ΔW‖² dropped, shortfall and
    spread as `Cut` has them.

    Several replicas have one support and go by svd.
    """
    factors = replicas[0]
    if all(gate is None for _, _, gate in factors.values()):
        assert len(replicas) == 1, "replicas are merged while they have gates"
        return {name: (A, B) for name, (A, B, _) in factors.items()}, (0.0, None, None)
    groups: list[tuple[list[str], int | None, int]] = [(list(factors), None, 0)]
    if budgets:
        groups = [(list(budget.costs), budget.params, budget.min_rank) for budget in budgets]
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    reports, spreads = [], []
    for names, params, min_rank in groups:
        members = [{name: replica[name] for name in names} for replica in replicas]
        if len(replicas) > 1:
            group, report, spread = _merge(members, scaling, params, min_rank)
            spreads.append(spread)
        else:
            cut_group = cut_svd if consensus == "svd" else cut_slots
            group, report = cut_group(members[0], scaling, params, min_rank)
        plain |= group
        reports.append(report)
    energy, dropped = sum(report.energy for report in reports), sum(report.dropped_energy for report in reports)
    shortfall = sum(report.shortfall or 0 for report in reports) if budgets else None
    share = dropped / energy if energy else 0.0
    return {name: plain[name] for name in factors}, (share, shortfall, max(spreads) if spreads else None)


def _merge(
    replicas: Sequence[Mapping[str, Adapter]], scaling: Mapping[str, float], budget: int | None, min_rank: int
) -> tuple[PlainFactors, CutReport, float]:
    """Replicas of one support as one adapter, and how far the farthest of them is from it.

    Without a budget every module keeps as many components as gates live: the mean of products has up to K times as
    many, which nobody asked for.
    """
    members = [Replica(1.0, factors, scaling) for factors in replicas]
    max_ranks = None
    if budget is None:
        max_ranks = kept_ranks({name: gate for name, (_, _, gate) in replicas[0].items() if gate is not None})
    merged = merge(members, budget, min_rank=min_rank, scaling=scaling, max_ranks=max_ranks)
    return merged.factors, merged.report, max(report.distance or 0.0 for report in merged.replicas)


def balance(
    model: nn.Module,
    masters: Mapping[str, Tensor],
    *,
    budgets: Sequence[RankBudget],
    dtype: torch.dtype,
    world: World,
    device: torch.device | str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put every adapter of `model` into balanced SVD form with gates of 1 (collective).

    A = diag(√(σ/s))·Vᵀ, B = U·diag(√(σ/s)): slot i is the i-th singular component of the module's ΔW, which stays.

    Returns: the float32 values by name, and the optimizer's state to go on with, {"<module>.gate.importance": (R,)}:
    σ_i/√c_m in units of the median of the module's budget.
    Raises:
        RunFailed: nothing was learned yet, or values are not finite.
    """
    layers = adapters(model)
    flat: dict[str, Tensor] = {}

    def decompose() -> None:
        for name, (A, B, gate) in factors_of(layers, masters).items():
            layer = layers[name]
            with _finite("put into singular components"):
                parts = components(A, B, gate, layer.scaling, name)
            new_A, new_B = balanced(parts, layer.scaling, layer.rank)
            flat[f"{name}.lora_A"], flat[f"{name}.lora_B"] = new_A.float(), new_B.float()
            flat[f"{name}.sigma"] = torch.nn.functional.pad(parts.sigma, (0, layer.rank - len(parts.sigma)))

    on_main(decompose, world)
    received = broadcast_tensors(flat, device)
    for name, layer in layers.items():
        A, B = received[f"{name}.lora_A"].to(dtype), received[f"{name}.lora_B"].to(dtype)
        layer.replace(A, B, torch.ones(layer.rank, dtype=dtype))
    weights: dict[str, Tensor] = {}
    for budget in budgets:
        sigmas = {name: received[f"{name}.sigma"] for name in budget.costs}
        weights |= importances(sigmas, budget.costs, budget.min_rank)
    if not any(bool(values.any()) for values in weights.values()):
        raise RunFailed(
            "nothing was learned before the sparsify phase: every ΔW is 0, and pruning would be blind; raise "
            "sora.dense_ratio or train.learning_rate, or train longer"
        )
    values = {name: tensor for name, tensor in received.items() if not name.endswith(".sigma")}
    values |= {f"{name}.gate": torch.ones(layer.rank) for name, layer in layers.items()}
    return values, {f"{name}.gate.{IMPORTANCE}": weights[name].float() for name in layers}


def restore(model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give every adapter its gated `masters` back, after a copy of them was cut."""
    for name, layer in adapters(model).items():
        A, B, gate = (masters[f"{name}.{kind}"].to(dtype) for kind in ("lora_A", "lora_B", "gate"))
        layer.replace(A, B, gate)


def consensus_prune(
    model: nn.Module,
    target_rank: float | None = None,
    target_params: int | None = None,
    consensus: str = "svd",
    min_rank: int = 0,
) -> nn.Module:
    """Cut the adapters of an injected model, in place; the gates are folded into the factors.

    `svd` keeps singular components of each module's ΔW, `slots` the slots themselves; without a budget both keep all
    that is alive.  With `target_rank` (the mean rank, weighted by I + O) or `target_params` those of all modules with
    the most energy per parameter are kept, σ² / (I + O), never more than the budget, and `min_rank` in every module.
    Factors of lower precision than float32 are cut as they are, not from an optimizer's masters.

    For loops of your own (one process, or DDP: every process must hold the same adapter, which is checked).  The
    parameters are new ones: make a new optimizer afterwards, and under DDP give `model.module` here and wrap it anew;
    the forward pass of a wrapper that does not know them is an error.

    Returns: the same model.
    Raises:
        UserError: a model without gated adapters, or a budget that cannot be.
        RunFailed: processes hold different adapters, or values are not finite.
    """
    refuse_new_parameters(model, "consensus_prune")
    if consensus not in ("svd", "slots"):
        raise UserError(f"consensus is {consensus!r}; use 'svd' or 'slots'")
    if target_rank is not None and target_params is not None:
        raise UserError("target_rank and target_params are two ways to say one budget; give one of them")
    inner = unwrapped(model)
    layers = adapters(inner)
    if not layers:
        raise UserError("the model has no SoRA adapters: call inject_sora(model) and train it first")
    if any(layer.gate is None for layer in layers.values()):
        raise UserError("the model's adapters have no gates any more: they were cut already")
    has_budget = target_rank is not None or target_params is not None
    for name, value in (("target_rank", target_rank), ("target_params", target_params)):
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise UserError(f"{name} is {value!r}; it must be a number above 0")
    if not isinstance(min_rank, Integral) or min_rank < 0:
        raise UserError(f"min_rank is {min_rank!r}; it must be an integer from 0")
    if min_rank and not has_budget:
        raise UserError("min_rank needs a budget; give target_rank or target_params")
    remedy = "make them equal (load one checkpoint everywhere), and reduce all gradients"
    agree({name: tensor_hash(p) for name, p in adapter_parameters(inner).items()}, "the adapter", remedy=remedy)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    rank = max(layer.rank for layer in layers.values())
    budgets = make_budgets(shapes, rank, target_rank, target_params, {}, min_rank, section="") if has_budget else []
    masters = {name: p.detach().float() for name, p in adapter_parameters(inner).items()}
    dtypes = {name: layer.gate.dtype for name, layer in layers.items() if layer.gate is not None}
    scaling = {name: layer.scaling for name, layer in layers.items()}

    def plain() -> dict[str, tuple[Tensor, Tensor]]:
        with _finite("cut"):
            return cut_factors([factors_of(layers, masters)], scaling, consensus, budgets)[0]

    cut = on_every(plain)  # the main process's is taken; an error on one is raised on all
    _cut_everywhere(inner, cut, dtypes, next(iter(masters.values())).device)
    refuse_old_wrappers(inner)
    return model


# --------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Exported:
    """`eval_loss` is the reloaded adapter's, None without a dev set."""

    folder: Path
    certificate: dict[str, Any]
    eval_loss: float | None


def export_verified(
    model: nn.Module,
    folder: Path,
    layout: str,
    *,
    world: World,
    provenance: export.Provenance,
    allow_empty: bool,
    probe_ids: Tensor,
    eval_loss_of: Callable[[nn.Module], float | None],
    before_publishing: Callable[[], None] = lambda: None,
) -> Exported:
    """Export the cut adapter of `model`, which every process holds whole, and prove it from disk (collective).

    The main process writes; every process reloads the files with PEFT, compares, and takes its share of the dev set.

    Raises:
        RunFailed: an empty adapter that is not allowed, or the self-check found a difference.
    """
    temporary = Path(
        on_main(
            lambda: str(export.write_adapter(model, folder, layout, allow_empty=allow_empty, provenance=provenance)),
            world,
        )
    )
    try:
        with export.reloaded(model, temporary, probe_ids) as check:
            eval_loss = eval_loss_of(check.peft_model)
        before_publishing()
    except Preempted:
        on_main(lambda: shutil.rmtree(temporary, ignore_errors=True), world)
        raise
    # Also the wait for the others: the main process is about to rename the folder that they are reading.
    worst = export.worst_of(gather_objects(check.errors))
    if eval_loss is not None:
        metrics = {**provenance.metrics, "dev loss of this adapter, reloaded": eval_loss}
        provenance = replace(provenance, metrics=metrics)
    certificate = on_main(
        lambda: export.certify_and_publish(model, temporary, folder, layout, worst, provenance), world
    )
    return Exported(folder, certificate, eval_loss)
