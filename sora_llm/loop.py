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
from sora_llm.distributed import Engine, StepOutcome, sum_over_processes


def train_step(
    engine: Engine,
    batches: Sequence[Mapping[str, Tensor]],
    step_tokens: int,
    num_processes: int,
    before_step: Callable[[], None] | None = None,
) -> tuple[Tensor, StepOutcome]:
    """Forward and backward over this process's micro-batches, then the step.

    The loss is Σ cross-entropy / `step_tokens`, the supervised tokens of the whole step over all processes and
    micro-batches; engines average gradients over processes, hence the factor.  A non-finite loss makes this process's
    gradients NaN, so the reduced norm is NaN on every process and all skip the step together.  `before_step` is
    called between the two: there the copies of the step before are still what every process computed with.

    Returns: this process's Σ cross-entropy (float64) and what became of the step.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight = torch.tensor(num_processes / step_tokens, device=engine.device)
    for index, batch in enumerate(batches):
        with engine.micro_batch(last=index == len(batches) - 1):
            input_ids, labels = (batch[key].to(engine.device, non_blocking=True) for key in ("input_ids", "labels"))
            loss = causal_loss_sum(engine.model, input_ids, labels)
            engine.backward(loss * torch.where(loss.detach().isfinite(), weight, torch.nan))
            loss_sum += loss.detach().double()
    if before_step is not None:
        before_step()
    return loss_sum, engine.step()


@dataclass
class Tally:
    """Loss and tokens since the last logged line, and non-finite steps in a row."""

    device: torch.device
    loss_sum: Tensor
    supervised_tokens: int = 0
    skipped_in_a_row: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    since: float = 0.0

    @classmethod
    def start(cls, device: torch.device) -> Tally:
        return cls(device, torch.zeros((), dtype=torch.float64, device=device), since=time.monotonic())

    def add(self, loss_sum: Tensor, outcome: StepOutcome, step_tokens: int, tokens: int) -> None:
        """Count one step (`step_tokens` supervised and `tokens` read, over all processes)."""
        self.tokens += tokens
        if outcome.skipped:
            self.skipped_in_a_row += 1
            self.skipped_steps += 1
            return
        self.skipped_in_a_row = 0
        self.loss_sum += loss_sum
        self.supervised_tokens += step_tokens

    def total_loss(self) -> float:
        """Σ cross-entropy since the last line over all processes (collective)."""
        return sum_over_processes(self.loss_sum, device=self.device)[0]

    def flush(self) -> dict[str, float]:
        """loss and tokens_per_second since the last line, which ends here (collective)."""
        total = self.total_loss()
        line = {"tokens_per_second": self.tokens / max(time.monotonic() - self.since, 1e-9)}
        if self.supervised_tokens:
            line["loss"] = total / self.supervised_tokens
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.supervised_tokens, self.tokens = 0, 0
        return line

    def restart_clock(self) -> None:
        """Count time from here: evaluation and checkpoints are not training."""
        self.since = time.monotonic()

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it (collective)."""
        return {
            "loss_sum": self.total_loss(),
            "supervised_tokens": self.supervised_tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
        }

    def load(self, state: Mapping[str, float], is_main: bool) -> None:
        """Put back `state`; the sum over processes counts the main process's part alone."""
        if is_main:
            self.loss_sum += state["loss_sum"]
        self.supervised_tokens = int(state["supervised_tokens"])
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
