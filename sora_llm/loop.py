"""One optimizer step, and the sums that a line of metrics.jsonl is made of."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_llm.backbone import causal_loss_sum
from sora_llm.data.dataset import TokenRow
from sora_llm.data.order import PackedRows, share
from sora_llm.distributed import Engine, StepOutcome, sum_over_processes
from sora_llm.topology import World


@dataclass(frozen=True)
class StepBatches:
    """One process's micro-batches of a step; the other figures are of the whole step, over all processes."""

    micro_batches: Sequence[Mapping[str, Tensor]]
    """The arguments of `causal_loss_sum`."""
    weight: float
    """Of the supervised tokens: their number, unless the data gives weights."""
    supervised_tokens: int
    tokens: int


def step_batches(
    sequences: Sequence[PackedRows],
    world: World,
    micro_batch_size: int,
    collate: Callable[[list[list[TokenRow]]], Mapping[str, Tensor]],
) -> StepBatches:
    """What a step that takes `sequences` is made of on this process."""
    mine = share(sequences, world.process_index, world.num_processes, micro_batch_size)
    return StepBatches(
        [collate([sequence.read() for sequence in micro_batch]) for micro_batch in mine],
        sum(sequence.weight for sequence in sequences),
        sum(sequence.num_supervised for sequence in sequences),
        sum(sequence.num_tokens for sequence in sequences),
    )


def train_step(
    engine: Engine,
    batches: StepBatches,
    num_processes: int,
    before_step: Callable[[], None] | None = None,
) -> tuple[Tensor, StepOutcome]:
    """Forward and backward over this process's micro-batches, then the step.

    The loss is Σ weight · cross-entropy / Σ weight over the supervised tokens of the whole step, of all processes and
    micro-batches; engines average gradients over processes, hence the factor.  A non-finite loss makes this process's
    gradients NaN, so the reduced norm is NaN on every process and all skip the step together.  `before_step` is
    called between the two: there the copies of the step before are still what every process computed with.

    Returns: this process's Σ weight · cross-entropy (float64) and what became of the step.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight = torch.tensor(num_processes / batches.weight, device=engine.device)
    for index, batch in enumerate(batches.micro_batches):
        with engine.micro_batch(last=index == len(batches.micro_batches) - 1):
            on_device = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.items()}
            loss = causal_loss_sum(engine.model, **on_device)
            engine.backward(loss * torch.where(loss.detach().isfinite(), weight, torch.nan))
            loss_sum += loss.detach().double()
    if before_step is not None:
        before_step()
    return loss_sum, engine.step()


@dataclass
class Tally:
    """Loss, its weight and tokens since the last logged line, and non-finite steps in a row."""

    device: torch.device
    loss_sum: Tensor
    weight: float = 0.0
    skipped_in_a_row: int = 0
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
            self.skipped_steps += 1
            return
        self.skipped_in_a_row = 0
        self.loss_sum += loss_sum
        self.weight += batches.weight

    def total_loss(self) -> float:
        """Σ weight · cross-entropy since the last line over all processes (collective)."""
        return sum_over_processes(self.loss_sum, device=self.device)[0]

    def flush(self) -> dict[str, float]:
        """loss, tokens_per_second and step_seconds since the last line, which ends here (collective)."""
        total = self.total_loss()
        self.pause_clock()
        line = {"tokens_per_second": self.tokens / max(self.seconds, 1e-9)}
        if self.steps:
            line["step_seconds"] = self.seconds / self.steps
        if self.weight:
            line["loss"] = total / self.weight
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.weight, self.tokens, self.steps, self.seconds = 0.0, 0, 0, 0.0
        return line

    def pause_clock(self) -> None:
        """Evaluation, checkpoints and changes of form are not training."""
        if self.since is not None:
            self.seconds += time.monotonic() - self.since
            self.since = None

    def start_clock(self) -> None:
        """Count time from here, if it does not run."""
        if self.since is None:
            self.since = time.monotonic()

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it (collective)."""
        return {
            "loss_sum": self.total_loss(),
            "weight": self.weight,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
        }

    def load(self, state: Mapping[str, float], is_main: bool) -> None:
        """Put back `state`; the sum over processes counts the main process's part alone."""
        if is_main:
            self.loss_sum += state["loss_sum"]
        self.weight = float(state["weight"])
        self.skipped_in_a_row, self.skipped_steps = int(state["skipped_in_a_row"]), int(state["skipped_steps"])


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Make torch's generators a function of (seed, step, process), so that dropout needs no saved state."""
    mixed = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**40, (1,), generator=mixed))
    torch.manual_seed((base + step * 1_000_003 + process_index * 7_919) % 2**63)


def peak_memory_gib() -> float:
    """This process's peak: allocated CUDA memory, or resident memory without CUDA; GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
