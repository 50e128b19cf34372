"""Learning rate, λ and phases as pure functions of the step: without state, so resuming is just calling again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

DENSE, SPARSIFY, FINETUNE = "dense", "sparsify", "finetune"


@dataclass(frozen=True)
class Phases:
    """Steps [0, dense_end) are dense, [dense_end, sparsify_end) sparsify, [sparsify_end, total_steps) finetune."""

    dense_end: int
    sparsify_end: int
    total_steps: int

    def progress(self, step: int) -> float:
        """u ∈ (0, 1], the progress after `step` in the sparsify window, which every plan gives at least one step."""
        return (step - self.dense_end + 1) / (self.sparsify_end - self.dense_end)

    def at(self, step: int) -> str:
        """The phase that optimizer step number `step` (from 0) belongs to."""
        if step < self.dense_end:
            return DENSE
        return SPARSIFY if step < self.sparsify_end else FINETUNE


def round_bounds(step: int, length: int, bounds: Sequence[int]) -> tuple[int, int]:
    """The first step of the round that `step` belongs to, and the first one after it.

    Rounds have `length` steps, counted from each of the rising `bounds` (the phases'), at which they also end.
    """
    start = max(bound for bound in bounds if bound <= step)
    end = min(bound for bound in bounds if bound > step)
    first = start + (step - start) // length * length
    return first, min(first + length, end)


def phases(total_steps: int, dense_ratio: float, consensus_at: float) -> Phases:
    """Boundaries at floor(ratio · total_steps), with the ratio taken as the decimal written (0.29 · 100 is 29)."""
    dense_end = math.floor(Fraction(str(dense_ratio)) * total_steps)
    sparsify_end = math.floor(Fraction(str(consensus_at)) * total_steps)
    return Phases(dense_end, sparsify_end, total_steps)


def warmup_steps(total_steps: int, warmup_ratio: Fraction) -> int:
    """ceil(warmup_ratio · total_steps)."""
    return math.ceil(warmup_ratio * total_steps)


def lr_factor(step: int, total_steps: int, warmup: int, kind: str, min_ratio: float = 0.0) -> float:
    """The learning rate's factor (peak 1) at optimizer step `step` (from 0), with transformers' formulas.

    `kind` is linear, cosine, constant or constant_with_warmup; `constant` honours a warm-up as well.  linear and cosine
    end at `min_ratio` (cosine: transformers' cosine_with_min_lr).
    """
    if step < warmup:
        return step / warmup
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if kind == "linear":
        falling = max(0.0, 1.0 - progress)
    elif kind == "cosine":
        falling = max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    else:
        raise ValueError(f"lr_scheduler_type {kind!r} is not one of linear, cosine, constant, constant_with_warmup")
    return min_ratio + (1.0 - min_ratio) * falling


def ramp_steps(remaining_steps: int, warmup_ratio: Fraction) -> int:
    """Steps of the ramp after the adapters were changed: max(1, round(warmup_ratio · remaining steps))."""
    return max(1, round(warmup_ratio * remaining_steps))


def ramp(steps_since: int, length: int) -> float:
    """The factor of step number `steps_since` (from 0) after a change: linear, 1 again after `length` steps."""
    return min(1.0, (steps_since + 1) / (length + 1))


def window_sum(run_phases: Phases, factor: Callable[[int], float]) -> float:
    """Σ f_t over the sparsify window: how far, in units of its learning rate, a gate can travel there."""
    return math.fsum(map(factor, range(run_phases.dense_end, run_phases.sparsify_end)))


def auto_gate_lr(learning_rate: float, factor_sum: float) -> float:
    """`gate_lr: auto` = min(0.25, max(learning_rate, 4 / Σ f_t)): gates must be able to travel from 1 to 0."""
    return 0.25 if factor_sum == 0 else min(0.25, max(learning_rate, 4.0 / factor_sum))


def path_lambdas(kind: str, first: float, last: float, count: int) -> list[float]:
    """The λ of each stage of a sparsity path, rising from `first` to `last` (Algorithm 1 of the SoRA paper).

    linear: evenly spaced; log_linear: log of evenly spaced e^λ; exp_linear: evenly spaced log λ, from above 0.

    Raises:
        ValueError: unknown kind, or exp_linear from 0.
    """
    if kind == "exp_linear" and not first > 0:
        raise ValueError(f"exp_linear multiplies λ from stage to stage and begins above 0, not at {first}")
    if count == 1:
        return [first]
    places = [index / (count - 1) for index in range(1, count - 1)]
    if kind == "linear":
        found = [first + place * (last - first) for place in places]
    elif kind == "log_linear":
        found = [last + math.log(place + (1 - place) * math.exp(first - last)) for place in places]
    elif kind == "exp_linear":
        found = [first * (last / first) ** place for place in places]
    else:
        raise ValueError(f"lambda_schedule {kind!r} is not one of linear, log_linear, exp_linear")
    return [first, *found, last]
