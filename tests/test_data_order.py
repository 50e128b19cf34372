"""Which rows a step takes, and which of them a process: a pure function of seed, epoch and position."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from helpers import token_row
from hypothesis import given
from hypothesis import strategies as st

from sora_llm.data.dataset import TokenDataset
from sora_llm.data.order import EpochOrder, fill_rate, share, split_validation
from sora_llm.data.pack import best_fit_decreasing
from sora_llm.errors import UserError


def rows_of(lengths, sources=None):
    """A data set whose row i is all token i."""
    return TokenDataset.of([token_row([i] * length) for i, length in enumerate(lengths)], sources)


def numbers(sequences):
    return [sequence.rows.tolist() for sequence in sequences]


def epoch_of(order, epoch, steps):
    """The sequences of an epoch of so many steps."""
    return [rows for step in range(epoch * steps, (epoch + 1) * steps) for rows in numbers(order.step(step))]


LENGTHS = [2 + (7 * i) % 23 for i in range(100)]


# ----- an epoch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_to", [None, 24, 60, 4000])
def test_an_epoch_holds_every_row_once_and_the_next_one_in_another_order(pack_to):
    order = EpochOrder(rows_of(LENGTHS), 8, seed=1, pack_to=pack_to)
    steps = order.steps_in(Fraction(1))
    first, second = epoch_of(order, 0, steps), epoch_of(order, 1, steps)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(100))  # noqa: RUF017
    assert first != second
    assert all(len(rows) == 1 for rows in first) == (pack_to is None)


@pytest.mark.parametrize("pack_to", [None, 60])
def test_the_order_depends_on_seed_epoch_and_position_alone(pack_to):
    """Asked in another order, by another process, or after a resume: the same rows."""
    order = EpochOrder(rows_of(LENGTHS), 8, seed=1, pack_to=pack_to)
    steps = range(3 * order.steps_in(Fraction(1)))
    straight = [numbers(order.step(step)) for step in steps]
    for step in reversed(steps):
        assert numbers(EpochOrder(rows_of(LENGTHS), 8, seed=1, pack_to=pack_to).step(step)) == straight[step]
    other = EpochOrder(rows_of(LENGTHS), 8, seed=2, pack_to=pack_to)
    assert [numbers(other.step(step)) for step in steps] != straight


def test_the_order_is_fixed_for_ever():
    """A run that is resumed with another version must not see other rows."""
    few = rows_of([5, 3, 9, 4, 4, 7, 2, 8, 6, 5])
    assert numbers(EpochOrder(few, 4, seed=42).step(4)) == [[3], [1], [2], [9]]
    assert numbers(EpochOrder(few, 4, seed=42, pack_to=12).step(2)) == [[7, 4], [2, 1], [3, 6], [5, 0]]
    assert numbers(EpochOrder(rows_of(LENGTHS), 2, seed=42).step(60)) == [[23], [0]]


@pytest.mark.parametrize(("num_rows", "rows_per_step", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3])])
def test_a_step_never_crosses_an_epoch_and_the_last_may_be_smaller(num_rows, rows_per_step, sizes):
    order = EpochOrder(rows_of([3] * num_rows), rows_per_step, seed=5)
    assert order.steps_in(Fraction(1)) == len(sizes)
    assert [len(order.step(step)) for step in range(2 * len(sizes))] == sizes * 2


def test_epochs_are_counted_in_steps_rounded_up():
    order = EpochOrder(rows_of([3] * 100), 10, seed=0)
    assert [order.steps_in(Fraction(text)) for text in ("1", "2", "0.5", "1.1", "0.01", "2.99")] == [
        10,
        20,
        5,
        11,
        1,
        30,
    ]
    assert [order.epochs_of(steps) for steps in (0, 1, 10, 15)] == [0, 0.1, 1, 1.5]
    order = EpochOrder(rows_of([3] * 10), 4, seed=0)
    assert order.epochs_of(2) == pytest.approx(2 / 3), "the last, smaller step ends the epoch"
    assert order.epochs_of(3) == 1


# ----- length grouping ------------------------------------------------------------------------------------------------


def test_without_packing_a_step_has_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(2, 500, 4000)
    dataset = rows_of(lengths)
    order = EpochOrder(dataset, 8, seed=0)
    steps = [order.step(step) for step in range(500)]

    def padded(batches):
        return sum(len(batch) * max(lengths[batch]) for batch in batches)

    grouped = padded([[int(sequence.rows[0]) for sequence in step] for step in steps])
    shuffled = padded(np.random.default_rng(1).permutation(4000).reshape(500, 8))
    assert grouped < 1.05 * lengths.sum() < 1.5 * lengths.sum() < shuffled
    longest = [max(sequence.num_tokens for sequence in step) for step in steps]
    assert abs(np.corrcoef(range(500), longest)[0, 1]) < 0.2, "steps of short and of long rows take turns"


def test_the_smaller_last_step_stays_last_when_rows_are_grouped():
    order = EpochOrder(rows_of(LENGTHS), 7, seed=0)  # 15 steps, the last of 2 rows
    assert [len(order.step(step)) for step in range(30)] == [*[7] * 14, 2] * 2


# ----- packing --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_best_fit_decreasing_puts_every_item_into_the_fullest_bin_that_holds_it(lengths, capacity):
    """Against the definition, in O(n²)."""
    ordered = np.array(sorted(lengths, reverse=True))
    filled: list[int] = []
    for length, chosen in zip(ordered, best_fit_decreasing(ordered, capacity), strict=True):
        fitting = [load for load in filled if load + length <= capacity]
        if chosen == len(filled):
            assert not fitting, "a new bin only where no open one has room"
            filled.append(0)
        else:
            assert filled[chosen] == max(fitting)
        filled[chosen] += int(length)
    assert max(filled) <= capacity and sum(filled) == sum(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=120), st.integers(30, 90), st.integers(1, 9))
def test_packed_sequences_hold_every_row_once_and_never_too_many_tokens(lengths, capacity, rows_per_step):
    order = EpochOrder(rows_of(lengths), rows_per_step, seed=3, pack_to=capacity)
    counts = []
    for epoch in range(3):
        sequences = epoch_of(order, epoch, order.steps_in(Fraction(1)))
        assert sorted(sum(sequences, [])) == list(range(len(lengths)))  # noqa: RUF017
        assert max(sum(lengths[row] for row in rows) for rows in sequences) <= capacity
        counts.append(len(sequences))
    assert len(set(counts)) == 1, "every epoch has as many sequences: steps can be counted without packing them all"


def test_rows_meet_others_in_each_epoch():
    order = EpochOrder(rows_of([10] * 60), 5, seed=0, pack_to=30)
    neighbours = [{tuple(sorted(rows)) for rows in epoch_of(order, epoch, 4)} for epoch in (0, 1)]
    assert len(neighbours[0] & neighbours[1]) < 3


def test_the_fill_rate_is_that_of_the_packed_sequences():
    dataset = rows_of([7, 3, 6, 4, 5, 2])
    assert fill_rate(dataset, 10) == 27 / 30 and fill_rate(dataset, 27) == 1.0
    assert len(epoch_of(EpochOrder(dataset, 1, seed=0, pack_to=10), 0, 3)) == 3


# ----- mixtures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_to", [None, 40])
@pytest.mark.parametrize(
    ("weights", "counts"), [([1, 1, 1], [20, 20, 20]), ([3, 2, 1], [30, 20, 10]), ([1, 0.1, 1e-9], [54, 5, 1])]
)
def test_in_a_mixture_every_data_set_has_its_share_of_an_epoch(weights, counts, pack_to):
    sources = [0] * 10 + [1] * 20 + [2] * 30
    order = EpochOrder(rows_of(LENGTHS[:60], sources), 1, seed=0, pack_to=pack_to, mixture=weights)
    first = 0
    for epochs in range(1, 4):
        last = order.steps_in(Fraction(epochs))
        found = [row for step in range(first, last) for rows in numbers(order.step(step)) for row in rows]
        assert np.bincount([sources[row] for row in found], minlength=3) == pytest.approx(counts, abs=1)
        first = last


def test_a_row_of_a_mixture_comes_again_only_after_all_others_of_its_data_set():
    sources = [0] * 7 + [1] * 33
    order = EpochOrder(rows_of([3] * 40, sources), 4, seed=0, mixture=[1, 1])
    seen = [row for epoch in range(8) for rows in epoch_of(order, epoch, 10) for row in rows]
    for source, size in ((0, 7), (1, 33)):
        times = np.bincount([row for row in seen if sources[row] == source], minlength=40)
        times = times[[row for row in range(40) if sources[row] == source]]
        assert times.max() - times.min() <= 1 and times.sum() == 160, size


def test_the_order_of_a_packed_mixture_can_be_asked_anywhere():
    """Its epochs differ in length, so the position of a step is the sum of all before."""
    sources = [0] * 10 + [1] * 50
    make = lambda: EpochOrder(rows_of(LENGTHS[:60], sources), 3, seed=0, pack_to=30, mixture=[4, 1])  # noqa: E731
    order = make()
    last = order.steps_in(Fraction(6))
    straight = [numbers(order.step(step)) for step in range(last)]
    assert [numbers(make().step(step)) for step in range(last)] == straight
    assert len({len(step) for step in straight}) > 1, "some epoch ends with a smaller step"
    assert [make().epochs_of(order.steps_in(Fraction(epochs))) for epochs in range(7)] == list(range(7))


# ----- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [*range(1, 18), 64])
@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 8), (2, 4), (4, 2), (8, 1), (1, 1), (3, 2)])
def test_the_shares_of_a_step_hold_every_sequence_once_in_equally_many_micro_batches(
    num_rows, num_processes, micro_batch_size
):
    step = EpochOrder(rows_of(LENGTHS[:num_rows]), num_rows, seed=0).step(0)
    shares = [share(step, process, num_processes, micro_batch_size) for process in range(num_processes)]
    found = [int(sequence.rows[0]) for micro_batches in shares for batch in micro_batches for sequence in batch]
    assert sorted(found) == list(range(num_rows))
    assert len({len(micro_batches) for micro_batches in shares}) == 1
    assert len(shares[0]) == -(-num_rows // (num_processes * micro_batch_size))
    assert all(len(batch) <= micro_batch_size for micro_batches in shares for batch in micro_batches)


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_a_full_step_has_the_configured_micro_batches_whatever_the_split(num_processes, micro_batch_size):
    gradient_accumulation_steps = 3
    step = EpochOrder(rows_of(LENGTHS), num_processes * micro_batch_size * gradient_accumulation_steps, seed=0).step(1)
    for process in range(num_processes):
        sizes = [len(batch) for batch in share(step, process, num_processes, micro_batch_size)]
        assert sizes == [micro_batch_size] * gradient_accumulation_steps


def test_sequences_of_like_length_share_a_micro_batch():
    step = EpochOrder(rows_of(LENGTHS), 40, seed=0).step(0)
    lengths = [[sequence.num_tokens for sequence in batch] for batch in share(step, 0, 1, 8)]
    assert all(min(one) >= max(next_one) for one, next_one in itertools.pairwise(lengths))


# ----- train and dev --------------------------------------------------------------------------------------------------


def test_train_and_dev_are_disjoint_complete_and_drawn_by_the_seed():
    dataset = rows_of([3] * 10)
    train, dev = split_validation(dataset, 3, seed=1)

    def held(part):
        return [int(part[row][0][0]) for row in range(len(part))]

    assert (len(train), len(dev)) == (7, 3)
    assert sorted(held(train) + held(dev)) == list(range(10))
    assert held(split_validation(dataset, 3, seed=1)[1]) == held(dev)
    assert any(held(split_validation(dataset, 3, seed=seed)[1]) != held(dev) for seed in (2, 3))
    assert dev.num_tokens == 9 and dev.num_supervised == 6 and dev.lengths.tolist() == [3, 3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_what_was_made_of_one_row_is_on_one_side(seed):
    lengths, origins = np.full(30, 3), np.repeat(np.arange(10), 3)
    tokens = np.repeat(origins, 3)
    table = np.stack([lengths, lengths, 0 * lengths, origins], axis=1).astype(np.float64)
    ends = np.cumsum(lengths)
    dataset = TokenDataset(tokens, np.ones(90), np.stack([ends - lengths, ends], axis=1), table)
    train, dev = split_validation(dataset, 4, seed)
    assert not set(train.origins) & set(dev.origins) and len(train) + len(dev) == 30
    assert len(dev) == 6, "4 asked for, and the rest of the second row of a file"
    with pytest.raises(UserError, match="leaves none to train on"):
        split_validation(dataset, 28, seed)


def test_rows_of_their_own_are_split_as_ever_and_those_of_many_pieces_not_more_than_asked_for():
    alone = rows_of([3] * 50)
    drawn = np.random.Generator(np.random.PCG64(7)).permutation(50)[:9]
    assert [int(row[0][0]) for row in split_validation(alone, 9, seed=7)[1]] == sorted(drawn)
    lengths, origins = np.full(4000, 2), np.repeat(np.arange(200), 20)
    table = np.stack([lengths, lengths, 0 * lengths, origins], axis=1).astype(np.float64)
    ends = np.cumsum(lengths)
    pieces = TokenDataset(np.zeros(8000), np.ones(8000), np.stack([ends - lengths, ends], axis=1), table)
    assert len(split_validation(pieces, 0.1, seed=0)[1]) == 400 and len(split_validation(pieces, 81, seed=0)[1]) == 100


@pytest.mark.parametrize(("size", "count"), [(0.2, 2), (0.25, 2), (0.01, 1), (1, 1), (9, 9), (3.0, 3)])
def test_below_1_the_dev_set_is_a_fraction_and_else_a_count(size, count):
    assert len(split_validation(rows_of([3] * 10), size, seed=0)[1]) == count


@pytest.mark.parametrize("size", [0, -1, 1.5, 10, 11, 0.99])
def test_a_dev_set_of_an_impossible_size_is_refused(size):
    with pytest.raises(UserError, match="val_set_size"):
        split_validation(rows_of([3] * 10), size, seed=0)
