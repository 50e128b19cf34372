"""Plain LoRA beside the product's own runs: at full size, at the final size, and cut on the way there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction

import torch
from protocol import Cell, R
from torch import Tensor, nn
from typing_extensions import override

from sora_llm.allocation import allocate
from sora_llm.consensus import cut_slots, cut_svd
from sora_llm.factors import Factors, PlainFactors
from sora_llm.inject import adapters, cut_adapters
from sora_llm.pipeline import factors_of
from sora_llm.running.assembly import renew_engine
from sora_llm.running.plan import Plan, Stage
from sora_llm.running.training import Training


@dataclass(frozen=True)
class CutStage(Stage):
    """The run's one schedule of rates, ramped up after each cut as after consensus."""

    cuts: tuple[int, ...] = ()

    @property
    @override
    def form_changes(self) -> tuple[int, ...]:
        return self.cuts


def with_cuts(plan: Plan, cell: Cell) -> Plan:
    """The plan of a plain LoRA, with the steps before which `cell` cuts it."""
    (stage,) = plan.stages
    steps = tuple(math.floor(Fraction(str(share)) * stage.total_steps) for share in cell.arm.cuts)
    same = {field.name: getattr(stage, field.name) for field in fields(Stage)}
    return replace(plan, stages=(CutStage(**same, cuts=steps),))


def make_plain(model: nn.Module, cell: Cell, budget: int) -> None:
    """Fold the gates of freshly injected adapters away, which leaves LoRA.

    Of the final size it has one rank everywhere; where that is no whole number, one more in modules that the seed
    draws, as far as the budget reaches.
    """
    layers, costs = adapters(model), costs_of(model)
    ranks = dict.fromkeys(layers, R)
    if cell.arm.starts_small:
        whole = math.floor(Fraction(str(cell.group.size)) * R)
        drawn = drawn_worth(cell.seed, dict.fromkeys(layers, min(R, whole + 1)), costs)
        ranks = {name: len(slots) for name, slots in allocate(drawn, costs, budget, min_rank=whole).items()}
    plain = {}
    for name, layer in layers.items():
        assert layer.lora_A is not None and layer.lora_B is not None
        plain[name] = layer.lora_A[: ranks[name]], layer.lora_B[:, : ranks[name]]
    cut_adapters(model, plain)


def cut_plain(training: Training, step: int, cell: Cell, budget: int) -> None:
    """Before `step`: cut the LoRA if it is one of the arm's cuts, and go on with a fresh optimizer.

    After k of n cuts full · (budget / full)^(k/n) parameters are left.
    """
    cuts = training.stage.form_changes
    if step not in cuts:
        return
    model, costs = training.engine.module, costs_of(training.engine.module)
    full, share = R * sum(costs.values()), Fraction(cuts.index(step) + 1, len(cuts))
    goal = budget if share == 1 else math.floor(full * (budget / full) ** float(share))
    factors = factors_of(adapters(model), training.engine.masters())
    if cell.arm.keeps == "svd":
        scaling = {name: layer.scaling for name, layer in adapters(model).items()}
        plain, _ = cut_svd(factors, scaling, goal)
    elif cell.arm.keeps == "all":
        plain = {name: (A, B) for name, (A, B, _) in factors.items()}
    else:
        plain = random_slots(factors, costs, goal, cell.seed)
    with training.engine.released(whole=False) as model:
        cut_adapters(model, plain)
    masters: dict[str, Tensor] = {}
    for name, (A, B) in plain.items():
        if A.shape[0]:
            masters |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    renew_engine(training, model, masters, {})


def random_slots(factors: Factors, costs: Mapping[str, int], budget: int, seed: int) -> PlainFactors:
    """Slots of all modules in an order that the seed draws, as many as fit."""
    drawn = drawn_worth(seed, {name: A.shape[0] for name, (A, _, _) in factors.items()}, costs)
    kept = allocate(drawn, costs, budget)
    gated = {}
    for name, (A, B, _) in factors.items():
        gate = torch.zeros(A.shape[0])
        gate[kept[name]] = 1.0
        gated[name] = A, B, gate
    return cut_slots(gated)[0]


def drawn_worth(seed: int, ranks: Mapping[str, int], costs: Mapping[str, int]) -> dict[str, Tensor]:
    """Importances {module: (rank,)} by which `allocate` visits all slots in random order."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(rank, generator=generator) * costs[name] for name, rank in ranks.items()}


def costs_of(model: nn.Module) -> dict[str, int]:
    """{module: I + O}."""
    return {name: layer.in_features + layer.out_features for name, layer in adapters(model).items()}
