"""A batch: padding by position, positions that keep packed rows apart, weights."""

import torch
from helpers import token_row

from sora_llm.data.batches import collate


def test_a_batch_is_padded_on_the_right_and_masked_by_position():
    pad = eos = 2
    batch = collate([[token_row([1, 5, eos])], [token_row([1, eos])]], pad_id=pad)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]], "eos is supervised, padding is not"
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_positions_begin_again_with_every_packed_row_and_with_the_padding():
    batch = collate([[token_row([1, 5, 6]), token_row([1, 7])], [token_row([1, 8, 9])]], pad_id=0, packed=True)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7], [1, 8, 9, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 7], [-100, 8, 9, -100, -100]]


def test_the_first_token_of_a_packed_row_is_never_predicted_from_the_row_before():
    batch = collate([[token_row([1, 5], [1, 1]), token_row([3, 7], [1, 1])]], pad_id=0, packed=True)
    assert batch["labels"].tolist() == [[-100, 5, -100, 7]]


def test_a_flat_batch_is_one_sequence_without_padding():
    batch = collate([[token_row([1, 5, 6]), token_row([1, 7])], [token_row([1, 8, 9])]], 0, packed=True, flat=True)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7, 1, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_weights_come_along_where_they_are_more_than_yes_and_no():
    batch = collate([[token_row([1, 5, 6], [0, 0.25, 2])], [token_row([1, 8])]], pad_id=0)
    assert batch["loss_weights"].tolist() == [[0, 0.25, 2], [0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 8, -100]]


def test_no_rows_give_a_batch_of_zero_weight():
    for flat in (False, True):
        batch = collate([], pad_id=7, packed=flat, flat=flat)
        assert batch["input_ids"].tolist() == [[7, 7]] and batch["labels"].tolist() == [[-100, -100]]
