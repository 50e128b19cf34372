"""When a phase ends early, and which dev loss counts as the best."""

from __future__ import annotations

import math

import pytest

from sora_llm.running.early_stopping import EarlyStopping


def test_patience_runs_out_after_that_many_evaluations_in_a_row_without_a_lower_loss() -> None:
    stopping = EarlyStopping(2)
    assert [stopping.update(loss) for loss in (3.0, 3.0, 2.5, 2.6, 2.5)] == [False, False, False, False, True]
    assert not EarlyStopping(1).update(3.0)


def test_without_a_limit_it_never_runs_out() -> None:
    stopping = EarlyStopping(None)
    assert not any(stopping.update(1.0) for _ in range(9))
    assert not stopping.is_enabled and EarlyStopping(9).is_enabled


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss: float) -> None:
    stopping = EarlyStopping(1)
    assert not stopping.is_better(loss) and stopping.update(loss)
    assert stopping.is_better(3.0) and not stopping.update(3.0)
    assert not stopping.is_better(3.0) and stopping.is_better(2.9)


def test_a_new_stage_knows_no_best_loss() -> None:
    stopping = EarlyStopping(2)
    stopping.update(1.0)
    stopping.update(2.0)
    stopping.reset()
    assert stopping.is_better(5.0) and not stopping.update(5.0) and not stopping.update(6.0)


def test_a_loaded_state_goes_on_where_the_saved_one_was() -> None:
    first, again = EarlyStopping(2), EarlyStopping(2)
    first.update(1.0)
    first.update(2.0)
    again.load(first.state())
    assert not again.is_better(1.5) and again.update(1.5)
