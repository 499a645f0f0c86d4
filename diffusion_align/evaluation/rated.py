"""How well a scorer predicts people's points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.data import RatingBatch, RatingExamples, Ratings, collate_ratings
from diffusion_align.rewards import RewardOutput
from diffusion_align.rewards.published.prefpaint import PrefPaintScorer
from diffusion_align.rewards.trained.repainting import RepaintingScorer

from .accuracy import Floats, pairwise_accuracy, ranking_accuracy, spearman


def rate(module: Any, batch: RatingBatch, criteria: Sequence[str]) -> Tensor:
    """Standardised scores (B, C) of ``module``, a :class:`RepaintingScorer` or a wrapper of one."""
    output = look(module, batch)
    return torch.stack([output.aspects[name] for name in criteria], dim=1).float()


def look(module: Any, batch: RatingBatch) -> RewardOutput:
    """What ``module``, a PrefPaint scorer or a wrapper of one, says about B repaintings."""
    uncut = torch.zeros_like(batch.images[:, :1])  # the hole was cut at full size
    output: RewardOutput = module(batch.images, [""] * len(batch.keys), {"source_images": batch.left, "masks": uncut})
    return output


def standardised(lines: Mapping[str, tuple[float, float]], criteria: Sequence[str], points: Tensor) -> Tensor:
    """Points (B, C) in standard deviations from the mean, by ``lines``: (mean, deviation) of each criterion."""
    mean, std = (points.new_tensor([lines[name][i] for name in criteria]) for i in (0, 1))
    return (points - mean) / std


def in_batches(scorer: PrefPaintScorer, ratings: Ratings, batch_size: int) -> Iterator[RatingBatch]:
    """All ratings in their order, as ``scorer`` sees them."""
    examples = RatingExamples(ratings, scorer.preprocessing.resize)
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        yield collate_ratings([examples.example(i, 0, False) for i in rows], [0] * len(rows)).to(scorer.device)


@torch.no_grad()
def rating_features(scorer: PrefPaintScorer, ratings: Ratings, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features (N, F), and how far the reward is from the mean of the standardised points, (N,).

    Points are standardised as in the scorer's training, or (published ones) over ``ratings``.
    """
    lines = scorer.criteria if isinstance(scorer, RepaintingScorer) else ratings.statistics()
    features, errors = [], []
    for batch in in_batches(scorer, ratings, batch_size):
        output = look(scorer, batch)
        assert output.features is not None
        wanted = standardised(lines, ratings.criteria, batch.points).mean(dim=1)
        features.append(output.features.float().cpu())
        errors.append((output.reward.float() - wanted).abs().cpu())
    return torch.cat(features), torch.cat(errors)


@torch.no_grad()
def evaluate_ratings(scorer: RepaintingScorer, ratings: Ratings, batch_size: int = 64) -> dict[str, float]:
    """How well ``scorer`` predicts ``ratings``.

    - ``mse``, ``mse/CRITERION``: squared error in units of the training ratings' variance (1: no better than the mean).
    - ``spearman``, ``spearman/CRITERION``: rank correlation; without a name that of the reward with the mean points.
    - ``accuracy``: of the pairs of repaintings of one hole, by reward against mean points; absent without pairs.
    - ``ranking/K``: share of the holes with K > 1 repaintings that are ordered without a wrong pair.

    Raises:
        ValueError: the ratings have other criteria than the scorer, or a picture cannot be decoded.
    """
    predicted, wanted, groups = [], [], []
    for batch in in_batches(scorer, ratings, batch_size):
        predicted.append(rate(scorer, batch, ratings.criteria))
        wanted.append(standardised(scorer.criteria, ratings.criteria, batch.points))
        groups += batch.groups
    scores, truth = (torch.cat(parts).cpu().numpy() for parts in (predicted, wanted))
    errors = np.square(scores - truth).mean(axis=0)
    metrics = {"mse": float(errors.mean()), "spearman": spearman(scores.mean(axis=1), truth.mean(axis=1))}
    for i, name in enumerate(ratings.criteria):
        metrics[f"mse/{name}"] = float(errors[i])
        metrics[f"spearman/{name}"] = spearman(scores[:, i], truth[:, i])
    return metrics | compared_within(scores.mean(axis=1), truth.mean(axis=1), groups)


def compared_within(scores: Floats, truth: Floats, groups: Sequence[str]) -> dict[str, float]:
    """Accuracy on pairs of one group, and share of rightly ordered groups by size; scores and truth are (N,)."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pairs: list[tuple[int, int]] = []
    rankings = []
    for rows in members.values():
        own = list(combinations(rows, 2))
        rankings.append((len(rows), range(len(pairs), len(pairs) + len(own))))
        pairs += own
    if not pairs:
        return {}
    first, second = np.array(pairs).T
    differences, labels = scores[first] - scores[second], (np.sign(truth[first] - truth[second]) + 1) / 2
    ranked = ranking_accuracy(differences, labels, rankings)
    metrics = {f"ranking/{count}": share for count, share in ranked.items()}
    return metrics | ({"accuracy": pairwise_accuracy(differences, labels)} if ranked else {})
