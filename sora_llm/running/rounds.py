"""Rounds of local updates: the last agreed state, and how replicas synchronise.

A round ends with one exchange: every replica sends each module's factors to the replica that averages it, and gets all
averages back, 2 (K − 1)/K times the adapter, as much as an all-reduce moves; but the averager has all replicas' factors
at once, so measuring how far the mean of products is from the product of means costs no extra communication.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_llm.distributed.collectives import gather_objects, require_agreement, sum_over_processes
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.replicas import Replicas
from sora_llm.hashes import fingerprints
from sora_llm.local_updates import Drift, OuterOptimizer, average, owners, round_bytes, shrink_gates
from sora_llm.merge import mean_jaccard

Gates = Mapping[str, Tensor]  # module → (R,)
Prox = Callable[[Gates, Gates], Gates]  # gates, Σ τ → gates
_TAU, _VELOCITY = "tau", "outer_velocity"


@dataclass(frozen=True)
class RoundReport:
    """Measurements at the end of a round.

    `merge_error` is ‖mean(B g A) − mean(B) mean(g) mean(A)‖ / ‖mean(B g A)‖ over all modules, `support_overlap` the
    mean Jaccard index of the supports that the replicas' own gates would have (None if nothing is pruned or there is
    no other replica), `sync_bytes` the bytes that each replica sent and also received, `sync_seconds` the time taken.
    """

    merge_error: float
    support_overlap: float | None
    sync_bytes: int
    sync_seconds: float

    @property
    def fields(self) -> dict[str, float | int | None]:
        """The round's fields in a line of metrics.jsonl."""
        return {
            "merge_error": self.merge_error,
            "support_overlap": self.support_overlap,
            "sync_bytes": self.sync_bytes,
            "sync_seconds": self.sync_seconds,
        }


