"""Streamed data: every row, windows shuffled, shares kept, and a position to go on from exactly."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from contextlib import closing
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from helpers import token_row
from preparing import decoded, run, texts

from sora_llm.data import chunks
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.sources import read_rows
from sora_llm.data.stream import StreamOrder, WindowTokenizer
from sora_llm.errors import RunFailed, UserError


def stream(*sizes, rows_per_step=4, mixture=None, pack_to=None, window_rows=16, seed=0, opened=None, change=0):
    """Data set k has rows k·1000, k·1000 + 1, …, each of 3 to 6 tokens that say its number; row 13 of each is bad."""

    def source(k, size):
        def rows_from(start):
            if opened is not None:
                opened.append((k, start))
            return ((f"file{k}:{i}", {"number": k * 1000 + i}) for i in range(start, size))

        return rows_from

    def tokenise(items, before):
        numbers = [row["number"] for _, row, _ in items if row["number"] % 1000 != 13]
        counts = [{"rows_read": one.get("rows_read", 0) + len(items)} for one in before]
        return [token_row([number + change] * (3 + number % 4)) for number in numbers], counts

    sources = [source(k, size) for k, size in enumerate(sizes)]
    return StreamOrder(sources, tokenise, rows_per_step, seed, pack_to, mixture, window_rows)


def numbers(sequences):
    """The rows of a step, sequence by sequence."""
    return [[int(ids[0]) for ids, _ in sequence.read()] for sequence in sequences]


def flat(steps):
    return [number for step in steps for sequence in step for number in sequence]


@pytest.mark.parametrize("pack_to", [None, 12])
@pytest.mark.parametrize("sizes", [(50,), (48,), (20, 30), (3, 1, 60)])
def test_an_epoch_has_every_row_once_and_no_step_crosses_it(sizes, pack_to):
    order = stream(*sizes, pack_to=pack_to)
    rows = [k * 1000 + i for k, size in enumerate(sizes) for i in range(size) if i != 13]
    step = 0
    epochs = []
    for _ in range(3):
        seen = []
        while len(seen) < len(rows):
            seen += flat([numbers(order.step(step))])
            step += 1
        assert sorted(seen) == rows
        epochs.append(seen)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch is shuffled otherwise"


def test_rows_are_shuffled_within_windows_only():
    order = stream(64, rows_per_step=16)
    first = flat([numbers(order.step(0))])
    assert first != sorted(first) and max(first) < 32
    other = flat([numbers(stream(64, rows_per_step=16, seed=1).step(0))])
    assert sorted(first)[:15] == sorted(other)[:15] and first != other


@pytest.mark.parametrize("mixture", [None, [3, 1]])
@pytest.mark.parametrize("pack_to", [None, 12])
@pytest.mark.parametrize("at", [1, 4, 5, 9, 17, 30])
def test_a_stream_goes_on_with_the_very_next_row(at, pack_to, mixture):
    """From every kind of place: within a window, at its end, at an epoch's end; the position goes through JSON."""
    straight = stream(40, 25, pack_to=pack_to, mixture=mixture)
    steps = [numbers(straight.step(step)) for step in range(40)]
    stopped = stream(40, 25, pack_to=pack_to, mixture=mixture)
    for step in range(at):
        stopped.step(step)
    position = json.loads(json.dumps(stopped.position()))
    opened = []
    resumed = stream(40, 25, pack_to=pack_to, mixture=mixture, opened=opened)
    resumed.sample()  # a run looks at the first window before it looks for a checkpoint
    resumed.seek(position)
    assert [numbers(resumed.step(step)) for step in range(at, 40)] == steps[at:]
    assert resumed.counts == straight.counts, "what was counted before is not forgotten"
    assert at != 9 or max(start for _, start in opened) > 0, "what was read is skipped, not tokenised again"


def test_other_data_at_the_position_is_refused():
    order = stream(40)
    order.step(0)
    with pytest.raises(UserError, match="is not what the checkpoint was trained on"):
        stream(40, change=1).seek(order.position())


