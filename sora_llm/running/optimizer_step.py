"""One optimizer step, and the running sums behind a line of metrics.jsonl."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_llm.causal_loss import causal_loss_sum
from sora_llm.data.dataset import TokenRow
from sora_llm.data.order import PackedRows, share
from sora_llm.distributed.collectives import gather_integers, sum_over_processes
from sora_llm.distributed.engine import Engine, StepOutcome
from sora_llm.topology import World


@dataclass(frozen=True)
class StepBatches:
    """One process's micro-batches of a step, and their weights.  A weight is the number of supervised tokens, or the
    sum of their loss weights if the data has any."""

    micro_batches: Sequence[Mapping[str, Tensor]]
    """The arguments of `causal_loss_sum`."""
    weight: float
    """Total over the processes that average their gradients: of the whole step, or of the replica's part of it."""
    own_weight: float
    """Total over this process's rows."""
    supervised_tokens: int
    """Number in the whole step, over all processes."""
    tokens: int
    """Number in the whole step, over all processes."""


def step_batches(
    sequences: Sequence[PackedRows],
    world: World,
    micro_batch_size: int,
    collate: Callable[[list[list[TokenRow]]], Mapping[str, Tensor]],
    together: Sequence[int] | None = None,
    rotation: int = 0,
) -> StepBatches:
    """This process's batches in a step that takes `sequences`.

    `together` are the processes whose gradients are averaged with this one's; None means all of them.  Shares are dealt
    in order of decreasing length; with a `rotation` process p takes that of process p + `rotation`, so that over the
    steps no replica gets the long rows, or an epoch's missing ones, more often than others.
    """

    def share_of(process_index: int) -> list[list[PackedRows]]:
        place = (process_index + rotation) % world.num_processes
        return share(sequences, place, world.num_processes, micro_batch_size)

    mine = share_of(world.process_index)
    return StepBatches(
        [collate([sequence.read() for sequence in micro_batch]) for micro_batch in mine],
        _weight([sequences] if together is None else [rows for process in together for rows in share_of(process)]),
        _weight(mine),
        sum(sequence.num_supervised for sequence in sequences),
        sum(sequence.num_tokens for sequence in sequences),
    )


def _weight(micro_batches: Sequence[Sequence[PackedRows]]) -> float:
    return sum(sequence.weight for sequences in micro_batches for sequence in sequences)


