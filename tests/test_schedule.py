"""Schedules are pure functions of the step, with transformers' formulas and the boundaries that were written down."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from reference import gate_lr_auto_reference, lr_factor_reference
from transformers import get_scheduler

from sora_llm.schedule import auto_gate_lr, lr_factor, path_lambdas, phases, ramp, ramp_steps, warmup_steps, window_sum

KINDS = ["linear", "cosine", "constant_with_warmup"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (20, 1), (1, 0), (7, 7), (7, 9), (3, 2)])
def test_the_factor_is_transformers_at_every_step(kind, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert lr_factor(step, total, warmup, kind) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (1, 0), (7, 7)])
def test_a_cosine_with_a_floor_is_transformers_at_every_step(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"num_warmup_steps": warmup, "num_training_steps": total}
    scheduler = get_scheduler(
        "cosine_with_min_lr", optimizer, **options, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    for step in range(total):
        expected = scheduler.get_last_lr()[0]
        assert lr_factor(step, total, warmup, "cosine", 0.1) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_line_with_a_floor_falls_from_the_peak_to_the_floor():
    assert [lr_factor(step, 10, 2, "linear", 0.2) for step in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.6, 0.2])


def test_constant_honours_a_warm_up():
    """transformers' `constant` ignores it silently; a key that exists works."""
    assert [lr_factor(step, 6, 2, "constant") for step in range(6)] == [0, 0.5, 1, 1, 1, 1]
    assert [lr_factor(step, 3, 0, "constant") for step in range(3)] == [1, 1, 1]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'sqrt' is not one of linear, cosine"):
        lr_factor(5, 10, 0, "sqrt")


@pytest.mark.parametrize(
    ("total", "ratio", "boundary"),
    # floats: 0.29 · 100 is 28.999…, 0.57 · 100 is 56.999…, 0.1 · 30 is 3.0000000000000004, 1.1e-3 · 1000 is 1.1
    [(100, 0.29, 29), (100, 0.57, 57), (30, 0.1, 3), (9, 0.1, 0), (1000, 1.1e-3, 1), (1000, 0.001, 1), (7, 0.5, 3)],
)
def test_boundaries_are_the_floor_of_the_decimal_that_was_written(total, ratio, boundary):
    assert phases(total, ratio, 1.0).dense_end == boundary
    assert phases(total, 0.0, ratio).sparsify_end == boundary


def test_a_run_is_dense_then_sparsifies_then_finetunes():
    run = phases(10, 0.2, 0.7)
    assert [run.at(step) for step in range(10)] == ["dense"] * 2 + ["sparsify"] * 5 + ["finetune"] * 3
    assert {phases(10, 0.0, 1.0).at(step) for step in range(10)} == {"sparsify"}


def test_the_progress_through_the_sparsify_window_ends_at_one():
    run = phases(10, 0.2, 0.7)
    assert [run.progress(step) for step in range(2, 7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("remaining", "ratio", "length"), [(100, 0.03, 3), (60, 0.03, 2), (10, 0.03, 1), (10, 0.0, 1)])
def test_a_ramp_takes_the_rounded_share_of_what_is_left_and_at_least_a_step(remaining, ratio, length):
    assert ramp_steps(remaining, Fraction(str(ratio))) == length
    factors = [ramp(step, length) for step in range(length + 2)]
    assert factors == pytest.approx([(step + 1) / (length + 1) for step in range(length)] + [1.0, 1.0])


@pytest.mark.parametrize(("total", "ratio", "steps"), [(100, 0.07, 7), (101, 0.03, 4), (50, 0.0, 0), (30, 0.1, 3)])
def test_warm_up_steps_are_rounded_up(total, ratio, steps):
    assert warmup_steps(total, Fraction(str(ratio))) == steps


def test_the_window_sum_counts_the_sparsify_steps_alone():
    run = phases(40, 0.1, 0.75)
    factors = [lr_factor_reference(step, 40, 6, "cosine") for step in range(40)]
    assert window_sum(run, factors.__getitem__) == pytest.approx(sum(factors[4:30]), rel=1e-12)
    assert window_sum(phases(10, 0.5, 0.5), factors.__getitem__) == 0


@pytest.mark.parametrize("learning_rate", [2e-4, 5e-3, 0.1, 0.4])
@pytest.mark.parametrize("factors", [[], [0.0], [0.5], [1.0] * 16, [1.0] * 17, [0.3] * 400, [1.0] * 100_000])
def test_the_automatic_gate_rate_is_the_references(learning_rate, factors):
    found = auto_gate_lr(learning_rate, sum(factors))
    assert found == pytest.approx(gate_lr_auto_reference(learning_rate, factors), rel=1e-12)


def test_a_gate_without_signal_dies_within_the_window_unless_the_cap_binds():
    total = 50.0
    assert auto_gate_lr(1e-4, total) * total == pytest.approx(4)  # so that it needs 1/(4λ) of the window
    assert auto_gate_lr(1e-4, 3.0) == 0.25


@pytest.mark.parametrize("kind", ["linear", "log_linear", "exp_linear"])
@pytest.mark.parametrize(("first", "last"), [(0.2, 0.9), (1.0, 1000.0)])
def test_the_lambdas_of_a_path_rise_from_the_first_to_the_last(kind, first, last):
    found = path_lambdas(kind, first, last, 5)
    assert (found[0], found[-1]) == (first, last) and found == sorted(found) and len(set(found)) == 5
    if kind == "exp_linear":
        assert found[1] / found[0] == pytest.approx(found[4] / found[3])
    if kind == "log_linear" and last < 10:
        steps = [math.exp(b) - math.exp(a) for a, b in itertools.pairwise(found)]
        assert steps == pytest.approx([steps[0]] * 4)
    assert path_lambdas(kind, first, last, 1) == [first]
