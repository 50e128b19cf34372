"""The phase change: read the masters, agree on the support, cut, write back; and `consensus_prune` for other loops."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_llm.allocation import balanced, components
from sora_llm.budget import RankBudget, importances, make_budgets
from sora_llm.consensus import CutReport, cut_slots, cut_svd, joined
from sora_llm.distributed.collectives import (
    broadcast_tensors,
    is_main,
    on_every,
    on_main,
    require_agreement,
)
from sora_llm.distributed.engine import refuse_old_wrappers
from sora_llm.distributed.replicas import Replicas
from sora_llm.errors import NotFinite, RunFailed, UserError
from sora_llm.factors import (
    Factors,
    ModuleFactors,
    PlainFactors,
    kept_params,
    kept_ranks,
    mean_rank,
)
from sora_llm.hashes import tensor_hash
from sora_llm.inject import (
    adapter_parameters,
    adapters,
    cut_adapters,
    layer_shapes,
    refuse_new_parameters,
    warn_if_untrained,
)
from sora_llm.merge import WeightedAdapter, merge
from sora_llm.optim import IMPORTANCE_SUFFIX
from sora_llm.sora import SoraLinear
from sora_llm.values import is_integer, is_number
from sora_llm.wrappers import unwrapped


@dataclass(frozen=True)
class RankReport:
    """`ranks` {module: kept slots}, their cost-weighted mean, and their number of parameters."""

    ranks: dict[str, int]
    mean_rank: float
    kept_params: int

    @property
    def fields(self) -> dict[str, float]:
        """The ranks as in a line of metrics.jsonl."""
        return {"mean_rank": self.mean_rank, "kept_params": self.kept_params}


def full_params(layers: Mapping[str, SoraLinear]) -> int:
    """The parameters of the adapters with every slot alive."""
    return kept_params({name: layer.rank for name, layer in layers.items()}, layer_shapes(layers))


def rank_report(layers: Mapping[str, SoraLinear], gates: Mapping[str, Tensor] | None = None) -> RankReport:
    """Ranks by the given gates, at most min(I, O) in a module, as budgets count them; or by the number of slots if
    there are none (after the cut)."""
    shapes = layer_shapes(layers)
    if not gates:
        ranks = {name: layer.rank for name, layer in layers.items()}
    else:
        ranks = {name: min(kept, *shapes[name]) for name, kept in kept_ranks(gates).items()}
    return RankReport(ranks, mean_rank(ranks, shapes), kept_params(ranks, shapes))


@dataclass(frozen=True)
class Cut:
    """The result of consensus; `report` and `spread` as in `CutFactors`."""

    ranks: RankReport
    masters: dict[str, Tensor]
    """The remaining float32 factors, by "<module>.lora_A|lora_B"."""
    report: CutReport | None
    spread: float | None


@dataclass(frozen=True)
class CutFactors:
    """The remaining factors of adapters; `report` says how they were cut, None if they had already been cut (no gates).

    `spread` is the largest ‖ΔW_k − ΔW̄‖ / ‖ΔW̄‖ over replicas that had drifted apart; None if there were none.
    """

    factors: PlainFactors
    report: CutReport | None
    spread: float | None = None


def factors_of(layers: Mapping[str, SoraLinear], masters: Mapping[str, Tensor]) -> dict[str, ModuleFactors]:
    """{module: A (R, I), B (O, R), gate or None} from the float32 `masters`; a module without a branch has R = 0."""
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
    budgets: Sequence[RankBudget],
    dtype: torch.dtype,
    device: torch.device | str,
    replicas: Replicas | None,
) -> Cut:
    """Cut `model` by consensus on the agreed float32 `masters`; all processes end with the same bits.

    The main process cuts, its factors are broadcast, and their hashes are compared on every process (collective).
    Adapters without gates have already been cut and stay as they are.  With `replicas` each has its own `masters`, and
    the mean of their products is cut; the main process holds all of them.

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
        members = range(replicas.num) if is_main() else []
        everyone = [{name: found[k] for name, found in gathered.items()} for k in members]

    def cut() -> tuple[CutReport | None, float | None]:
        factors = [factors_of(layers, values) for values in everyone]
        scaling = {name: layer.scaling for name, layer in layers.items()}
        with _finite("cut"):
            found = cut_factors(factors, scaling, consensus, budgets)
        plain.update(found.factors)
        return found.report, found.spread

    report, spread = on_main(cut)
    masters = _cut_everywhere(model, plain, dict.fromkeys(layers, dtype), device)
    return Cut(rank_report(layers), masters, report, spread)