def train_step(
    engine: Engine,
    batches: StepBatches,
    num_processes: int,
    before_step: Callable[[], None] | None = None,
) -> tuple[Tensor, StepOutcome]:
    """Forward and backward over this process's micro-batches, then the optimizer's step.

    The loss is Σ weight · cross-entropy / Σ weight over the supervised tokens of the whole step: all micro-batches of
    the `num_processes` processes whose gradients engines average, hence the factor.  A non-finite loss makes this
    process's gradients NaN, so the reduced norm is NaN on each of those processes and all skip the step together, after
    retrying it with every lower loss scale.  A replica left without rows in the last step of an epoch sits the step
    out.  `before_step` is called once between the last backward pass and the step, also on a replica that sits it out:
    at that point the copies from the previous step are still those that every process computed with.

    Returns: this process's Σ weight · cross-entropy (float64) and the outcome of the step.
    """
    if batches.weight == 0:
        if before_step is not None:
            before_step()
        return torch.zeros((), dtype=torch.float64, device=engine.device), StepOutcome(0.0, skipped=False)
    drawn_from = _random_states(engine.device)
    loss_sum = accumulate(engine, batches, num_processes)
    if before_step is not None:
        before_step()
    outcome = engine.step()
    while outcome.skipped and engine.loss_scale.back_off():
        _draw_again_from(drawn_from, engine.device)  # the same dropout masks
        loss_sum = accumulate(engine, batches, num_processes)
        outcome = engine.step()
    if not outcome.skipped:
        engine.loss_scale.hold()
    return loss_sum, outcome


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a forward pass draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _draw_again_from(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def accumulate(engine: Engine, batches: StepBatches, num_processes: int) -> Tensor:
    """Gradients of all micro-batches; returns this process's Σ weight · cross-entropy (float64)."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight = torch.tensor(num_processes / batches.weight, device=engine.device)
    for index, batch in enumerate(batches.micro_batches):
        with engine.micro_batch(last=index == len(batches.micro_batches) - 1):
            on_device = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.items()}
            loss = causal_loss_sum(engine.model, **on_device)
            engine.backward(loss * torch.where(loss.detach().isfinite(), weight, torch.nan))
            loss_sum += loss.detach().double()
            # Its graph is spent; tensors that 4-bit and 8-bit layers attached would stay in memory with the next one's.
            del loss
    return loss_sum


@dataclass
class Tally:
    """This process's loss and its weight, and all processes' tokens, since the last line; skipped steps in a row."""

    device: torch.device
    loss_sum: Tensor
    weight: float = 0.0
    skipped_in_a_row: int = 0
    most_in_a_row: int = 0
    """The longest streak of skipped steps since the last check."""
    skipped_steps: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    since: float | None = None

    @classmethod
    def start(cls, device: torch.device) -> Tally:
        return cls(device, torch.zeros((), dtype=torch.float64, device=device))

    def add(self, loss_sum: Tensor, outcome: StepOutcome, batches: StepBatches) -> None:
        """Count one step."""
        self.tokens += batches.tokens
        self.steps += 1
        if outcome.skipped:
            self.skipped_in_a_row += 1
            self.most_in_a_row = max(self.most_in_a_row, self.skipped_in_a_row)
            self.skipped_steps += 1
            return
        if batches.weight == 0:  # it sat the step out
            return
        self.skipped_in_a_row = 0
        self.loss_sum += loss_sum
        self.weight += batches.own_weight

    def totals(self) -> list[float]:
        """Σ weight · cross-entropy and Σ weight over all processes since the last line (collective)."""
        return sum_over_processes(self.loss_sum, self.weight, device=self.device)

    def flush(self) -> dict[str, float]:
        """loss, tokens_per_second and step_seconds since the last line; starts the next one (collective)."""
        total, weight = self.totals()
        self.pause_clock()
        line = {}
        if self.steps:  # none if a resumed run begins with the line of an earlier step
            line["tokens_per_second"] = self.tokens / max(self.seconds, 1e-9)
            line["step_seconds"] = self.seconds / self.steps
        if weight:
            line["loss"] = total / weight
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.weight, self.tokens, self.steps, self.seconds = 0.0, 0, 0, 0.0
        return line

    def pause_clock(self) -> None:
        """Stop counting time: evaluation, checkpoints and changes of form are not training."""
        if self.since is not None:
            self.seconds += time.monotonic() - self.since
            self.since = None

    def start_clock(self) -> None:
        """Count time from here, unless the clock is already running."""
        if self.since is None:
            self.since = time.monotonic()

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores (collective); skipped steps by process, as replicas differ in them."""
        loss_sum, weight = self.totals()
        own = [self.skipped_in_a_row, self.most_in_a_row, self.skipped_steps]
        skipped = gather_integers(own, self.device)
        return {"loss_sum": loss_sum, "weight": weight, "skipped": skipped}

    def load(self, state: Mapping[str, Any], process_index: int) -> None:
        """Restore `state`; the main process alone takes the sums over processes."""
        if process_index == 0:
            self.loss_sum += state["loss_sum"]
            self.weight = float(state["weight"])
        own = state["skipped"][min(process_index, len(state["skipped"]) - 1)]
        self.skipped_in_a_row, self.most_in_a_row, self.skipped_steps = own


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Make torch's generators a function of (seed, step, process), so that dropout needs no saved state."""
    mixed = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**40, (1,), generator=mixed))
    torch.manual_seed((base + step * 1_000_003 + process_index * 7_919) % 2**63)


def forget_peak(device: torch.device) -> None:
    """Reset a GPU's peak memory.

    DeepSpeed does so whenever an engine is made (0.19, `empty_cache`) and the other strategies do not: peaks would not
    be comparable if only some included the loading and cutting that came before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """This process's peak in GiB: for a GPU, the memory that torch has allocated there since `forget_peak`; for a CPU,
    even if there is also a GPU, the resident memory since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
