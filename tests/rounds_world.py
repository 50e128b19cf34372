"""Workers that take local updates of a tiny LLaMA in float64 and report where every round ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from helpers import tiny_llama
from reference import use_float64_norms
from torch import Tensor

from sora_llm import pipeline
from sora_llm.budget import make_budgets
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.distributed.replicas import Replicas
from sora_llm.errors import RunFailed
from sora_llm.inject import adapter_parameters, adapters, inject_sora
from sora_llm.local_updates import OuterOptimizer
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.optimizer_step import StepBatches, train_step
from sora_llm.running.rounds import Gates, Rounds
from sora_llm.sora import soft_threshold
from sora_llm.topology import World, launched_world

STEPS, ROUND_ENDS, R, LORA_ALPHA, DECAY, MAX_NORM = 11, (4, 8, 11), 4, 6.0, 0.05, 0.4
LEARNING_RATES = [4e-3 * (1 - step / 20) for step in range(STEPS)]
GATE_LRS = [0.12 * (1 - step / 20) for step in range(STEPS)]
LAMBDA = {"decoupled": 1.4, "proxgen": 0.006}
FIRST_PRUNED = 4  # the first round is dense
SMALL_MODEL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}

MicroBatch = tuple[Tensor, Tensor]


def make_model() -> torch.nn.Module:
    """In float64, the norms too."""
    return use_float64_norms(tiny_llama(**SMALL_MODEL).double())


def make_batches(seed: int) -> list[list[MicroBatch]]:
    """Per step two micro-batches (input_ids, labels) of unlike size and supervision."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(STEPS):
        step = []
        for num_rows, num_tokens, prompt in ((2, 9, 2), (1, 12, 7)):
            ids = torch.randint(40, (num_rows, num_tokens), generator=generator)
            labels = ids.clone()
            labels[:, :prompt] = -100
            step.append((ids, labels))
        batches.append(step)
    return batches


def lambdas(threshold: str) -> list[float]:
    """λ of every step."""
    return [LAMBDA[threshold] if step >= FIRST_PRUNED else 0.0 for step in range(STEPS)]


def injected() -> torch.nn.Module:
    """The model with adapters whose B is not 0, the same everywhere."""
    model = make_model()
    torch.manual_seed(1)
    inject_sora(model, r=R, lora_alpha=LORA_ALPHA, dtype=torch.float64)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(0, 0.1)
    return model.eval()


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """The library takes losses and masters in float32, transformers positions: a comparison would be good to 1e-6."""
    to_float, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # type: ignore[assignment]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        torch.set_default_dtype(torch.float32)


def soft(gates: Gates, thresholds: Gates) -> Gates:
    """The prox of a round."""
    return {name: soft_threshold(gates[name], thresholds[name]) for name in gates}


class Place:
    """One process of a world whose replicas are processes, or nodes of two processes."""

    def __init__(self, replica: str = "process") -> None:
        launched = launched_world(os.environ)
        index = launched.process_index
        self.world = World(launched.num_processes, index, index % 2 if replica == "node" else index)
        strategy = "ddp" if self.world.num_processes > 1 else "none"
        self.strategy, self.accelerator = strategy, make_accelerator(strategy, self.world, timeout_minutes=2)
        self.replicas = Replicas.make(replica, self.world)

    def engine(self, threshold: str = "decoupled") -> Engine:
        """Around fresh adapters."""
        model = injected()
        groups = parameter_groups(model, 1.0, 1.0, weight_decay=DECAY, threshold=threshold, deferred=True)
        return Engine(self.accelerator, model, ProxAdamW(groups), self.strategy, MAX_NORM, self.replicas)

    def step(
        self,
        engine: Engine,
        batches: Sequence[Sequence[MicroBatch]],
        step: int,
        lam: float,
        before_step: Callable[[], None] | None = None,
    ) -> bool:
        """One local step on `batches` of the processes of this replica, each on its own; whether it was skipped."""
        tokens = [sum(int((labels[:, 1:] != -100).sum()) for _, labels in own) for own in batches]
        mine = self.replicas.own_members.index(self.world.process_index)
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in batches[mine]]
        engine.set_rates(LEARNING_RATES[step], GATE_LRS[step], lam)
        figures = StepBatches(rows, sum(tokens), tokens[mine], sum(tokens), sum(tokens))
        return train_step(engine, figures, len(self.replicas.own_members), before_step)[1].skipped

    def run(
        self, seeds: Sequence[int], threshold: str = "decoupled", outer: Sequence[float] = (1.0, 0.0)
    ) -> dict[str, Any]:
        """Rounds to the end; `seeds` choose the rows of every process of the world."""
        engine = self.engine(threshold)
        rounds = Rounds(self.replicas, OuterOptimizer(*outer))
        rounds.begin(engine)
        own = [make_batches(seeds[process]) for process in self.replicas.own_members]
        distances, overlaps, apart = [], [], []
        for step, lam in enumerate(lambdas(threshold)):
            self.step(engine, [batches[step] for batches in own], step, lam)
            if step + 1 in ROUND_ENDS:
                apart.append({name: value.clone() for name, value in engine.values().items()})
                with counted_traffic() as traffic:
                    report = rounds.end(engine, soft if step >= FIRST_PRUNED else None)
                rounds.prove(engine)
                distances.append(report.merge_error)
                overlaps.append(report.support_overlap)
        result = {
            "values": {name: value.clone() for name, value in engine.values().items()},
            "distances": distances,
            "overlaps": overlaps,
            "apart": apart,
            "bytes": report.sync_bytes,
            "traffic": traffic,
        }
        with engine.released():
            pass
        return result


