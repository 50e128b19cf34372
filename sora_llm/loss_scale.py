"""A dynamic power-of-two loss scale that keeps gradients within float16's range, 6e-8 to 65,504.

The loss of a step is a mean over its supervised tokens: with many of them, the gradient of one is below float16's
range.  At 65,536 tokens per step the gradients of the adapters are off by half their norm, without an error
(benchmarks/LOG.md).  bfloat16 and float32 have sufficient range and need none of this.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

INIT_EXPONENT = 16  # as in torch's GradScaler
MAX_EXPONENT = 24  # no gradient is so small that it needs more
BACKOFF_EXPONENT = 4  # subtracted after an overflow: a loss that is NaN at any scale should cost few retries
GROWTH_INTERVAL = 100  # steps: each retry costs another step


class LossScale:
    """The factor by which the loss is multiplied before the backward pass and the adapters' float32 gradients are
    divided as they arrive: 2^exponent, exact in both directions.

    A step whose gradients are not finite is retried with a scale that is 2^BACKOFF_EXPONENT lower, down to 1; after
    GROWTH_INTERVAL finite steps in a row the scale doubles, up to 2^MAX_EXPONENT.  All processes that average gradients
    decide alike, since they use the norm after the reduction.

    `is_needed` is false if nothing computes in float16; the scale is then always 1.
    """

    def __init__(self, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._exponent = INIT_EXPONENT if is_needed else 0
        self._finite_steps = 0
        self._fell_from: int | None = None

    @property
    def factor(self) -> float:
        return 2.0**self._exponent

    def unscale(self, gradient: Tensor) -> Tensor:
        """The gradient of an adapter tensor, in float32's range, without the factor; for `register_hook`."""
        return gradient / self.factor

    def back_off(self) -> bool:
        """After a step that was not finite: lower the scale; returns whether there was a lower one to retry with.

        If the step was not finite at any scale, the scale was not the reason, and is restored."""
        if self._fell_from is None:
            self._fell_from = self._exponent
        if self._exponent == 0:
            self._exponent, self._fell_from = self._fell_from, None
            return False
        self._exponent, self._finite_steps = max(0, self._exponent - BACKOFF_EXPONENT), 0
        return True

    def hold(self) -> None:
        """After a finite step."""
        self._fell_from = None
        self._finite_steps += 1
        if self._finite_steps >= GROWTH_INTERVAL and self.is_needed:
            self._exponent, self._finite_steps = min(MAX_EXPONENT, self._exponent + 1), 0

    def state(self) -> list[int]:
        """The state for a checkpoint, between steps."""
        return [self._exponent, self._finite_steps]

    def load(self, state: Sequence[int]) -> None:
        """Restore `state`; the scale stays 1 if none is needed."""
        if self.is_needed:
            self._exponent, self._finite_steps = state
