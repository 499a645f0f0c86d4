"""How well a scorer predicts people's verdicts on pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.data import ComparisonBatch, ComparisonExamples, Comparisons, Ratings, collate_comparisons
from diffusion_align.objectives.ranking import uncertain_difference
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.rewards.trained.repainting import RepaintingScorer
from diffusion_align.rewards.trained.vp import first_of_each

from .accuracy import best_tie_threshold, expected_calibration_error, pairwise_accuracy, ranking_accuracy
from .rated import evaluate_ratings


def score_both(module: Any, batch: ComparisonBatch) -> RewardOutput:
    """Scores of the 2B images, all first ones before all second ones.

    Pictures that are in several pairs are scored once for each prompt (and user), where no pictures before an edit
    make the pairs differ.
    """
    prompts, users, pictures = batch.prompts * 2, batch.users * 2, batch.pictures.flatten()
    images = batch.images.flatten(0, 1)
    if batch.sources is not None:
        context = {"users": users, "instructions": prompts, "source_images": torch.cat([batch.sources] * 2)}
        output: RewardOutput = module(images, prompts, context)
        return output
    numbers: dict[tuple[int, str, str], int] = {}
    asked = [numbers.setdefault(key, len(numbers)) for key in zip(pictures.tolist(), prompts, users, strict=True)]
    first, where = first_of_each(torch.tensor(asked, device=images.device))
    texts = [prompts[i] for i in first.tolist()]
    context = {"users": [users[i] for i in first.tolist()], "instructions": texts, "pictures": pictures[first]}
    output = module(images[first], texts, context)
    return output[where]


def said_of_words(output: RewardOutput, batch: ComparisonBatch) -> tuple[Tensor, Tensor]:
    """What the scorer says of each word that people were asked about, as log-odds, and what they marked, (N,) both."""
    marks = batch.wrong_words.flatten(0, 1)
    if output.words is None:
        return marks.new_empty(0), marks.new_empty(0)
    known = ~(marks.isnan() | output.words.isnan())
    return output.words[known], marks[known]


def difference(scores: Tensor) -> Tensor:
    """(2B,) scores to (B,): first image minus second."""
    first, second = scores.chunk(2)
    return first - second


def logits(scores: Tensor, std: Tensor | None) -> Tensor:
    """(2B,) scores and, if known, their spread to the (B,) log-odds of the first image."""
    if std is None:
        return difference(scores)
    first, second = std.square().chunk(2)
    return uncertain_difference(difference(scores), first + second)


@torch.no_grad()
def judge(scorer: RewardScorer, comparisons: Comparisons, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Log-odds of image 0 under ``scorer`` and labels, (N,) each, by aspect ("overall" and those the scorer has).

    Keys: "overall", "overall/label", and so on; of a scorer that says which words are not shown, where people marked
    them, also "words" and "words/label", of all words of both images.
    """
    examples = ComparisonExamples(comparisons, scorer.preprocess)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        batch = collate_comparisons([examples.example(i, 0, False) for i in rows], [0] * len(rows)).to(scorer.device)
        output = score_both(scorer, batch)
        found.setdefault("overall", []).append(logits(output.reward, output.std))
        found.setdefault("overall/label", []).append(batch.labels[:, 0])
        for i, name in enumerate(comparisons.aspects, start=1):
            if name in output.aspects:
                found.setdefault(name, []).append(logits(output.aspects[name], output.aspects.get(f"{name}_std")))
                found.setdefault(f"{name}/label", []).append(batch.labels[:, i])
        said, marks = said_of_words(output, batch)
        if len(marks):
            found.setdefault("words", []).append(said)
            found.setdefault("words/label", []).append(marks)
    return {name: torch.cat(values).float().cpu().numpy() for name, values in found.items()}


def evaluate_scorer(
    scorer: RewardScorer, judgements: Comparisons | Ratings, tie_threshold: float | None = None
) -> dict[str, float]:
    """How well ``scorer`` predicts ``judgements``.

    On ratings: as :func:`~diffusion_align.evaluation.rated.evaluate_ratings`. On pairs:

    - ``accuracy/overall``, ``accuracy/ASPECT``: on decisive pairs.
    - ``accuracy/words``: mean of the share of wrong words that it finds and of right ones that it leaves alone.
    - ``accuracy_with_ties``: on all pairs by Pick-a-Pic's protocol, where there are ties; ``tie_threshold`` is what it
      was measured with: the one given, or the best on these very pairs.
    - ``ranking/K``: share of rankings of K > 2 pictures (same caption and ranking_id) without a wrong pair.
    - ``calibration_error``: of the overall probability.
    """
    if isinstance(judgements, Ratings):
        assert isinstance(scorer, RepaintingScorer)
        return evaluate_ratings(scorer, judgements)
    return judged_metrics(judge(scorer, judgements), judgements, tie_threshold)


def judged_metrics(
    judged: dict[str, np.ndarray], judgements: Comparisons, tie_threshold: float | None = None
) -> dict[str, float]:
    """The figures of :func:`evaluate_scorer` from what :func:`judge` found of ``judgements``."""
    judged, metrics = dict(judged), {}
    if "words" in judged:
        said, wrong = judged.pop("words") > 0, judged.pop("words/label") > 0.5
        metrics["accuracy/words"] = float((said[wrong].mean() + (~said[~wrong]).mean()) / 2)
    for name in (key for key in judged if not key.endswith("/label")):
        labels = judged[f"{name}/label"]
        known = ~np.isnan(labels)
        if (labels[known] != 0.5).any():
            metrics[f"accuracy/{name}"] = pairwise_accuracy(judged[name][known], labels[known])
    differences, labels = judged["overall"], judged["overall/label"]
    if (labels == 0.5).any():
        threshold = best_tie_threshold(differences, labels) if tie_threshold is None else tie_threshold
        metrics["tie_threshold"] = threshold
        metrics["accuracy_with_ties"] = pairwise_accuracy(differences, labels, threshold)
    ranked = ranking_accuracy(differences, labels, judgements.rankings())
    metrics |= {f"ranking/{count}": share for count, share in ranked.items() if count > 2}
    metrics["calibration_error"] = expected_calibration_error(1 / (1 + np.exp(-differences)), labels)
    return metrics
