"""Paired tests of few seeds: exact permutation, Holm's correction, bootstrap intervals.  Without torch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

LEVEL = 0.05
"""Of every family of tests."""
ROUNDING = 1e-12


def sign_flip_p(differences: Sequence[float]) -> float:
    """One-sided p of "the mean difference is below 0": the exact paired permutation test.

    If an arm and its rival were the same, each seed's difference could as well have the other sign: p is the share of
    the 2ⁿ sign patterns whose sum is at most the one that was seen.  With 8 seeds it is at least 1/256.
    """
    assert differences, "a test needs pairs"
    seen = math.fsum(differences)
    limit = seen + ROUNDING * math.fsum(map(abs, differences))
    sums = (
        math.fsum(sign * abs(value) for sign, value in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    )
    return sum(found <= limit for found in sums) / 2 ** len(differences)


def sign_test_p(wins: int, pairs: int) -> float:
    """One-sided p of so many wins or more among `pairs` that are fair coins."""
    return sum(math.comb(pairs, count) for count in range(wins, pairs + 1)) / 2**pairs


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of every hypothesis, for a family-wise error rate (Holm 1979, step-down)."""
    adjusted, highest = {}, 0.0
    for index, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - index) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


PAIR_TABLE = "| pair | mean difference (95 %) | better in | p |\n|---|---|---|---|"


def pair_row(pair: str, differences: Sequence[float]) -> str:
    """The row of a PAIR_TABLE: below 0 is in favour of the first of `pair`."""
    low, high = bootstrap_interval(differences)
    wins = f"{sum(difference < 0 for difference in differences)} of {len(differences)}"
    mean = math.fsum(differences) / len(differences)
    return f"| {pair} | {mean:+.4f} ({low:+.4f} … {high:+.4f}) | {wins} | {sign_flip_p(differences):.4f} |"


def bootstrap_interval(values: Sequence[float], level: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, the same every time.  Of 8 values it is somewhat too narrow."""
    generator, count = random.Random(0), len(values)
    means = sorted(math.fsum(generator.choices(values, k=count)) / count for _ in range(draws))
    outside = round(draws * (1 - level) / 2)
    return means[outside], means[draws - 1 - outside]
