"""Tensor hashes with which processes check that they hold the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def tensor_hash(*tensors: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of the tensors: equal only for equal bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype, shape and a 64-bit hash of the bytes of each tensor, computed on its device: for checks during training.

    The bytes, as 64-bit words x, become Σ w_i m(x_i) mod 2⁶⁴ with fixed odd weights w and a mixing bijection m, so one
    wrong word always changes it, and wrong words with a pattern do not cancel.  Guards against faults, not tampering:
    for that use `tensor_hash`.
    """
    words = [_weighted_words(tensor) for tensor in tensors.values()]
    sums = torch.stack(words).tolist() if words else []
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {value & (2**64 - 1):016x}"
        for (name, tensor), value in zip(tensors.items(), sums, strict=True)
    }


_BLOCK, _MIX = 1 << 16, -7046029254386353131  # 2⁶⁴ / golden ratio, odd, as a signed number


def _weighted_words(tensor: Tensor) -> Tensor:
    """Σ w_i m(x_i) over one tensor's words, a scalar int64 on its device; w is a block's weight times a place's."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    short = -len(data) % 8
    words = torch.nn.functional.pad(data, (0, short)).view(torch.int64) if short else data.view(torch.int64)
    words = words * _MIX
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    whole = len(words) // _BLOCK * _BLOCK
    places = _odd_weights(min(len(words), _BLOCK), words.device, first=1)
    blocks = [(words[:whole].view(-1, _BLOCK) * places).sum(1)] if whole else []
    if whole < len(words):
        rest = words[whole:]
        blocks.append((rest * places[: len(rest)]).sum()[None])
    if not blocks:
        return torch.zeros((), dtype=torch.int64, device=words.device)
    sums = torch.cat(blocks)
    return (sums * _odd_weights(len(sums), words.device, first=1 << 40)).sum()


def _odd_weights(count: int, device: torch.device, first: int) -> Tensor:
    """Fixed odd 64-bit numbers without a pattern: a counter passed through splitmix64's multiplications and shifts
    (Steele et al., "Fast splittable pseudorandom number generators", 2014)."""
    mixed = torch.arange(first, first + count, dtype=torch.int64, device=device) * _MIX
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return mixed | 1


def disagreements(hashes: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Which tensors differ between processes, and on which.

    `hashes` holds one {name: hash} per process.  Returns {name: processes whose hash is not the most frequent one
    (the lowest process wins a tie)}; empty if all agree.
    """
    found = {}
    for name in sorted(set().union(*hashes)):
        seen = [per_process.get(name, "missing") for per_process in hashes]
        majority = max(seen, key=lambda value: (seen.count(value), -seen.index(value)))
        odd = [process for process, value in enumerate(seen) if value != majority]
        if odd:
            found[name] = odd
    return found
