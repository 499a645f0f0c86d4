"""PrefPaint's design (2410.21966) trained on people's points: one standardised score per criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import ResNetConfig

from diffusion_align.rewards.preprocess import HALF, Preprocess
from diffusion_align.rewards.protocol import RewardOutput
from diffusion_align.rewards.published.clip import build_open_clip
from diffusion_align.rewards.published.prefpaint import PrefPaintHead, PrefPaintScorer

from .scorer import TrainedScorer
from .vp import ConvTower


class SmallTower(nn.Module):
    """A small ResNet's features, their mean and their maximum over the picture: a flaw may be small."""

    def __init__(self, vision: dict[str, Any], image_size: int) -> None:
        super().__init__()
        self.tower = ConvTower(ResNetConfig(**vision), image_size)
        self.width: int = 2 * self.tower.width

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised to (B, width)."""
        tokens: Tensor = self.tower(images)
        return torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=-1)


class ClipTower(nn.Module):
    """The picture's half of a CLIP of open_clip."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.width: int = visual.output_dim

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised to (B, width)."""
        features: Tensor = self.visual(images)
        return features


def small_tower(settings: dict[str, Any], pretrained: bool) -> tuple[SmallTower, Preprocess]:
    """Settings: "vision" (of transformers' ResNet) and "image_size"."""
    size = settings["image_size"]
    return SmallTower(settings["vision"], size), Preprocess(size, "crop", HALF, HALF)


def clip_tower(settings: dict[str, Any], pretrained: bool) -> tuple[ClipTower, Preprocess]:
    """Settings: "model" (open_clip's name) and "pretrained" (its tag), used if ``pretrained``."""
    clip, _, preprocessing = build_open_clip(settings["model"], settings["pretrained"] if pretrained else None)
    return ClipTower(clip.visual), preprocessing


#: By "tower" in a scorer's settings.
TOWERS: Mapping[str, Callable[[dict[str, Any], bool], tuple[SmallTower | ClipTower, Preprocess]]] = MappingProxyType(
    {"small": small_tower, "clip": clip_tower}
)


class RepaintingScorer(TrainedScorer, PrefPaintScorer):
    """Scores a repainted picture beside what was left of the original, as :class:`PrefPaintScorer` does.

    Aspects are the criteria, each in standard deviations of the training ratings from their mean; the reward is their
    mean, so that it is linear in ``features`` as the published one.

    Args:
        settings: "tower" (key of ``TOWERS``) and its settings, "heads" and "feedforward" of the encoder layer,
            "criteria": {name: [mean, standard deviation] of its points}.
        pretrained: start from the tower's pretrained weights, where it has some.
    """

    kind = "prefpaint"
    name = "prefpaint"

    def __init__(self, settings: dict[str, Any], pretrained: bool = False) -> None:
        tower, preprocessing = TOWERS[settings["tower"]](settings, pretrained)
        criteria: dict[str, tuple[float, float]] = {name: tuple(line) for name, line in settings["criteria"].items()}
        head = PrefPaintHead(2 * tower.width, settings["heads"], settings["feedforward"], len(criteria))
        PrefPaintScorer.__init__(self, tower, head, preprocessing)
        self._settings, self.criteria = settings, criteria

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        features, scores = self.features(images, context)
        aspects = dict(zip(self.criteria, scores.unbind(-1), strict=True))
        return RewardOutput(scores.mean(dim=-1), aspects, features=features)

    def points(self, aspects: dict[str, Tensor]) -> dict[str, Tensor]:
        """Aspects as raters' points, each (B,)."""
        return {name: aspects[name] * std + mean for name, (mean, std) in self.criteria.items()}

    def settings(self) -> dict[str, Any]:
        return self._settings

    @classmethod
    def build(cls, settings: dict[str, Any], folder: Path) -> Self:
        return cls(settings)
