"""A scorer whose taste can be checked by eye."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards import RewardOutput, RewardScorer


class Brightness(RewardScorer):
    """A reward whose best picture is known: white."""

    name = "brightness"
    differentiable = True

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        values = images.mean(dim=(1, 2, 3))
        return RewardOutput(values, features=torch.stack([values, images.std(dim=(1, 2, 3))], dim=1))
