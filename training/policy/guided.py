"""The policy that online methods train: the denoiser under the guidance that its pictures are drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning, PromptEncoder
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.guidance.guider import UNGUIDED
from diffusion_align.process import Prediction


def own_scale(adapter: Adapter, scale: float) -> float:
    """The scale that ``GuidedPolicy`` takes for the model's own prediction: 1, or where a flow model takes the scale as
    an input (FLUX dev) the ``scale`` that its pictures are drawn with."""
    return scale if adapter.path.straight and adapter.embeds_guidance else 1.0


class GuidedPolicy:
    """Predictions as the sampler makes them: eps_null + w (eps_prompt - eps_null), one forward for both.

    Args:
        size: side of the pictures in pixels (SDXL's size ids).
        scale: w; 1 or less predicts with the prompt only (distilled models take any).

    Raises:
        ValueError: a scale above 1 for a model that was distilled to need none.
    """

    def __init__(self, adapter: Adapter, size: int, scale: float) -> None:
        if adapter.guidance == "none" and scale > 1:
            raise ValueError(UNGUIDED)
        self.adapter, self.scale = adapter, scale
        self.encode = PromptEncoder(adapter)
        self.size = size

    def conditions(self, prompts: Sequence[str], inpaint: Tensor | None) -> Conditioning:
        """What ``predict`` takes: conditioning of the prompts (B) and, with guidance, of null prompts (2B).

        Distilled models take the scale as an input instead of null prompts.
        """
        embeds = self.adapter.embeds_guidance
        nulls = [None] * len(prompts) if self.scale > 1 and not embeds else []
        texts: list[str | None] = [*prompts, *nulls]
        if inpaint is not None:
            inpaint = inpaint.repeat(len(texts) // len(prompts), 1, 1, 1)
        cond = conditioning(self.adapter, texts, self.size, self.size, inpaint, self.encode)
        return self._told(cond) if embeds else cond

    def given(self, cond: Conditioning, null: Conditioning) -> Conditioning:
        """``conditions`` of prompts and null prompts (B each) that are encoded already."""
        if self.adapter.embeds_guidance:
            return self._told(cond)
        return Conditioning.cat([cond, null]) if self.scale > 1 else cond

    def _told(self, cond: Conditioning) -> Conditioning:
        """With the scale, for a network that takes it as an input."""
        return replace(cond, guidance=cond.embeds.new_full((len(cond),), self.scale, dtype=torch.float32))

    def predict(self, x_t: Tensor, t: Tensor, conditions: Conditioning) -> Prediction:
        """The guided prediction at ``x_t`` (B, C, h, w), timesteps ``t`` (B,)."""
        if len(conditions) == len(x_t):
            return self.adapter.predict(x_t, t, conditions)
        both = self.adapter.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), conditions)
        prompt, null = both.output.chunk(2)
        count = len(x_t)
        output = null + self.scale * (prompt - null)
        return Prediction(output, x_t.float(), both.level[:count], both.kind)
