"""Tests over prompts: p-values, Holm's correction of many of them, and what a test of this size can see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


def paired_p(by_prompt: NDArray[np.floating[Any]]) -> float:
    """Two-sided p-value of Student's t test that the mean of (n,) independent values is 0.

    Values are prompts' mean outcomes minus 1/2, or mean differences. Of values that are all the same and not 0 it is
    the sign test's, 2^(1 - n); of zeros, or of one value, it is 1.
    """
    values = np.asarray(by_prompt, dtype=np.float64)
    mean, count = float(values.mean()), values.size
    if mean == 0.0 or count < 2:
        return 1.0
    spread = float(values.std(ddof=1))
    if spread <= 1e-12 * abs(mean):
        return float(2.0 ** (1 - count))
    from scipy import stats  # slow to import, and only needed here

    return float(2.0 * stats.t.sf(abs(mean) / (spread / math.sqrt(count)), count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: the i-th smallest of m becomes the largest of
    (m - j) p_(j) over j <= i (from 0), at most 1. Those below alpha may be rejected together at that level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def holm_within(p_values: Sequence[float], labels: Sequence[str]) -> list[float]:
    """Holm's adjusted p-values, each corrected for those of its own label, in the order given."""
    adjusted = [0.0] * len(p_values)
    for label in set(labels):
        places = [i for i, other in enumerate(labels) if other == label]
        for place, value in zip(places, holm([p_values[i] for i in places]), strict=True):
            adjusted[place] = value
    return adjusted


def spread_of(by_prompt: NDArray[np.floating[Any]]) -> float:
    """Standard deviation of prompts' mean outcomes; where they show none, the largest that outcomes can have, 1/2."""
    spread = float(by_prompt.std(ddof=1)) if by_prompt.size > 1 else 0.0
    return spread or 0.5


def detectable_gap(deviation: float, prompts: int, tests: int = 1, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest mean over ``prompts`` independent values that a two-sided test sees with the given power:
    (z_(1 - alpha / 2 tests) + z_power) deviation / sqrt(prompts).

    Args:
        deviation: standard deviation of the values. Of outcomes in [0, 1] it is at most 1/2.
        tests: how many comparisons share ``alpha`` (Bonferroni's share, which Holm's first one gets).
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / (2 * tests)) + normal.inv_cdf(power)) * deviation / math.sqrt(prompts)
