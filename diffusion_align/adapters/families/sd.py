"""SD 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning

from .unet import UNetFamily


class StableDiffusion(UNetFamily):
    """SD 1.x and 2.x: one text encoder, its last hidden states."""

    name: str = "sd"
    pipelines: Mapping[str, type] = {"sd": StableDiffusionPipeline, "sd-inpaint": StableDiffusionInpaintPipeline}
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    conditioning_fields: Mapping[str, Collection[Any]] = {"addition_embed_type": (None,)}
    vae_overflows: bool = False
    modular: bool = False

    def matches(self, parts: Mapping[str, Any], network_config: Mapping[str, Any]) -> bool:
        return parts.get("unet") is not None and parts.get("text_encoder") is not None and "text_encoder_2" not in parts

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
        return Conditioning(embeds)

    def null(self, pipeline: Any, length: int | None = None) -> Conditioning:
        return self.encode(pipeline, [""])

    def model_spec(self, pipeline: Any) -> dict[str, str]:
        second = pipeline.unet.config.cross_attention_dim == 1024  # of OpenCLIP, which SD 2.x reads its prompts with
        spec = super().model_spec(pipeline)
        of_second = {"v": "stable-diffusion-v2-768-v"}.get(spec["modelspec.prediction_type"], "stable-diffusion-v2-512")
        return spec | {
            "modelspec.architecture": of_second if second else "stable-diffusion-v1",
            "ss_base_model_version": "sd_v2" if second else "sd_v1",
            "ss_v2": str(second),
        }

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        return None
