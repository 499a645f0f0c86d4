"""A scorer whose taste can be checked by eye."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_align.objectives.trust import FeatureStatistics
from diffusion_align.rewards import RewardOutput, RewardScorer


class Brightness(RewardScorer):
    """A reward whose best picture is known: white."""

    name = "brightness"
    differentiable = True

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        values = images.mean(dim=(1, 2, 3))
        return RewardOutput(values, features=torch.stack([values, images.std(dim=(1, 2, 3))], dim=1))


def seen_features() -> FeatureStatistics:
    """As of a training of :class:`Brightness` on pictures of middling light, whose errors grow away from them."""
    generator = torch.Generator().manual_seed(0)
    centre, spread = torch.tensor([0.5, 0.1]), torch.tensor([0.02, 0.02])
    features = centre + spread * torch.randn(200, 2, generator=generator)
    scales = torch.linspace(0.2, 4, 100)
    held_out = centre + spread * scales[:, None, None] * torch.randn(100, 2, 2, generator=generator)
    return FeatureStatistics.measure(features, held_out, 0.1 + 0.1 * scales)
