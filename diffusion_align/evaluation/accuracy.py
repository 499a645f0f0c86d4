"""How well a scorer predicts judgements: accuracy, ranking, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.floating[Any]]


def pairwise_accuracy(differences: Floats, preferred: Floats, tie_threshold: float | None = None) -> float:
    """Share of pairs judged as the labels say.

    Args:
        differences: (N,) score of image 0 minus that of image 1.
        preferred: (N,) 1, 0, or 0.5 for a tie.
        tie_threshold: None leaves labelled ties out. Otherwise Pick-a-Pic's protocol (2305.01569): probabilities
            within this distance of 1/2 predict a tie, and a tie on one side only counts half.

    Raises:
        ValueError: nothing to judge.
    """
    if tie_threshold is None:
        decisive = preferred != 0.5
        differences, preferred = differences[decisive], preferred[decisive]
    if len(preferred) == 0:
        raise ValueError("no labelled pair to compute an accuracy from")
    if tie_threshold is None:
        predicted = np.where(differences > 0, 1.0, np.where(differences < 0, 0.0, 0.5))
    else:
        probability = 1 / (1 + np.exp(-differences))
        predicted = np.where(np.abs(probability - 0.5) <= tie_threshold, 0.5, (probability > 0.5).astype(float))
    return float((1 - np.abs(predicted - preferred)).mean())


def best_tie_threshold(differences: Floats, preferred: Floats, candidates: int = 50) -> float:
    """The threshold with the best ``pairwise_accuracy`` on a validation set, in [0, 0.5]."""
    grid = np.linspace(0, 0.5, candidates + 1)
    return float(max(grid, key=lambda threshold: pairwise_accuracy(differences, preferred, float(threshold))))


def calibration_curve(probabilities: Floats, outcomes: Floats, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean probability, mean outcome, count) of every bin of equal width that is not empty."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        (float(probabilities[index == b].mean()), float(outcomes[index == b].mean()), int((index == b).sum()))
        for b in range(bins)
        if (index == b).any()
    ]


def expected_calibration_error(probabilities: Floats, outcomes: Floats, bins: int = 10) -> float:
    """Mean distance of predicted and observed frequency over bins, weighted by their counts, in [0, 1]."""
    curve = calibration_curve(probabilities, outcomes, bins)
    total = sum(count for *_, count in curve)
    return sum(abs(predicted - observed) * count for predicted, observed, count in curve) / total


def spearman(scores: Floats, truth: Floats) -> float:
    """Rank correlation of (N,) scores with (N,) truth, in [-1, 1]; 0 when either is constant."""
    a, b = rankdata(scores), rankdata(truth)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def ranking_accuracy(
    differences: Floats, preferred: Floats, groups: Sequence[tuple[int, Sequence[int]]]
) -> Mapping[int, float]:
    """EditReward-Bench's K-way ranking (2509.26346) from judged pairs, by K: one wrong pair makes a ranking wrong.

    Args:
        differences: (N,) score of image 0 minus that of image 1.
        preferred: (N,) 1, 0, or 0.5 for a tie.
        groups: number K of pictures of one ranking, and the positions of its pairs.

    Returns:
        Of the rankings of K pictures that have an untied pair, the share whose every untied pair is ordered rightly.
    """
    right = differences * (preferred - 0.5) > 0
    found: dict[int, list[bool]] = {}
    for pictures, pairs in groups:
        decisive = [pair for pair in pairs if preferred[pair] != 0.5]
        if decisive:
            found.setdefault(pictures, []).append(bool(right[decisive].all()))
    return {pictures: float(np.mean(found[pictures])) for pictures in sorted(found)}
