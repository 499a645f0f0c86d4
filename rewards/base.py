"""The protocol every scorer follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch of images; higher is better.

    Attributes:
        reward: (B,) float32, the scorer's overall score.
        aspects: named parts of it, each (B,) float32.
    """

    reward: Tensor
    aspects: dict[str, Tensor] = field(default_factory=dict)


class RewardScorer(Protocol):
    """Anything that scores images.

    Attributes:
        name: as given to ``load_scorer``.
        differentiable: whether gradients flow from the reward to the pixels.
    """

    name: str
    differentiable: bool

    def score(self, images: Tensor, prompts: Sequence[str], **context: Any) -> RewardOutput:
        """Score ``images`` (B, 3, H, W) float in [0, 1] made for ``prompts`` (B)."""


def check_images(images: Tensor, prompts: Sequence[str], scorer: str) -> None:
    """Refuse what no scorer can use.

    Raises:
        ValueError: wrong shape, a value outside [0, 1] (e.g. images in [-1, 1] or 0..255), or one prompt per image
            missing; the message names the scorer.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"scorer {scorer}: expected images of shape (B, 3, H, W), found {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"scorer {scorer}: {len(images)} images but {len(prompts)} prompts")
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point() or low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"scorer {scorer}: expected float images in [0, 1], found {images.dtype} in [{low:g}, {high:g}]"
        )
