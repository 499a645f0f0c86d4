"""How scorers are measured: against values by hand and scipy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import spearmanr

from diffusion_align.data import Comparisons
from diffusion_align.evaluation.accuracy import (
    best_tie_threshold,
    calibration_curve,
    expected_calibration_error,
    pairwise_accuracy,
    ranking_accuracy,
    spearman,
)
from diffusion_align.evaluation.judging import evaluate_scorer
from diffusion_align.scenes.make.pairs import encode_jpeg
from tests.brightness import Brightness


def test_accuracy_follows_pick_a_pics_protocol() -> None:
    differences, labels = np.array([3.0, -2.0, 0.1, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.5, 0.5])
    assert pairwise_accuracy(differences, labels) == pytest.approx(1 / 3)
    # 3.0 right; -2.0 wrong; 0.1 a predicted tie against a win: half; 0.0 a tie: right; 1.0 no tie: half
    assert pairwise_accuracy(differences, labels, tie_threshold=0.1) == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    threshold = best_tie_threshold(differences, labels)
    assert pairwise_accuracy(differences, labels, threshold) >= 3 / 5
    with pytest.raises(ValueError, match="no labelled pair"):
        pairwise_accuracy(differences[3:], labels[3:])


def test_calibration_error_of_a_known_judge() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.05, 0.95, 50_000)
    outcome = (rng.random(50_000) < probability).astype(float)
    assert expected_calibration_error(probability, outcome) < 0.01
    assert expected_calibration_error(np.full(50_000, 0.9), outcome) == pytest.approx(0.4, abs=0.01)


def test_a_ranking_counts_only_without_a_wrong_pair() -> None:
    differences, labels = np.array([1.0, 2.0, -1.0, 1.0, 0.5, 3.0, -2.0]), np.array([1.0, 1.0, 0.5, 1.0, 0.0, 0.5, 0.0])
    groups = [(3, [0, 1, 2]), (3, [3, 4]), (2, [5]), (2, [6])]  # right but for a tie; one wrong; only a tie; right
    assert ranking_accuracy(differences, labels, groups) == {2: 1.0, 3: 0.5}
    assert ranking_accuracy(np.zeros(1), np.ones(1), [(2, [0])]) == {2: 0.0}  # no difference is no ranking


def test_calibration_bins_by_hand() -> None:
    probabilities, outcomes = np.array([0.05, 0.15, 0.95, 1.0, 0.1]), np.array([0.0, 1.0, 1.0, 0.5, 0.0])
    expected = [(0.05, 0.0, 1), (0.125, 0.5, 2), (0.975, 0.75, 2)]
    found = calibration_curve(probabilities, outcomes)
    assert [tuple(pytest.approx(value) for value in line) for line in expected] == found
    error = (0.05 * 1 + 0.375 * 2 + 0.225 * 2) / 5
    assert expected_calibration_error(probabilities, outcomes) == pytest.approx(error)


def test_spearman_is_that_of_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 50).astype(float), rng.integers(0, 6, 50).astype(float)
    assert spearman(scores, truth) == pytest.approx(spearmanr(scores, truth).statistic)
    assert spearman(np.ones(4), truth[:4]) == 0


def test_pairs_judged_together_are_a_ranking(tmp_path: Path) -> None:
    pictures = [encode_jpeg(np.full((64, 64, 3), level, np.uint8)) for level in (10, 90, 160, 240)]
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3)]
    rows = [
        {"jpg_0": pictures[a], "jpg_1": pictures[b], "caption": "a" if i < 4 else "b", "label_0": (0.0, 0.5)[i == 1],
         "ranking_id": "7" if i < 3 else "8"}
        for i, (a, b) in enumerate(pairs)
    ]  # fmt: skip
    Dataset.from_list(rows).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    comparisons = Comparisons(tmp_path, "test")
    assert comparisons.rankings() == [(3, [0, 1, 2]), (2, [3]), (2, [4])]
    metrics = evaluate_scorer(Brightness(), comparisons)
    assert metrics["accuracy/overall"] == metrics["ranking/3"] == 1.0
    assert "ranking/2" not in metrics  # that is the accuracy
    given = evaluate_scorer(Brightness(), comparisons, tie_threshold=0.5)
    assert given["tie_threshold"] == 0.5
    assert given["accuracy_with_ties"] == pytest.approx((1 + 4 * 0.5) / 5)
    assert metrics["accuracy_with_ties"] >= given["accuracy_with_ties"]


def test_ranking_measures() -> None:
    assert spearman(np.array([1.0, 5.0, 9.0]), np.array([2.0, 3.0, 100.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 5.0, 9.0]), np.array([9.0, 3.0, 1.0])) == pytest.approx(-1)
