"""The time of a step, calculated: what each part grows with."""

import dataclasses

import pytest

from sora_llm.estimates.step_time import Machines, Work, step_time

WORK = Work(
    tokens=4096,
    linear_parameters=6_476_005_376,
    head_parameters=131_072_000,
    adapter_parameters=159_907_840,
    num_layers=32,
    frozen_bytes=3_956_000_000,
)
MACHINES = Machines()
ADAPTER_BYTES = 4 * WORK.adapter_parameters


def test_one_process_sends_nothing():
    for strategy in ("none", "ddp", "zero2", "zero3"):
        alone = step_time(WORK, strategy, 1, MACHINES)
        assert alone.reduce == alone.gather == 0 and alone.seconds == alone.compute > 0


def test_recomputing_takes_each_forward_product_once_more():
    less = dataclasses.replace(WORK, checkpointing=False)
    saved = step_time(WORK, "none", 1, MACHINES).compute - step_time(less, "none", 1, MACHINES).compute
    products = 2 * WORK.tokens * (WORK.linear_parameters + WORK.adapter_parameters)
    assert saved == pytest.approx(products / (MACHINES.flops * MACHINES.utilisation))


def test_a_step_takes_its_products_and_what_travels():
    """Forward and to the inputs 4 per weight, an adapter's own gradients 2 more, recomputing 2 (not the head)."""
    products = 6 * WORK.linear_parameters + 4 * WORK.head_parameters + 8 * WORK.adapter_parameters
    found = step_time(WORK, "zero3", 16, MACHINES)
    assert found.compute == pytest.approx(WORK.tokens * products / (989e12 * 0.35))
    assert found.seconds == pytest.approx(found.compute + found.reduce + found.gather) and found.gather > 0


def test_a_reduction_is_a_ring_over_the_slowest_link():
    inside, between = (step_time(WORK, "ddp", number, MACHINES).reduce for number in (8, 16))
    assert inside == pytest.approx(2 * (7 / 8 * ADAPTER_BYTES / 300e9 + 3 * 20e-6))
    assert between == pytest.approx(2 * (15 / 16 * ADAPTER_BYTES / 25e9 + 4 * 20e-6))


def test_zero2_gathers_adapters_and_zero3_everything_in_each_direction_of_every_micro_batch():
    assert step_time(WORK, "zero2", 16, MACHINES).gather == pytest.approx(15 / 16 * ADAPTER_BYTES / 25e9 + 80e-6)
    once = step_time(WORK, "zero3", 16, MACHINES).gather
    assert once == pytest.approx(2 * (15 / 16 * (WORK.frozen_bytes + ADAPTER_BYTES) / 25e9 + 32 * 80e-6))
    four = dataclasses.replace(WORK, micro_batches=4)
    assert step_time(four, "zero3", 16, MACHINES).gather == pytest.approx(4 * once)


def test_local_updates_reduce_once_in_so_many_steps():
    local = dataclasses.replace(WORK, sync_every=30)
    own, every = (step_time(work, "ddp", 64, MACHINES).reduce for work in (local, WORK))
    assert own == pytest.approx(every / 30)
    by_machine = dataclasses.replace(local, is_machine_a_replica=True)
    inside = step_time(WORK, "ddp", 8, MACHINES).reduce
    assert step_time(by_machine, "ddp", 64, MACHINES).reduce == pytest.approx(own + inside)


@pytest.mark.parametrize(("strategy", "times"), [("ddp", 1), ("zero1", 1), ("zero2", 4), ("zero3", 4)])
def test_zero2_and_zero3_reduce_every_micro_batch(strategy, times):
    """As counted: tests/test_step_costs.py."""
    four = dataclasses.replace(WORK, micro_batches=4)
    own, once = (step_time(work, strategy, 16, MACHINES).reduce for work in (four, WORK))
    assert own == pytest.approx(times * once)
