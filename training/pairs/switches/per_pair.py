"""What the switches do to the pairs of a batch: exchange, weaken, weigh, aim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.data.types import PairBatch
from diffusion_align.devices import send
from diffusion_align.objectives.pair_stats import PairStats
from diffusion_align.objectives.safeguard import swapped, weighted_factor, with_rejected_gradient
from diffusion_align.training.engine.randomness import MARGIN, generators

from ..config import DPOConfig


@dataclass(frozen=True)
class PairChanges:
    """Which pairs of a batch are changed, and how.

    Attributes:
        swap: (B,) bool, pairs whose images are exchanged; None: none.
        keep: (B,) float32, 0 where the rejected image gives no gradient; None: nowhere.
    """

    config: DPOConfig
    swap: Tensor | None
    keep: Tensor | None

    def exchanged(self, stats: PairStats) -> PairStats:
        """``swap_labels``."""
        return stats if self.swap is None else swapped(stats, self.swap)

    def weakened(self, stats: PairStats) -> PairStats:
        """``safeguard_mu`` and ``margin_dropout``: values stay, the rejected image's gradient is scaled."""
        config, factor = self.config, self.keep
        if config.safeguard_mu is not None:
            guarded = weighted_factor(stats, config.beta, config.safeguard_mu, config.safeguard)
            factor = guarded if factor is None else factor * guarded
        return stats if factor is None else with_rejected_gradient(stats, factor)


def pair_changes(config: DPOConfig, batch: PairBatch, device: torch.device) -> PairChanges:
    """What the settings ask for, of a batch on the host; whatever is random follows from the pairs' seeds."""
    swap = keep = None
    if config.swap_labels is not False:
        dropped = [not caption for caption in batch.captions]
        swap = send(torch.tensor([True] * len(batch) if config.swap_labels else dropped), device)
    if config.margin_dropout:
        drawn = torch.cat([torch.rand(1, generator=each) for each in generators(batch.seeds, MARGIN)])
        keep = send((drawn >= config.margin_dropout).float(), device)
    return PairChanges(config, swap, keep)


@dataclass(frozen=True)
class PairStrength:
    """What soft labels or scores make of each pair's loss.

    Attributes:
        uses_labels: whether soft labels enter the loss itself.
        pair_beta, target: for ``preference_loss``, (B,) on the device.
    """

    uses_labels: bool = True
    pair_beta: Tensor | None = None
    target: Tensor | None = None


def pair_strength(config: DPOConfig, batch: PairBatch, device: torch.device) -> PairStrength:
    """Weights of beta (``pair_beta``) and targets (``score_target``) of a batch on the host.

    Raises:
        ValueError: ``score_target`` on data without scores.
    """
    beta = target = None
    if config.pair_beta is not None:
        beta = send(config.pair_beta * (2 * batch.preference - 1), device)
    if config.score_target is not None:
        if batch.score is None:
            raise ValueError(f"score_target needs pairs with scores: {batch.keys[0]} has none")
        target = send(config.score_target * (batch.score[:, 0] - batch.score[:, 1]), device)
    return PairStrength(beta is None and target is None, beta, target)