class Rounds:
    """Local updates in rounds; `anchor` holds the float32 values that all replicas last agreed on, by tensor name, on
    the engine's device.

    `is_open` says whether replicas have taken steps since; `in_agreement` whether they hold the same adapter: not while
    a round is open, nor after one that kept their factors apart for a merge.
    """

    def __init__(self, replicas: Replicas, outer: OuterOptimizer) -> None:
        self.replicas, self.outer = replicas, outer
        self.anchor: dict[str, Tensor] = {}
        self.in_agreement, self.is_open = True, False

    def begin(self, engine: Engine) -> None:
        """Take the values that `engine` holds as agreed on (collective).

        Raises:
            RunFailed: they are not the same on every process.
        """
        self.anchor = {name: value.clone() for name, value in engine.values().items()}
        self.outer.velocity = {}
        self.in_agreement, self.is_open = True, False
        self.prove(engine)

    def prove(self, engine: Engine) -> None:
        """Compare all processes' values if they are in agreement, else those they last agreed on (collective).

        Raises:
            RunFailed: they differ; tensors and processes are named.
        """
        remedy = "look for other files or versions on the machine named, or for faults of its memory"
        values = engine.values() if self.in_agreement else self.anchor
        require_agreement(fingerprints(values), "what replicas agreed on", remedy=remedy)

    def part(self) -> None:
        """Open a round: the replicas take steps of their own from here until `end`."""
        self.in_agreement, self.is_open = False, True

    @property
    def gates(self) -> dict[str, Tensor]:
        """{module: gate (R,)} as last agreed on, on the CPU; their zeros define the support."""
        return {name: gate.cpu() for name, gate in _gates(self.anchor).items()}

    def end(
        self,
        engine: Engine,
        prox: Prox | None = None,
        *,
        choose: Callable[[Gates], None] = lambda mean_gates: None,
        keep_factors: bool = False,
    ) -> RoundReport:
        """Let all replicas agree (collective).

        Factors take the outer step to their mean; gates become the prox of their mean, which `choose` may look at
        first, or without `prox` the mean itself.  With `keep_factors` only the supports are agreed on: each replica
        keeps its own A and B, for a merge of the products, and every gate shrinks as the mean one did; the anchor is
        then the adapter that a full agreement would have given.
        """
        since = time.monotonic()
        own, thresholds = engine.values(), engine.take_thresholds()
        mean, drift = self._average({**own, **{f"{name}.{_TAU}": tau for name, tau in thresholds.items()}})
        mean_thresholds = {name: mean.pop(f"{name}.{_TAU}") for name in thresholds}
        agreed, overlap = dict(mean), None
        if prox is not None:
            choose(_gates(mean))
            agreed |= {f"{name}.gate": gate for name, gate in prox(_gates(mean), mean_thresholds).items()}
            overlap = self._overlap(prox(_gates(own), thresholds))
        for name in agreed:
            if not name.endswith(".gate"):
                agreed[name] = self.outer.step(name, self.anchor[name], mean[name])
        if keep_factors:
            gates = [name for name in agreed if name.endswith(".gate")]
            engine.write({name: shrink_gates(own[name], mean[name], agreed[name]) for name in gates})
        else:
            engine.write(agreed)
        self.anchor, self.in_agreement, self.is_open = agreed, not keep_factors, False
        num_values = sum(value.numel() for value in (*own.values(), *thresholds.values()))
        num_bytes = round_bytes(num_values, self.replicas.num)
        return RoundReport(drift.relative, overlap, num_bytes, time.monotonic() - since)

    @contextlib.contextmanager
    def averaged(self, engine: Engine) -> Iterator[None]:
        """Inside a round, let every replica hold the slot-wise mean for the duration and, bit for bit, its own values
        afterwards (collective)."""
        if self.in_agreement:
            yield
            return
        own = {name: value.clone() for name, value in engine.values().items()}
        engine.write(self._average(own)[0])
        try:
            yield
        finally:
            engine.write(own)

    def _average(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Drift]:
        """The mean over replicas of the tensors "<module>.<kind>", and the drift of all modules (collective)."""
        by_module: dict[str, list[str]] = {}
        for name in values:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
        sizes = {module: sum(values[name].numel() for name in names) for module, names in by_module.items()}
        owned = owners(sizes, min(self.replicas.num, len(sizes)))
        names_of = [[name for module in modules for name in by_module[module]] for modules in owned]
        parts = [torch.cat([values[name].flatten() for name in names]) for names in names_of]
        drift, mean = Drift(), None
        if found := self.replicas.gather(parts):
            names = names_of[self.replicas.index]
            replicas = [_unflat(part, names, values) for part in found]
            averaged: dict[str, Tensor] = {}
            for module in owned[self.replicas.index]:
                own_means, own_drift = _average_module(module, replicas)
                averaged |= own_means
                drift += own_drift
            mean = torch.cat([averaged[name].flatten() for name in names])
        spread = self.replicas.spread(mean, parts)
        energies = sum_over_processes(drift.error_energy, drift.energy, device=parts[0].device)
        means: dict[str, Tensor] = {}
        for part, names in zip(spread, names_of, strict=True):
            means |= _unflat(part, names, values)
        return {name: means[name] for name in values}, Drift(*energies)

    def _overlap(self, own_gates: Gates) -> float | None:
        """Mean Jaccard index of the replicas' own supports (collective)."""
        support = torch.cat([gate != 0 for gate in own_gates.values()]).cpu()
        everyone = gather_objects(support if self.replicas.is_lead else None)
        supports = [found for found in everyone if found is not None]
        return mean_jaccard(torch.stack(supports), [1] * len(supports))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def agreed(self) -> dict[str, Tensor]:
        """The values that all replicas last agreed on, by name, on the CPU."""
        return {name: value.cpu().clone() for name, value in self.anchor.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the rounds: `agreed`, and "<name>.outer_velocity"."""
        velocity = {f"{name}.{_VELOCITY}": value.cpu().clone() for name, value in self.outer.velocity.items()}
        return {**self.agreed(), **velocity}

    def state(self) -> dict[str, int | bool]:
        """The rest of a checkpoint's state, as JSON."""
        return {"agree": self.in_agreement, "is_open": self.is_open, "replicas": self.replicas.num}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, int | bool], engine: Engine) -> None:
        """Restore `tensors` and `state`; `engine` holds this replica's own values."""
        self.anchor = {name: tensors[name].to(engine.device) for name in engine.values()}
        suffix = f".{_VELOCITY}"
        self.outer.velocity = {
            name.removesuffix(suffix): value.to(engine.device)
            for name, value in tensors.items()
            if name.endswith(suffix)
        }
        self.in_agreement, self.is_open = bool(state["agree"]), bool(state["is_open"])


def _gates(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(".gate"): value for name, value in values.items() if name.endswith(".gate")}


def _average_module(module: str, replicas: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], Drift]:
    """One module's means by tensor name, and its drift."""
    gate_name, tau_name = f"{module}.gate", f"{module}.{_TAU}"
    factors = [(r[f"{module}.lora_A"], r[f"{module}.lora_B"], r.get(gate_name)) for r in replicas]
    (A, B, gate), drift = average(factors)
    mean = {f"{module}.lora_A": A, f"{module}.lora_B": B}
    if gate is not None:
        mean[gate_name] = gate
    if tau_name in replicas[0]:
        mean[tau_name] = torch.stack([replica[tau_name] for replica in replicas]).mean(0)
    return mean, drift


def _unflat(flat: Tensor, names: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors that are concatenated in `flat`, with their shapes in `like`."""
    pieces = flat.split([like[name].numel() for name in names])
    return {name: piece.view(like[name].shape) for name, piece in zip(names, pieces, strict=True)}
