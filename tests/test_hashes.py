"""Hashes and fingerprints see every bit, and the odd process is named."""

import pytest
import torch
from helpers import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_llm.hashes import disagreements, fingerprints, tensor_hash


def test_every_bit_of_a_tensor_changes_its_hash():
    tensor = torch.tensor([1.0, -0.5, 0.0])
    bits = tensor.view(torch.int32)
    hashes = {tensor_hash(tensor)}
    for element in range(3):
        for bit in range(32):
            flipped = bits.clone()
            flipped[element] ^= -(2**31) if bit == 31 else 1 << bit
            hashes.add(tensor_hash(flipped.view(torch.float32)))
    assert len(hashes) == 1 + 3 * 32


def test_shape_dtype_order_and_grouping_change_the_hash():
    flat = torch.arange(6.0)
    different = [
        (flat,),
        (flat.reshape(2, 3),),
        (flat.reshape(3, 2),),
        (flat.view(torch.int32),),
        (flat.flip(0),),
        (flat[:3], flat[3:]),
        (flat[3:], flat[:3]),
        (flat[:3],),
        (),
    ]
    assert len({tensor_hash(*tensors) for tensors in different}) == len(different)


def test_equal_values_have_equal_hashes_whatever_their_memory_layout_and_gradient():
    tensor = gaussian(4, 3)
    copies = [tensor.clone(), tensor.T.contiguous().T, tensor.clone().requires_grad_(), torch.cat([tensor, tensor])[:4]]
    assert {tensor_hash(copy) for copy in copies} == {tensor_hash(tensor)}
    assert tensor_hash(torch.tensor([float("nan")])) == tensor_hash(torch.tensor([float("nan")]))
    for odd in (torch.tensor(1.0), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)):
        assert tensor_hash(odd) == tensor_hash(odd.clone())


# ----- disagreements --------------------------------------------------------------------------------------------------


def test_processes_that_agree_have_no_disagreements():
    assert disagreements([{"a": "1", "b": "2"}] * 3) == {}
    assert disagreements([{"a": "1"}]) == {}
    assert disagreements([{}, {}]) == {}


def test_the_minority_is_named_per_tensor():
    hashes = [{"a": "x", "b": "1"}, {"a": "x", "b": "1"}, {"a": "y", "b": "1"}, {"a": "x", "b": "2"}]
    assert disagreements(hashes) == {"a": [2], "b": [3]}
    assert disagreements([{"a": "odd"}, {"a": "x"}, {"a": "x"}]) == {"a": [0]}


def test_in_a_tie_the_lowest_process_is_believed():
    assert disagreements([{"a": "x"}, {"a": "y"}]) == {"a": [1]}
    assert disagreements([{"a": "x"}, {"a": "y"}, {"a": "y"}, {"a": "x"}]) == {"a": [1, 2]}
    assert disagreements([{"a": "z"}, {"a": "y"}, {"a": "x"}]) == {"a": [1, 2]}


def test_a_missing_tensor_is_a_disagreement():
    assert disagreements([{"a": "x", "b": "1"}, {"a": "x"}]) == {"b": [1]}
    assert disagreements([{}, {"b": "1"}, {"b": "1"}]) == {"b": [0]}


@given(
    size=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 9),
)
@settings(max_examples=15)
def test_every_single_wrong_bit_changes_a_fingerprint(size, dtype, seed):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = fingerprints({"t": tensor})["t"]
    assert fingerprints({"t": tensor.clone()})["t"] == found
    data = tensor.view(torch.uint8)
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert fingerprints({"t": tensor})["t"] != found
            data[place] ^= 1 << bit
    assert fingerprints({"t": tensor})["t"] == found


def test_fingerprints_tell_order_shape_dtype_and_far_places_apart():
    tensor = torch.arange(3 * 2**17 + 5, dtype=torch.float32)
    crossed = tensor.clone()  # word 1 of block 0 and word 0 of block 1
    crossed[[2, 3, 2**17, 2**17 + 1]] = tensor[[2**17, 2**17 + 1, 2, 3]]
    swapped = tensor.clone()
    swapped[[0, 2**17]] = tensor[[2**17, 0]]
    last = tensor.clone()
    last[-1] += 1
    variants = {
        "plain": tensor,
        "swapped": swapped,
        "last": last,
        "crossed": crossed,
        "column": tensor[:, None],
        "long": tensor.int(),
    }
    assert len(set(fingerprints(variants).values())) == len(variants)
    assert fingerprints({"t": tensor.view(-1)[::2]}) == fingerprints({"t": tensor[::2].clone()})
    assert fingerprints({}) == {}


@pytest.mark.parametrize("bit", [63, 62, 61, 52, 31, 0])
def test_the_same_bit_flipped_in_two_words_changes_a_fingerprint(bit):
    """What a faulty memory line does; weights alone would let two flips of a high bit cancel."""
    words = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
    found = fingerprints({"t": words})["t"]
    mask = torch.tensor(1 << bit if bit < 63 else -(2**63))
    for first in range(0, 63, 3):
        for second in range(first + 1, 64, 5):
            flipped = words.clone()
            flipped[[first, second]] ^= mask
            assert fingerprints({"t": flipped})["t"] != found, (first, second)
