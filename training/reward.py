"""Training scorers on judged pairs or ratings, on the same loop as the diffusion models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from diffusion_align.data import (
    ComparisonBatch,
    ComparisonExamples,
    Comparisons,
    ExampleLoader,
    RatingExamples,
    Ratings,
    collate_comparisons,
    collate_ratings,
)
from diffusion_align.evaluation.accuracy import (
    best_tie_threshold,
    expected_calibration_error,
    pairwise_accuracy,
    ranking_accuracy,
)
from diffusion_align.objectives.ranking import bradley_terry_loss, contrastive_loss, uncertain_difference
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.rewards.clip import OpenClipScorer
from diffusion_align.rewards.repainting import RepaintingScorer
from diffusion_align.rewards.vp import VPScore, first_of_each

from .batches import BatchSource, SourcedMethod
from .config import RewardConfig
from .loop import Job
from .ratings import RatingMethod, evaluate_ratings
from .scorers import build_scorer, open_judgements

Forward = Callable[[Tensor, list[str], dict[str, Any]], RewardOutput]


class TrainableScorer:
    """A scorer as the loop wants it."""

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer = scorer
        self.module: nn.Module = scorer

    @property
    def network(self) -> nn.Module:
        return self.scorer

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.scorer.named_parameters() if p.requires_grad}

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        self.module = wrapper(self.module)
        return self.module

    def save(self, folder: Path) -> Path:
        return self.scorer.save_pretrained(folder / "scorer")  # type: ignore[operator]


class RewardMethod(SourcedMethod[ComparisonBatch]):
    """Bradley-Terry on the overall verdict and on every aspect that the scorer has a head for.

    Scorers with a ``std`` (:class:`~diffusion_align.rewards.edit.EditScore`) are trained with their uncertainty.
    """

    def __init__(
        self,
        config: RewardConfig,
        trained: TrainableScorer,
        aspects: list[str],
        source: BatchSource[ComparisonBatch],
        accelerator: Accelerator,
    ) -> None:
        self.config, self.trained, self.aspects, self.source = config, trained, aspects, source
        self.device, self.autocast = accelerator.device, accelerator.autocast

    def loss(self, batch: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the batch (scalar) and its metrics."""
        batch = batch.to(self.device)
        with self.autocast():
            output = score_both(self.trained.module, batch)
        labels = batch.labels * (1 - 2 * self.config.label_smoothing) + self.config.label_smoothing
        overall = bradley_terry_loss(logits(output.reward, output.std), labels[:, 0], batch.weight)
        metrics = {"loss": overall.detach()}
        heads = [(i, name) for i, name in enumerate(self.aspects, start=1) if name in output.aspects]
        loss = overall
        if heads and self.config.aspect_weight:
            parts = []
            for i, name in heads:
                part = logits(output.aspects[name], output.aspects.get(f"{name}_std"))
                parts.append(bradley_terry_loss(part, labels[:, i], batch.weight))
                metrics[f"loss/{name}"] = parts[-1].detach()
            loss = loss + self.config.aspect_weight * torch.stack(parts).mean()
        said, marks = said_of_words(output, batch)
        if self.config.word_weight and len(marks):
            part = binary_cross_entropy_with_logits(said, marks)
            metrics["loss/words"] = part.detach()
            loss = loss + self.config.word_weight * part
        if self.config.contrastive_weight and isinstance(self.trained.scorer, VPScore):
            part = self.contrast(self.trained.scorer, batch)
            metrics["loss/contrastive"] = part.detach()
            loss = loss + self.config.contrastive_weight * part
        decisive = batch.labels[:, 0] != 0.5
        right = (difference(output.reward) > 0) == (batch.labels[:, 0] > 0.5)
        metrics["accuracy"] = (right & decisive).sum() / decisive.sum().clamp(min=1)
        return loss, metrics

    def contrast(self, scorer: VPScore, batch: ComparisonBatch) -> Tensor:
        """BLIP's image-text contrastive loss of the preferred pictures."""
        with self.autocast():
            images, texts = scorer.embed_apart(preferred_images(batch), batch.prompts)
        return contrastive_loss(images, texts, scorer.logit_scale.exp().clamp(max=100))


class ContrastiveMethod(RewardMethod):
    """CLIP's objective on the preferred picture of each pair and its caption."""

    def loss(self, batch: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch.to(self.device)
        scorer = self.trained.scorer
        assert isinstance(scorer, OpenClipScorer)
        with self.autocast():
            images, texts = scorer.encode_images(preferred_images(batch)), scorer.encode_texts(batch.prompts)
        images, texts = normalize(images.float(), dim=-1), normalize(texts.float(), dim=-1)
        scale: Tensor = scorer.model.logit_scale.exp().clamp(max=100)  # type: ignore[operator]
        loss = contrastive_loss(images, texts, scale)
        found = (images @ texts.T).argmax(dim=1) == torch.arange(len(images), device=images.device)
        return loss, {"loss": loss.detach(), "accuracy": found.float().mean()}


def preferred_images(batch: ComparisonBatch) -> Tensor:
    """(B, ...) the preferred picture of each pair; of ties the first."""
    rows = torch.arange(len(batch.prompts), device=batch.images.device)
    return batch.images[(batch.labels[:, 0] < 0.5).long(), rows]


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

    On ratings: as :func:`~diffusion_align.training.ratings.evaluate_ratings`. On pairs:

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
    judged = judge(scorer, judgements)
    metrics = {}
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


METHODS: Mapping[str, type[RewardMethod]] = MappingProxyType({"clip": ContrastiveMethod})


def reward_job(config: Any, accelerator: Accelerator) -> Job:
    """Scorer, loss and validation of a ``RewardConfig``.

    Raises:
        ValueError: as ``build_scorer``; several processes to train a clip.
    """
    assert isinstance(config, RewardConfig)
    judgements = open_judgements(config, config.dataset_split, config.max_pairs)
    scorer = build_scorer(config, judgements).to(accelerator.device)
    trained = TrainableScorer(scorer)

    def loader(examples: Any, collate: Any) -> ExampleLoader[Any, Any]:
        return ExampleLoader(
            examples,
            config.per_device_train_batch_size,
            collate,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
            max_corrupt=config.max_corrupt,
            together=config.rows_together,
        )

    method: RewardMethod | RatingMethod
    if isinstance(judgements, Ratings):
        assert isinstance(scorer, RepaintingScorer)
        examples = RatingExamples(judgements, scorer.preprocessing.resize)
        method = RatingMethod(trained, judgements.criteria, loader(examples, collate_ratings), accelerator)
    else:
        pairs = loader(ComparisonExamples(judgements, scorer.preprocess), collate_comparisons)
        kind = "clip" if isinstance(scorer, OpenClipScorer) else config.scorer
        if kind == "clip" and accelerator.num_processes > 1:
            raise ValueError("scorer = clip: trained in one process, whose batch is what captions are told from")
        method = METHODS.get(kind, RewardMethod)(config, trained, judgements.aspects, pairs, accelerator)
    if config.validation_split is None or not config.eval_steps:
        return Job(trained, method, None)
    held_out = open_judgements(config, config.validation_split)

    def validate(step: int) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in evaluate_scorer(scorer, held_out).items()}

    return Job(trained, method, validate)