def _cut_everywhere(
    model: nn.Module,
    plain: Mapping[str, tuple[Tensor, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Cut `model` to the main process's `plain` factors: linear algebra may differ by a bit between machines, and so
    may a rank (collective).

    Returns: their values by name, for modules with ranks left.
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
    require_agreement(_hashes_of_parameters(model), "the cut adapter")
    return {name: tensor for name, tensor in received.items() if tensor.numel()}


def _hashes_of_parameters(model: nn.Module) -> dict[str, str]:
    return {name: tensor_hash(parameter) for name, parameter in adapter_parameters(model).items()}


@contextlib.contextmanager
def _finite(what: str) -> Iterator[None]:
    """RunFailed for adapters whose values are not finite."""
    try:
        yield
    except NotFinite as error:
        raise RunFailed(f"the adapters cannot be {what}: {error}; lower the learning rate") from error


def cut_factors(
    replicas: Sequence[Factors],
    scaling: Mapping[str, float],
    consensus: str,
    budgets: Sequence[RankBudget],
) -> CutFactors:
    """Plain factors by `consensus`, group by group if there are budgets; several replicas always use svd."""
    factors = replicas[0]
    if all(gate is None for _, _, gate in factors.values()):
        assert len(replicas) == 1, "replicas are merged while they have gates"
        return CutFactors({name: (A, B) for name, (A, B, _) in factors.items()}, None)
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
    in_order = {name: plain[name] for name in factors}
    return CutFactors(in_order, joined(reports), max(spreads) if spreads else None)


def _merge(
    replicas: Sequence[Factors], scaling: Mapping[str, float], budget: int | None, min_rank: int
) -> tuple[PlainFactors, CutReport, float]:
    """Replicas merged into one adapter, and the distance of the farthest of them from it.

    Without a budget every module keeps as many components as it has gates that live in any replica: a replica that took
    no step in the last round lacks those that were revived in it.  The mean of products has up to K times as many
    components, which are not wanted.
    """
    members = [WeightedAdapter(1.0, factors, scaling) for factors in replicas]
    max_ranks = None
    if budget is None:
        max_ranks = kept_ranks({name: torch.stack(_gates_of(name, replicas)).any(0) for name in replicas[0]})
    merged = merge(members, budget, min_rank=min_rank, scaling=scaling, max_ranks=max_ranks)
    return merged.factors, merged.report, max(report.distance or 0.0 for report in merged.replicas)


def _gates_of(name: str, replicas: Sequence[Factors]) -> list[Tensor]:
    gates = [gate for replica in replicas if (gate := replica[name][2]) is not None]
    assert len(gates) == len(replicas), "replicas are merged while they have gates"
    return gates


def balance(
    model: nn.Module,
    masters: Mapping[str, Tensor],
    *,
    budgets: Sequence[RankBudget],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give every adapter of `model` new parameters, its `balanced_values` (collective).

    Returns, raises: as `balanced_values`.
    """
    remedy = "raise sora.dense_ratio or train.learning_rate, or train longer"
    values, importance = balanced_values(adapters(model), masters, budgets=budgets, device=device, remedy=remedy)
    restore(model, values, dtype)
    return values, importance


def balanced_values(
    layers: Mapping[str, SoraLinear],
    masters: Mapping[str, Tensor],
    *,
    budgets: Sequence[RankBudget],
    device: torch.device | str,
    remedy: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float32 `masters` of adapters in balanced SVD form with gates of 1, the same on every process (collective).

    A = diag(√(σ/s))·Vᵀ, B = U·diag(√(σ/s)): slot i is the i-th singular component of the module's unchanged ΔW.

    Returns: the float32 values by name, and the optimizer's state to continue with, {"<module>.gate.importance": (R,)}:
    σ_i/√c_m in units of the median of the module's budget.
    Raises:
        RunFailed: nothing was learned yet (ends with the `remedy`), or values are not finite.
    """
    flat: dict[str, Tensor] = {}

    def decompose() -> None:
        for name, (A, B, gate) in factors_of(layers, masters).items():
            layer = layers[name]
            with _finite("put into singular components"):
                parts = components(A, B, gate, layer.scaling, name)
            new_A, new_B = balanced(parts, layer.scaling, layer.rank)
            flat[f"{name}.lora_A"], flat[f"{name}.lora_B"] = new_A.float(), new_B.float()
            flat[f"{name}.sigma"] = torch.nn.functional.pad(parts.sigma, (0, layer.rank - len(parts.sigma)))

    on_main(decompose)
    received = broadcast_tensors(flat, device)
    weights: dict[str, Tensor] = {}
    for budget in budgets:
        sigmas = {name: received[f"{name}.sigma"] for name in budget.costs}
        weights |= importances(sigmas, budget)
    if not any(bool(values.any()) for values in weights.values()):
        raise RunFailed(
            f"nothing was learned before the sparsify phase: every ΔW is 0, so pruning would be arbitrary; {remedy}"
        )
    values = {name: tensor for name, tensor in received.items() if not name.endswith(".sigma")}
    values |= {f"{name}.gate": torch.ones(layer.rank) for name, layer in layers.items()}
    return values, {f"{name}{IMPORTANCE_SUFFIX}": weights[name].float() for name in layers}


def restore(model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give every adapter new parameters with the values of gated `masters`."""
    for name, layer in adapters(model).items():
        A, B, gate = (masters[f"{name}.{kind}"].to(dtype) for kind in ("lora_A", "lora_B", "gate"))
        layer.replace(A, B, gate)


def gated_adapters(model: nn.Module) -> dict[str, SoraLinear]:
    """The adapters of a model by module; UserError if there are none, or if they have been cut."""
    layers = adapters(model)
    if not layers:
        raise UserError("the model has no SoRA adapters: call inject_sora(model) and train it first")
    if any(layer.gate is None for layer in layers.values()):
        raise UserError("the model's adapters have no gates: they were already cut")
    return layers


def model_budget(
    layers: Mapping[str, SoraLinear], target_rank: float | None, target_params: int | None, min_rank: int
) -> list[RankBudget]:
    """The one budget of adapters in loops of your own, [] without a target; UserError for an invalid one."""
    if target_rank is not None and target_params is not None:
        raise UserError("target_rank and target_params both set the budget; give only one")
    if target_params is not None and not is_integer(target_params):
        raise UserError(f"target_params is {target_params!r}; it is a whole number of parameters")
    for name, value in (("target_rank", target_rank), ("target_params", target_params)):
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise UserError(f"{name} is {value!r}; it must be a number above 0")
    if not is_integer(min_rank) or min_rank < 0:
        raise UserError(f"min_rank is {min_rank!r}; it must be an integer from 0")
    if target_rank is None and target_params is None:
        if min_rank:
            raise UserError("min_rank needs a budget; give target_rank or target_params")
        return []
    rank = max(layer.rank for layer in layers.values())
    return make_budgets(layer_shapes(layers), rank, target_rank, target_params, {}, min_rank, section="")


def require_equal_adapters(model: nn.Module) -> None:
    """RunFailed if processes hold different adapters (collective)."""
    remedy = "make them equal (load one checkpoint everywhere), and reduce all gradients"
    require_agreement(_hashes_of_parameters(model), "the adapter", remedy=remedy)


def consensus_prune(
    model: nn.Module,
    target_rank: float | None = None,
    target_params: int | None = None,
    consensus: str = "svd",
    min_rank: int = 0,
) -> nn.Module:
    """Cut the adapters of an injected model, in place; the gates are folded into the factors.

    `svd` keeps singular components of each module's ΔW, `slots` the slots themselves; without a budget both keep
    everything alive.  With `target_rank` (the mean rank, weighted by I + O) or `target_params`, those with the most
    energy per parameter, σ² / (I + O), are kept across all modules, never more than the budget, and `min_rank` in every
    module.  Factors in lower precision than float32 are cut as they are, not from an optimizer's masters.

    For loops of your own (one process, or DDP: every process must hold the same adapter, which is checked).  The
    parameters are new: make a new optimizer afterwards, and under DDP pass `model.module` here and wrap it again; the
    forward pass of a wrapper that does not know them is an error.

    Warns "nothing was learned yet" if every ΔW is 0.

    Returns: the same model.
    Raises:
        UserError: a model without gated adapters, one that DistributedDataParallel or FSDP has wrapped, or whose
            adapters a ZeRO engine holds; an unknown consensus or an invalid budget; a call in inference_mode.
        RunFailed: processes hold different adapters, or values are not finite.
    """
    refuse_new_parameters(model, "consensus_prune")
    if consensus not in ("svd", "slots"):
        raise UserError(f"consensus is {consensus!r}; use 'svd' or 'slots'")
    inner = unwrapped(model)
    layers = gated_adapters(inner)
    budgets = model_budget(layers, target_rank, target_params, min_rank)
    require_equal_adapters(inner)
    masters = {name: p.detach().float() for name, p in adapter_parameters(inner).items()}
    dtypes = {name: layer.gate.dtype for name, layer in layers.items() if layer.gate is not None}
    scaling = {name: layer.scaling for name, layer in layers.items()}

    def plain() -> PlainFactors:
        with _finite("cut"):
            return cut_factors([factors_of(layers, masters)], scaling, consensus, budgets).factors

    warn_if_untrained(inner)
    cut = on_every(plain)  # the main process's is used; an error on one is raised on all
    _cut_everywhere(inner, cut, dtypes, next(iter(masters.values())).device)
    refuse_old_wrappers(inner)
    return model
