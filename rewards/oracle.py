"""The ground truth of the scenes world as a scorer. Evaluation always uses it; training only where a recipe says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.scenes.oracle import score_images

from .base import RewardOutput, check_images


class ScenesOracle:
    """Reads the prompt, finds the objects and measures the picture; rewards and aspects lie in [0, 1].

    Aspects: ``prompt_following`` (share of asked facts that hold), ``aesthetic``, ``fidelity``, ``correct`` (1 if every
    fact holds).
    """

    name = "scenes-oracle"
    differentiable = False

    def score(self, images: Tensor, prompts: Sequence[str], **context: Any) -> RewardOutput:
        """Score ``images`` (B, 3, 64, 64) in [0, 1].

        Raises:
            ValueError: a prompt outside the scenes grammar, or images of another size or range.
        """
        check_images(images, prompts, self.name)
        pictures = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        scores = score_images(pictures, prompts)
        aspects = {
            name: torch.tensor([float(getattr(score, name)) for score in scores])
            for name in ("prompt_following", "aesthetic", "fidelity", "correct")
        }
        return RewardOutput(torch.tensor([score.overall for score in scores]), aspects)
