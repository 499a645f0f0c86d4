"""Training scorers on people's points (PrefPaint, 2410.21966): regression, criterion by criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import Tensor

from diffusion_align.data import RatingBatch
from diffusion_align.rewards.trained.repainting import RepaintingScorer
from diffusion_align.training.engine.sourced_method import BatchSource, SourcedMethod

if TYPE_CHECKING:
    from .trainable import TrainableScorer

from diffusion_align.evaluation.rated import rate, standardised


class RatingMethod(SourcedMethod[RatingBatch]):
    """Mean squared error of each criterion's standardised points.

    Args:
        criteria: names of the points' columns, in their order.
    """

    def __init__(
        self,
        trained: TrainableScorer,
        criteria: Sequence[str],
        source: BatchSource[RatingBatch],
        accelerator: Accelerator,
    ) -> None:
        self.trained, self.criteria, self.source = trained, list(criteria), source
        self.device, self.autocast = accelerator.device, accelerator.autocast

    def loss(self, batch: RatingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the batch (scalar) and its metrics."""
        batch = batch.to(self.device)
        scorer = self.trained.scorer
        assert isinstance(scorer, RepaintingScorer)
        with self.autocast():
            predicted = rate(self.trained.module, batch, self.criteria)
        errors = (predicted - standardised(scorer.criteria, self.criteria, batch.points)).square().mean(dim=0)
        metrics = {f"loss/{name}": error.detach() for name, error in zip(self.criteria, errors, strict=True)}
        loss = errors.mean()
        return loss, {"loss": loss.detach(), **metrics}
