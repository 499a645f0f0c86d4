"""SDXL."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning

from .family import NetworkInputs
from .unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """SDXL: two text encoders, a pooled embedding, and size ids (``text_time`` conditioning)."""

    name: str = "sdxl"
    pipelines: Mapping[str, type] = {
        "sdxl": StableDiffusionXLPipeline,
        "sdxl-inpaint": StableDiffusionXLInpaintPipeline,
    }
    text_encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_prefixes: Mapping[str, tuple[str, ...]] = {
        "unet": ("lora_unet",),
        "text_encoder": ("lora_te1", "lora_te"),
        "text_encoder_2": ("lora_te2",),
    }
    scripts_name_original_blocks: bool = True
    conditioning_fields: Mapping[str, Collection[Any]] = {"addition_embed_type": ("text_time",)}
    latent_fields: Collection[str] = ("scaling_factor", "latents_mean", "latents_std")
    vae_overflows: bool = True
    modular: bool = True

    def matches(self, parts: Mapping[str, Any], network_config: Mapping[str, Any]) -> bool:
        # The refiner has the second encoder alone, and other size ids.
        there = all(parts.get(name) is not None for name in ("unet", *self.text_encoder_names))
        return there and network_config.get("addition_embed_type") == "text_time"

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled, self.default_size(pipeline, len(prompts)))

    def null(self, pipeline: Any, length: int | None = None) -> Conditioning:
        cond = self.encode(pipeline, [""])
        if not pipeline.config.force_zeros_for_empty_prompt:
            return cond
        assert cond.pooled is not None
        return Conditioning(torch.zeros_like(cond.embeds), torch.zeros_like(cond.pooled), cond.time_ids)

    def model_spec(self, pipeline: Any) -> dict[str, str]:
        return super().model_spec(pipeline) | {
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
        }

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        return sizes

    def default_size(self, pipeline: Any, batch: int) -> Tensor:
        """The ids of an uncropped image of the model's own size: what the pipeline samples with by default."""
        side = float(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=pipeline.text_encoder_2.device)
        return ids.expand(batch, 6)

    def arguments(self, cond: Conditioning) -> dict[str, Any]:
        return super().arguments(cond) | {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.time_ids}}

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        inputs, config = super().memory_inputs(network, rows, side), network.config
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.empty(rows, width, dtype=network.dtype, device="meta")
        sizes = torch.empty(rows, 6, dtype=network.dtype, device="meta")
        return replace(inputs, cond=replace(inputs.cond, pooled=pooled, time_ids=sizes))
