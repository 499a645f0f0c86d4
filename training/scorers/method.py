"""Training scorers on judged pairs: losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from diffusion_align.data import ComparisonBatch
from diffusion_align.evaluation.judging import difference, logits, said_of_words, score_both
from diffusion_align.objectives.ranking import bradley_terry_loss, contrastive_loss
from diffusion_align.rewards import RewardOutput
from diffusion_align.rewards.published.clip import OpenClipScorer
from diffusion_align.rewards.trained.vp import VPScore
from diffusion_align.training.engine.sourced_method import BatchSource, SourcedMethod

from .config import RewardConfig
from .trainable import TrainableScorer

Forward = Callable[[Tensor, list[str], dict[str, Any]], RewardOutput]


class RewardMethod(SourcedMethod[ComparisonBatch]):
    """Bradley-Terry on the overall verdict and on every aspect that the scorer has a head for.

    Scorers with a ``std`` (:class:`~diffusion_align.rewards.trained.edit.EditScore`) are trained with their
    uncertainty.
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
