"""SD 1.x and 2.x."""

from __future__ import annotations

from typing import Any

from diffusion_align.adapters.conditioning import Conditioning


class StableDiffusion:
    """SD 1.x and 2.x: one text encoder, its last hidden states."""

    name = "sd"
    vae_overflows = False

    def matches(self, pipeline: Any) -> bool:
        return getattr(pipeline, "text_encoder", None) is not None and not hasattr(pipeline, "text_encoder_2")

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
        return Conditioning(embeds)

    def null(self, pipeline: Any) -> Conditioning:
        return self.encode(pipeline, [""])

    def unet_arguments(self, cond: Conditioning) -> dict[str, Any]:
        return {"encoder_hidden_states": cond.embeds}
