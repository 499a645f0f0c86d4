"""Directional CLIP similarity of an edit (2108.00946): does the picture change as the text does?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

from .clip import OPEN_CLIP, OpenClipScorer, load_clip

#: Below this length a difference of unit embeddings is no direction but rounding.
NO_CHANGE = 1e-4


class DirectionalScorer(RewardScorer):
    """cos(I1 - I0, T1 - T0) of unit embeddings; 0 where the picture did not change.

    ``score(edited, prompts, source_images=..., source_prompts=...)``: prompts describe the edited picture,
    source_prompts the one before. Aspects: ``image_similarity``, the cosine of the two pictures (how much was kept).
    """

    name = "clip-directional"
    differentiable = True
    needs = frozenset({"source_images", "source_prompts"})

    def __init__(self, clip: OpenClipScorer) -> None:
        super().__init__()
        self.clip = clip

    def preprocess(self, images: Tensor) -> Tensor:
        return self.clip.preprocess(images)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        pictures = torch.cat([images, context["source_images"]])
        after, before = normalize(self.clip.encode_images(pictures).float(), dim=-1).chunk(2)
        texts = self.clip.encode_texts([*prompts, *context["source_prompts"]])
        text_after, text_before = normalize(texts.float(), dim=-1).chunk(2)
        change, wanted = after - before, text_after - text_before
        lengths = change.norm(dim=-1), wanted.norm(dim=-1)
        moved = (lengths[0] > NO_CHANGE) & (lengths[1] > NO_CHANGE)
        cosine = (change * wanted).sum(dim=-1) / (lengths[0] * lengths[1]).clamp(min=NO_CHANGE**2)
        reward = torch.where(moved, cosine, torch.zeros_like(cosine))
        return RewardOutput(reward, {"image_similarity": (after * before).sum(dim=-1)})


def load_directional(
    name: str = "clip-directional",
    checkpoint: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
) -> RewardScorer:
    """With OpenAI's CLIP L/14 unless another ``model`` of open_clip is named."""
    architecture, tag = OPEN_CLIP["clip-l"]
    clip = load_clip("clip", checkpoint, model or architecture, pretrained or (tag if model is None else None))
    assert isinstance(clip, OpenClipScorer)
    return DirectionalScorer(clip)
