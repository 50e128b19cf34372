"""Early stopping: the end of a phase in which the dev loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Counts evaluations without a better dev loss; `limit` None never runs out."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        self._best: float | None = None
        self._without = 0

    @property
    def is_enabled(self) -> bool:
        """Whether there is a limit at all."""
        return self._limit is not None

    def is_better(self, eval_loss: float) -> bool:
        """Whether a dev loss is lower than all that were counted; one that is not finite never is."""
        return math.isfinite(eval_loss) and (self._best is None or eval_loss < self._best)

    def update(self, eval_loss: float) -> bool:
        """Count an evaluation; returns whether patience has run out."""
        if self.is_better(eval_loss):
            self._best, self._without = eval_loss, 0
        else:
            self._without += 1
        return self._limit is not None and self._without >= self._limit

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {"best": self._best, "without": self._without}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self._best, self._without = state["best"], int(state["without"])