def rounds_world(cases: dict[str, dict[str, Any]], replica: str = "process", faults: bool = False) -> dict[str, Any]:
    """The results of `Place.run` with the arguments of each case."""
    with everything_in_float64():
        place = Place(replica)
        report: dict[str, Any] = {name: place.run(**case) for name, case in cases.items()}
        if faults and replica == "process":
            report |= {"flips": flips(place), "poisoned": poisoned_replica(place), "idle": idle_replica(place)}
            report |= {"averaged": averaged(place), "cut": merged_cut(place, None), "budget": merged_cut(place, 1500)}
        if faults and replica == "node":
            report = {**report, "flips": flips_in_a_node(place)}
    if faults and replica == "process":
        report["low precision"] = low_precision(place)
    return report


def flips(place: Place) -> dict[str, str | None]:
    """What check_agreement says at a round's end of one wrong element on the last process, by kind."""
    engine = place.engine()
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    batches = make_batches(place.world.process_index)
    place.step(engine, [batches[0]], 0, 0.0)
    rounds.end(engine)
    found: dict[str, str | None] = {"nothing": verdict(lambda: rounds.prove(engine))}
    name, parameter = list(adapter_parameters(engine.module).items())[5]
    if place.world.process_index == place.world.num_processes - 1:
        parameter.data.view(-1)[3] *= 1 + 1e-15
    found["name"], found["parameter"] = name, verdict(lambda: rounds.prove(engine))
    return found


def flips_in_a_node(place: Place) -> dict[str, str | None]:
    """What check_agreement says inside a round: of nodes that drifted apart, and of a wrong moment on process 3."""
    engine = place.engine()
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    own = [make_batches(process)[0] for process in place.replicas.own_members]
    place.step(engine, own, 0, 0.0)
    found = {"nothing": verdict(engine.check_agreement)}
    name, parameter = list(adapter_parameters(engine.module).items())[5]
    if place.world.process_index == 3:
        engine.optimizer.state[parameter]["exp_avg"].view(-1)[3] *= 1 + 1e-15
    found["name"], found["moment"] = name, verdict(engine.check_agreement)
    return found


def verdict(prove: Callable[[], None]) -> str | None:
    try:
        prove()
    except RunFailed as error:
        return str(error)
    return None


def poisoned_replica(place: Place) -> dict[str, Any]:
    """A round of three steps in which the last replica's second loss is not finite."""
    engine = place.engine()
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    batches = make_batches(place.world.process_index)
    is_last = place.world.process_index == place.world.num_processes - 1
    skipped = []
    for step in range(3):
        embedding = engine.module.get_input_embeddings().weight
        saved = embedding.detach().clone()
        if is_last and step == 1:
            embedding.data.mul_(float("nan"))
        skipped.append(place.step(engine, [batches[step]], step, 0.0))
        embedding.data.copy_(saved)
    steps = engine.num_optimizer_steps
    rounds.end(engine)
    finite = all(bool(value.isfinite().all()) for value in engine.values().values())
    return {"skipped": skipped, "num_steps": steps, "finite": finite, "verdict": verdict(lambda: rounds.prove(engine))}


