"""How each model family turns prompts into conditioning. A new family is one more class in ``FAMILIES``."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .types import Conditioning


class Family(Protocol):
    """What differs between pipelines that share a UNet, a VAE and a noise schedule."""

    name: str
    #: Whether the family's VAEs leave the range of half precision, unless their config says ``force_upcast: false``.
    vae_overflows: bool

    def matches(self, pipeline: Any) -> bool:
        """Whether this family drives ``pipeline``."""

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """Embed prompts; the empty prompt is embedded like any other."""

    def null(self, pipeline: Any) -> Conditioning:
        """The unconditional embedding that the pipeline itself uses for guidance, batch of 1."""

    def unet_arguments(self, cond: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the UNet besides sample and timestep."""


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


FAMILIES: tuple[Family, ...] = (StableDiffusionXL(), StableDiffusion())


def find_family(pipeline: Any) -> Family:
    """The family of a loaded diffusers pipeline.

    Raises:
        ValueError: none matches; the message names the pipeline's class and the supported families.
    """
    for family in FAMILIES:
        if family.matches(pipeline):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported: expected a UNet pipeline of one of these families: {names} "
        "(Stable Diffusion 1.x/2.x, SDXL and their inpainting variants)"
    )