@pytest.mark.parametrize("weights", [[3, 1], [1, 1], [0.2, 0.7]])
def test_in_a_mixture_the_shares_hold_all_along_and_an_ended_data_set_begins_again(weights):
    order = stream(30, 20, rows_per_step=1, mixture=weights, window_rows=8)
    taken = [0, 0]
    for step in range(200):
        taken[numbers(order.step(step))[0][0] // 1000] += 1
        share = np.array(weights) / sum(weights) * sum(taken)
        assert np.abs(np.array(taken) - share).max() < 8 + 2, "a window, and the bad rows"


def test_a_step_may_be_asked_for_again_but_none_is_skipped():
    order = stream(40)
    assert numbers(order.step(0)) == numbers(order.step(0))
    with pytest.raises(AssertionError, match="whose next step is 1"):
        order.step(2)


def test_a_stream_without_a_row_to_train_on_stops():
    order = StreamOrder([lambda start: iter([("f:1", {})][start:])], lambda items, before: ([], before), 1, 0)
    with pytest.raises(UserError, match="none of the 1 streamed rows from f:1 on is left to train on"):
        order.step(0)


def test_epochs_of_a_stream_cannot_be_counted():
    with pytest.raises(UserError, match=r"set train\.max_steps"):
        stream(5).steps_in(Fraction(1))


# ----- the processes that tokenise ------------------------------------------------------------------------------------


def tokenised(work: Tokenizing, num_proc: int) -> tuple[list[list[str]], object]:
    """All rows of an epoch, as text, a list per step of eight; and what became of the rows."""
    with closing(WindowTokenizer(work, 1.0, num_proc)) as tokenizer:
        order = StreamOrder([partial(read_rows, spec) for spec in work.specs], tokenizer, 8, seed=1, window_rows=40)
        steps = []
        while not steps or order.position()["cursor"]["window"] < 5:
            rows = [row for sequence in order.step(len(steps)) for row in sequence.read()]
            steps.append([work.tokenizer.decode(ids) for ids, _ in rows])
        return steps, order.counts


def test_the_number_of_processes_changes_no_row_of_a_stream(tmp_path, byte, monkeypatch):
    """In order, with the counts of each data set; and all of them are the rows that would be prepared."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    specs = (
        texts(tmp_path, *[{"text": str(i)} if i % 9 else {"text": ""} for i in range(70)]),
        texts(tmp_path, *[{"text": f"b{i}"} for i in range(50)], name="b.jsonl"),
    )
    work = Tokenizing(specs, byte, "")
    (steps, counts), again = tokenised(work, 1), tokenised(work, 3)
    assert (steps, counts) == again
    assert [one["num_bad_rows"] for one in counts] == [16, 0], "each row has come twice, or was about to"
    rows, _ = run(list(specs), byte, cache_dir=tmp_path / "cache", max_bad_row_fraction=1.0)
    assert {text for step in steps for text in step} == set(decoded(rows, byte))


def test_a_stream_is_tokenised_elsewhere_and_leaves_no_process_behind(tmp_path, byte, monkeypatch):
    """In a thread of this process, templates and tokenizer would hold up the one that trains."""
    work = Tokenizing((texts(tmp_path, *[{"text": str(i)} for i in range(9)]),), byte, "")

    def here(*_: object) -> None:
        pytest.fail("tokenised by the process that trains")

    with closing(WindowTokenizer(work, 1.0, 2)) as tokenizer:
        assert len(multiprocessing.active_children()) == 2, "forked before anything else begins"
        monkeypatch.setattr(type(byte), "__call__", here)
        rows, _ = tokenizer([("a:1", {"text": "abc"}, 0)], [{}])
        assert len(rows) == 1
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("num_proc", "advice"), [(1, ""), (2, ": start again with data.num_proc=1")])
def test_a_killed_process_ends_the_step_that_waits_for_it_with_a_sentence(num_proc, advice, tmp_path, byte):
    work = Tokenizing((texts(tmp_path, *[{"text": str(i)} for i in range(40)]),), byte, "")
    with closing(WindowTokenizer(work, 1.0, num_proc)) as tokenizer:
        order = StreamOrder([partial(read_rows, work.specs[0])], tokenizer, 8, seed=1, window_rows=8)
        order.step(0)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match=f"was killed, perhaps for lack of memory{advice}$"):
            for step in range(1, 9):
                order.step(step)