def idle_replica(place: Place) -> dict[str, Any]:
    """A step for which the last replica has no rows: it stands still."""
    engine = place.engine()
    before = {name: value.clone() for name, value in engine.values().items()}
    if place.world.process_index == place.world.num_processes - 1:
        empty = StepBatches([], 0.0, 0.0, 10, 10)
        engine.set_rates(LEARNING_RATES[0], GATE_LRS[0], 0.0)
        train_step(engine, empty, 1, before_step=engine.check_agreement)
    else:
        place.step(engine, [make_batches(0)[0]], 0, 0.0, before_step=engine.check_agreement)
    moved = any(not torch.equal(before[name], value) for name, value in engine.values().items())
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.anchor = before
    rounds.end(engine)
    return {"moved": moved, "verdict": verdict(lambda: rounds.prove(engine))}


def merged_cut(place: Place, budget: int | None) -> dict[str, Any]:
    """Replicas that keep their factors apart at a round's end, then are cut by consensus."""
    engine = place.engine()
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    batches = make_batches(place.world.process_index)
    for step in range(3):
        place.step(engine, [batches[step]], step, 2.0)
    rounds.end(engine, soft, keep_factors=True)
    own = engine.masters()
    budgets = []
    if budget is not None:
        shapes = {name: (layer.in_features, layer.out_features) for name, layer in adapters(engine.module).items()}
        budgets = make_budgets(shapes, R, None, budget, {}, 0)
    with engine.released() as model:
        cut = pipeline.cut_by_consensus(
            model,
            own,
            consensus="svd",
            budgets=budgets,
            dtype=torch.float64,
            device="cpu",
            replicas=place.replicas,
        )
        plain = {name: (layer.lora_A, layer.lora_B) for name, layer in adapters(model).items()}
    factors = {name: None if A is None or B is None else (A.detach(), B.detach()) for name, (A, B) in plain.items()}
    gates = {name: (gate != 0).sum().item() for name, gate in rounds.gates.items()}
    return {"own": own, "cut": factors, "alive": gates, "spread": cut.spread, "kept": cut.ranks.kept_params}


def low_precision(place: Place) -> dict[str, Any]:
    """Two rounds of bfloat16 adapters: masters and parameters after each, on every process; one module alone."""
    torch.manual_seed(1)
    model = tiny_llama(**SMALL_MODEL).bfloat16()
    inject_sora(model, r=R, lora_alpha=LORA_ALPHA, target_modules=["layers.1.mlp.up_proj"], dtype=torch.bfloat16)
    groups = parameter_groups(model, 1.0, 1.0, deferred=True)
    engine = Engine(place.accelerator, model, ProxAdamW(groups), place.strategy, MAX_NORM, place.replicas)
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    batches = make_batches(place.world.process_index)
    for step in range(4):
        place.step(engine, [batches[step]], step, 0.5)
        if step % 2:
            own = {name: value.clone() for name, value in engine.values().items()}
            rounds.end(engine, soft)
    rounds.prove(engine)
    parameters = {name: p.detach().clone() for name, p in adapter_parameters(engine.module).items()}
    return {"own": own, "masters": {n: v.clone() for n, v in engine.values().items()}, "parameters": parameters}


@contextlib.contextmanager
def counted_traffic() -> Iterator[dict[str, int]]:
    """Bytes of float tensors that this process sends to others, and receives, inside."""
    gather, broadcast = dist.gather, dist.broadcast
    traffic = {"sent": 0, "received": 0}

    def counted_gather(tensor: Tensor, found: Any = None, dst: int = 0, group: Any = None) -> None:
        size = tensor.numel() * tensor.element_size()
        traffic["received" if found is not None else "sent"] += size * (1 if found is None else len(found) - 1)
        gather(tensor, found, dst=dst, group=group)

    def counted_broadcast(tensor: Tensor, src: int = 0) -> None:
        size, others = tensor.numel() * tensor.element_size(), dist.get_world_size() - 1
        traffic["sent" if src == dist.get_rank() else "received"] += size * (others if src == dist.get_rank() else 1)
        broadcast(tensor, src=src)

    dist.gather, dist.broadcast = counted_gather, counted_broadcast
    try:
        yield traffic
    finally:
        dist.gather, dist.broadcast = gather, broadcast


def averaged(place: Place) -> dict[str, Any]:
    """Values inside `Rounds.averaged` in the middle of a round, and whether each replica has its own bits back."""
    engine = place.engine()
    rounds = Rounds(place.replicas, OuterOptimizer())
    rounds.begin(engine)
    rounds.part()
    place.step(engine, [make_batches(place.world.process_index)[0]], 0, 0.0)
    own = {name: value.clone() for name, value in engine.values().items()}
    with rounds.averaged(engine):
        inside = {name: value.clone() for name, value in engine.values().items()}
    back = all(torch.equal(own[name], value) for name, value in engine.values().items())
    return {"own": own, "inside": inside, "back": back}
