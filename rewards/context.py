"""Scores with what a scorer needs of the inpainting task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion_align.data.holes import Holes

from .protocol import RewardOutput, RewardScorer


def score_with_context(
    scorer: RewardScorer, images: Tensor, prompts: Sequence[str], holes: Holes | None
) -> RewardOutput:
    """Scores of images, with what the scorer needs of the inpainting task.

    Raises:
        ValueError: it needs context that is not there.
    """
    known = {} if holes is None else {"source_images": holes.pictures, "masks": holes.masks}
    return scorer.score(images, prompts, **{name: value for name, value in known.items() if name in scorer.needs})
