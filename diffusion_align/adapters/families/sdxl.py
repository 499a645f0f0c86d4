"""SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning


class StableDiffusionXL:
    """SDXL: two text encoders, a pooled embedding, and size ids (``text_time`` conditioning)."""

    name = "sdxl"
    vae_overflows = True

    def matches(self, pipeline: Any) -> bool:
        unet = getattr(pipeline, "unet", None)
        return (
            unet is not None
            and getattr(pipeline, "text_encoder_2", None) is not None
            and unet.config.addition_embed_type == "text_time"
        )

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled, self.time_ids(pipeline, len(prompts)))

    def null(self, pipeline: Any) -> Conditioning:
        cond = self.encode(pipeline, [""])
        if not pipeline.config.force_zeros_for_empty_prompt:
            return cond
        assert cond.pooled is not None
        return Conditioning(torch.zeros_like(cond.embeds), torch.zeros_like(cond.pooled), cond.time_ids)

    def unet_arguments(self, cond: Conditioning) -> dict[str, Any]:
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return {"encoder_hidden_states": cond.embeds, "added_cond_kwargs": added}

    def time_ids(self, pipeline: Any, batch: int) -> Tensor:
        """The ids of an uncropped image of the model's own size: what the pipeline samples with by default."""
        side = float(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=pipeline.text_encoder_2.device)
        return ids.expand(batch, 6)
