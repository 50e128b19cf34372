"""Packing: which rows share a sequence.  Best-fit decreasing, exact and in O(n · log(capacity))."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: every item, the longest first, goes into the fullest bin that still holds it.

    Args:
        lengths: (n,) integers in descending order, each in [1, capacity].
        capacity: of a bin.

    Returns: (n,) bin numbers, counted from 0 without gaps.  They depend on the lengths alone, so items of equal length
    can be swapped.  Source: Johnson 1974, "Fast algorithms for bin packing" (at most 11/9 of the optimum).
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    by_space: defaultdict[int, list[int]] = defaultdict(list)  # free space → the bins that have exactly that
    spaces: list[int] = []  # the keys of by_space that have bins, ascending
    num_bins = 0
    for item, length in enumerate(lengths.tolist()):
        assert 0 < length <= capacity, f"an item of {length} does not fit into {capacity}"
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, chosen = capacity, num_bins
            num_bins += 1
        else:
            space = spaces[at]
            chosen = by_space[space].pop()
            if not by_space[space]:
                del spaces[at]
        bins[item] = chosen
        left = space - length
        if left:
            if not by_space[left]:
                insort(spaces, left)
            by_space[left].append(chosen)
    return bins
