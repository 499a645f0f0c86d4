"""The ground truth of the scenes world as a scorer. Evaluation always uses it; training only where a recipe says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

from .world.grammar import parse_prompt
from .world.oracle import score_images


class ScenesOracle(RewardScorer):
    """Reads the prompt, finds the objects and measures the picture (64 x 64); rewards and aspects lie in [0, 1].

    Aspects: ``prompt_following`` (share of asked facts that hold), ``aesthetic``, ``fidelity``, ``correct`` (1 if every
    fact holds). A prompt outside the scenes grammar, or another image size, is a ValueError.
    """

    name = "scenes-oracle"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            parse_prompt(prompt)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        pictures = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        scores = score_images(pictures, prompts)
        aspects = {
            name: torch.tensor([float(getattr(score, name)) for score in scores])
            for name in ("prompt_following", "aesthetic", "fidelity", "correct")
        }
        return RewardOutput(torch.tensor([score.overall for score in scores]), aspects)


def load_oracle(name: str = "scenes-oracle") -> RewardScorer:
    """The oracle; it has no weights."""
    return ScenesOracle()
