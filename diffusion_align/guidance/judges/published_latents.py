"""The latents that published judges were made for; which pictures become which of them is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from diffusion_align.adapters.autoencoder import LatentSpace

#: What those who have other latents can do.
INSTEAD = "train an evaluator with 'diffusion-align train evaluator', or let scorers of pixels judge (--pixel-scorers)"
#: By the model whose autoencoder makes them.
PUBLISHED_LATENTS: Mapping[str, LatentSpace] = MappingProxyType(
    {"SD": LatentSpace("AutoencoderKL", 0.18215), "SDXL": LatentSpace("AutoencoderKL", 0.13025)}
)
